"""The inputs of decoder layers, which activation checkpointing saves for the recomputation, in host memory until then.

They are what grows with the number of layers: 32 MiB each at 1024 tokens of a 405B model, 3.9 GiB in all, as much as
its head. A layer's input leaves while the next layer computes, and comes back while the layer behind it does its
backward, through page-locked memory and a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config.schema import RunConfig
from ..units import format_bytes

WORTHWHILE = 1 / 25
"""``auto`` offloads what would take more than this part of the GPU's memory."""


@dataclass
class _Saved:
    """One layer's input, away."""

    host: torch.Tensor
    left: Any  # an event: it has left the device
    before: _Saved | None  # what was saved before it is wanted after it
    back: torch.Tensor | None = None
    is_back: Any = None  # an event


class ActivationOffload:
    """Takes what ``torch.utils.checkpoint`` saves of a layer's inputs to the host and back."""

    def __init__(self, device: torch.device) -> None:
        """``device``: where the layers compute. On a CPU it copies, for the sake of tests."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: tuple[torch.Tensor, Any] | None = None
        self._last: _Saved | None = None
        self.offloaded_bytes = 0

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """``checkpoint``, a function of ``torch.utils.checkpoint``'s kind, that saves its inputs here.

        What is computed inside has hooks of its own on top of these, and is not saved at all.
        """

        def offloading(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpoint(*args, **kwargs)

        return offloading

    def _pack(self, tensor: torch.Tensor) -> Any:
        # Only hidden states need a gradient; masks and positions are shared by all layers.
        if tensor.device != self._device or not tensor.is_floating_point() or not tensor.requires_grad:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._stream is not None)
        self.offloaded_bytes += tensor.numel() * tensor.element_size()
        left = None
        if self._stream is None:
            host.copy_(tensor.detach())
        else:
            self._let_leave()
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor.detach(), non_blocking=True)
                left = torch.cuda.Event()
                left.record()
            self._leaving = (tensor, left)
        self._last = _Saved(host, left, self._last)
        return self._last

    def _let_leave(self) -> None:
        """What left before is away by now: hold its memory no longer. In the order of the stream, without waiting."""
        if self._leaving is not None:
            torch.cuda.current_stream(self._device).wait_event(self._leaving[1])
            self._leaving = None

    def _unpack(self, saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._last = None  # the backward has begun: what is saved next is the first again
        if self._stream is None:
            return cast("torch.Tensor", saved.host.clone())
        self._let_leave()
        self._fetch(saved)
        torch.cuda.current_stream(self._device).wait_event(saved.is_back)
        tensor, saved.back = saved.back, None
        if saved.before is not None:
            self._fetch(saved.before)
            saved.before = None
        return cast("torch.Tensor", tensor)

    def _fetch(self, saved: _Saved) -> None:
        if saved.back is not None or self._stream is None:
            return
        # Taken from the memory of the computing stream, and written once everything before has been computed.
        saved.back = torch.empty(saved.host.shape, dtype=saved.host.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(saved.left)
            saved.back.copy_(saved.host, non_blocking=True)
            saved.is_back = torch.cuda.Event()
            saved.is_back.record()


def checkpointed_bytes(config: RunConfig, model: nn.Module, element_size: int) -> int:
    """What a micro-batch's saved layer inputs take: layers x batch x tokens x hidden size."""
    shape = model.config.get_text_config()  # type: ignore[union-attr,operator]
    tokens = config.training.per_device_train_batch_size * config.data.max_length
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    return layers * tokens * int(shape.hidden_size) * element_size


class ActivationOffloadCallback(TrainerCallback):  # type: ignore[misc]
    """Turns it on, once the model is wrapped and checkpointing is on."""

    def __init__(self, config: RunConfig, say: Callable[[str], None], note: Callable[..., None]) -> None:
        """``say`` prints on one rank, ``note`` puts what was chosen on record."""
        self._config, self._say, self._note = config, say, note

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """There was no forward yet."""
        wanted, model = self._config.training.activation_offload, kwargs["model"]
        layers = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
        if args.device.type != "cuda" or not layers or wanted is False:
            return
        size = checkpointed_bytes(self._config, model, 2 if args.bf16 or args.fp16 else 4)
        capacity = torch.cuda.get_device_properties(args.device).total_memory
        if wanted == "auto" and size <= WORTHWHILE * capacity:
            return
        offload = ActivationOffload(args.device)
        for module in layers:
            module._gradient_checkpointing_func = offload.around(module._gradient_checkpointing_func)
        self._note(offloaded_activation_bytes=size)
        self._say(f"the inputs of layers are kept in host memory: {format_bytes(size)} a micro-batch")
