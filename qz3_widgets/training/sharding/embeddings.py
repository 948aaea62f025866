"""The embeddings, input and output: the largest parameters, gathered for the moment in which they are used.

DeepSpeed as it is keeps both of them through a step, each as large as two and a half layers of a 405B model (3.9 GiB):

- A fused loss reads ``lm_head.weight`` without calling the module. DeepSpeed notices (``ZeROOrderedDict`` in
  ``deepspeed/runtime/zero/parameter_offload.py``) and makes the weight an external parameter of the whole model. Here
  it is gathered once a micro-batch, in the loss, and is gone before the layers' backward begins.
- For activation checkpointing the input embedding's output is made to require a gradient. DeepSpeed takes that for a
  backward of the embedding that needs its weight, and the search for the next use of a weight
  (``__params_to_release`` in ``partitioned_param_coordinator.py``) does not count what leaf modules hold: so the
  weight stays gathered from the first layer's forward to its backward, and is used there for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .partition import is_partitioned

Waiting = Callable[[], contextlib.AbstractContextManager[Any]]


def gather_head_when_read(model: Any, waiting: Waiting = contextlib.nullcontext) -> bool:
    """Take the output embedding of ``model`` out of DeepSpeed's keeping, once the engine stands.

    Args:
        model: the base model, whose forward computes the loss.
        waiting: makes a context that is entered while the head is gathered.

    Returns:
        Whether it was done. A head that is trained, adapted or kept whole stays as DeepSpeed has it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(head._parameters, ZeROOrderedDict):
        return False
    parameters = [each for each in head._parameters.values() if each is not None]
    if not parameters or any(
        each.requires_grad or not is_partitioned(each) or getattr(each, "ds_persist", False) for each in parameters
    ):
        return False
    gathered = _Gathered(waiting)
    mine = _GatheredWhenRead(head, gathered)
    for name, parameter in head._parameters.items():
        mine[name] = parameter
    mine._in_forward = head._parameters._in_forward
    head._parameters = mine
    _backbone_of(model).register_forward_hook(gathered.release_after_gradient)
    model.register_forward_hook(gathered.release_without_gradient, always_call=True)
    return True


def let_input_embedding_go(model: Any) -> int:
    """Take a frozen input embedding of ``model`` out of the backward, once the engine stands.

    The hooks that make its output require a gradient (transformers' and PEFT's) are moved behind DeepSpeed's, which
    then sees an output without one, and expects no backward.

    Returns:
        The number of hooks that were moved.
    """
    embedding = model.get_input_embeddings()
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        return 0
    hooks = embedding._forward_hooks
    foreign = [key for key, hook in hooks.items() if not str(getattr(hook, "__module__", "")).startswith("deepspeed")]
    for key in foreign:
        hooks.move_to_end(key)
    return len(foreign)


class EmbeddingsCallback(TrainerCallback):  # type: ignore[misc]
    """Does both as soon as the engine stands."""

    def __init__(self, waiting: Waiting = contextlib.nullcontext) -> None:
        """``waiting`` makes a context that is entered while the head is gathered."""
        self._waiting = waiting

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine stands; there was no forward yet."""
        base = kwargs["model"].get_base_model()
        gather_head_when_read(base, self._waiting)
        let_input_embedding_go(base)


class _Gathered:
    """The parameters that were gathered for the loss at hand."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._parameters: list[Any] = []

    def gather(self, parameter: Any) -> None:
        part = parameter.ds_tensor.data
        if part.numel() == parameter.ds_numel and part.device == parameter.device:
            # One rank alone has the whole of it, and DeepSpeed would copy it.
            parameter.data = part.view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        else:
            with self._waiting():
                parameter.all_gather()
        self._parameters.append(parameter)

    def release(self, *unused: Any) -> None:
        while self._parameters:
            parameter = self._parameters.pop()
            # Tied to the input embedding, it may have become that module's to release.
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_active_sub_modules:
                parameter.partition()

    def release_after_gradient(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The backbone's forward is over: what it returns has its gradient when the head's backward is done."""
        hidden = output[0]
        if torch.is_grad_enabled() and hidden.requires_grad:
            hidden.register_hook(self.release)

    def release_without_gradient(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The whole forward is over: without a backward to come, or after an error, nobody else would release."""
        loss = None if output is None else _first_tensor(output)
        if loss is None or not loss.requires_grad:
            self.release()


class _GatheredWhenRead(ZeROOrderedDict):  # type: ignore[misc]
    """A module's parameters; a partitioned one is gathered when the model's forward reads it past its module."""

    def __init__(self, module: nn.Module, gathered: _Gathered) -> None:
        super().__init__(parent_module=module)
        self._gathered = gathered

    def __getitem__(self, key: str) -> Any:
        parameter: Any = dict.__getitem__(self, key)
        status = getattr(parameter, "ds_status", None)
        if status == ZeroParamStatus.NOT_AVAILABLE and self._in_forward and not torch.compiler.is_compiling():
            self._gathered.gather(parameter)
        return parameter


def _backbone_of(model: Any) -> nn.Module:
    return getattr(model, model.base_model_prefix)  # type: ignore[no-any-return]


def _first_tensor(output: Any) -> torch.Tensor | None:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    with contextlib.suppress(StopIteration):
        return next(value for value in values if isinstance(value, torch.Tensor))
    return None
