"""Decoder layers gathered whole: one collective a layer, the next one ahead, let go as soon as it has been used.

DeepSpeed's own hooks walk over each of a layer's parameters, 30 of them with LoRA, whenever the layer is gathered or
released, and copy each into a buffer and out of one; in the shape of an 8B model that takes longer than the arithmetic.
Here a layer's frozen parameters lie side by side (:mod:`.flat`), and DeepSpeed's hooks are taken off the layer. Its
partitioning, its engine and its optimizer stay what they are.

A layer is gathered before its forward and let go after it; gathered again when its output's gradient arrives, kept for
its recomputation, and let go when its input's gradient is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn

from .adapter import make_lean
from .flat import FlatShard
from .gradients import reduce_together
from .linear import STATISTICS, ShardedLinear4bit
from .partition import is_partitioned
from .resident import MAX_ADAPTER_BYTES, ResidentParameters

Watcher = Callable[["GatheredLayer", bool], None]
"""Called when a layer has been gathered, with whether it was for a forward."""


class LayerGather:
    """The gathering of all decoder layers of one model."""

    def __init__(self, layers: list[GatheredLayer], *, prefetch: bool) -> None:
        """``layers`` in the order of the model; ``prefetch``: begin to gather the next while one is at work."""
        self.layers = layers
        self.watchers: list[Watcher] = []
        self.waiting: Callable[[], AbstractContextManager[Any]] = nullcontext  # around every wait for a layer
        self._prefetches = prefetch
        # Learned in each forward: which layer follows which.
        self._next: dict[GatheredLayer, GatheredLayer] = {}
        self._previous: dict[GatheredLayer, GatheredLayer] = {}
        self._last: GatheredLayer | None = None
        self._ahead: GatheredLayer | None = None
        for place, layer in enumerate(layers):
            layer.enlist(self, place)

    @property
    def largest_bytes(self) -> int:
        """What the largest layer takes while it is gathered."""
        return max(layer.whole_bytes for layer in self.layers)

    def acquire(self, layer: GatheredLayer, *, forward: bool) -> None:
        """Have ``layer`` whole; collective. In a backward pass a forward is a recomputation."""
        if layer.is_acquired:
            return
        in_backward = _in_backward()
        if not in_backward:
            self._learn(layer)
        if self._ahead is not None:
            if self._ahead is not layer:  # what was expected did not come
                self._ahead.drop()
            self._ahead = None
        layer.begin()
        with self.waiting():
            layer.wait()
        following = (self._previous if in_backward else self._next).get(layer)
        if self._prefetches and following is not None and not following.is_begun:
            following.begin()
            self._ahead = following
        for watcher in self.watchers:
            watcher(layer, forward)

    def _learn(self, layer: GatheredLayer) -> None:
        last, self._last = self._last, layer
        if last is not None and last.place < layer.place:
            self._next[last] = layer
            self._previous[layer] = last


class GatheredLayer:
    """One decoder layer: its shard, its hooks, and whether it is whole."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Put the parts of the frozen parameters of ``module`` side by side; the engine must stand."""
        self.module = module
        self.place = 0
        self.is_begun = self.is_acquired = False
        self._gather: LayerGather
        self._in_backward = self._is_let_go_by_input = False
        packed = {id(each): (layer, name) for layer, name, each in _packed_parameters(module)}
        frozen: list[Any] = []
        self._foreign: list[Any] = []  # frozen ones of modules that are not ours
        self._others: list[Any] = []  # trained ones
        parameter: Any
        for parameter in dict.fromkeys(module.parameters()):
            if not is_partitioned(parameter):
                continue
            if id(parameter) in packed:
                parameter.ds_persist = False  # of small models DeepSpeed would keep the scales, or all, whole
                frozen.append(parameter)
            elif parameter.ds_persist:
                continue
            elif parameter.requires_grad:
                self._others.append(parameter)
            else:
                frozen.append(parameter)
                self._foreign.append(parameter)
        for parameter in frozen:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()
        self._shard = FlatShard(frozen, device) if frozen else None
        self.frozen = frozen
        if self._shard is not None:
            for parameter in frozen:
                if id(parameter) in packed:
                    layer, name = packed[id(parameter)]
                    layer.read_from(name, self._shard.view(parameter))
            if self._shard.is_always_whole:
                self._expose()

    @property
    def whole_bytes(self) -> int:
        """What the frozen parameters take while they are gathered."""
        return 0 if self._shard is None else self._shard.whole_bytes

    @property
    def whole(self) -> torch.Tensor | None:
        """Where the frozen parameters are while they are gathered."""
        return None if self._shard is None else self._shard.whole

    @property
    def needs_gathering(self) -> bool:
        """Whether there is anything that is not whole all the time."""
        return bool(self._others) or (self._shard is not None and not self._shard.is_always_whole)

    def enlist(self, gather: LayerGather, place: int) -> None:
        """Be the layer in ``place`` of ``gather``, with hooks that call it."""
        self._gather, self.place = gather, place
        if self.needs_gathering:
            self.module.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
            self.module.register_forward_hook(self._after_forward)

    def begin(self) -> None:
        """Begin to gather, if it is not begun."""
        if self.is_begun:
            return
        self.is_begun = True
        if self._shard is not None:
            self._shard.gather()
        self._handle = self._others[0].all_gather_coalesced(self._others) if self._others else None

    def wait(self) -> None:
        """Have what follows find the parameters whole."""
        if self._shard is not None:
            self._shard.wait()
            self._expose()
        if self._handle is not None:
            self._handle.wait()
            self._handle = None
        self.is_acquired = True

    def drop(self) -> None:
        """Let go."""
        if not self.is_begun:
            return
        if self._handle is not None:
            self._handle.wait()
            self._handle = None
        for parameter in self._others:
            parameter.partition()
        if self._shard is not None and not self._shard.is_always_whole:
            for parameter in self._foreign:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            self._shard.release()
        self.is_begun = self.is_acquired = False

    def _expose(self) -> None:
        """Give the parameters whose modules are not ours their values."""
        if self._shard is not None:
            for parameter in self._foreign:
                parameter.data = self._shard.view(parameter).read()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._gather.acquire(self, forward=True)
        if not torch.is_grad_enabled() or self._in_backward:
            return  # no backward, or a recomputation, whose output nobody asks for
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.requires_grad]
        self._is_let_go_by_input = bool(inputs)
        if len(inputs) == 1:
            handle = inputs[0].register_hook(self._leave_backward)
            # The layer before this one has a hook on the same tensor, which gathers: first let go.
            inputs[0]._backward_hooks.move_to_end(handle.id, last=False)  # type: ignore[union-attr]
        elif inputs:
            torch.autograd.graph.register_multi_grad_hook(inputs, self._leave_backward, mode="all")

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _in_backward():
            self.drop()
        if torch.is_grad_enabled() and not self._in_backward:
            for each in _tensors(output):
                if each.requires_grad:
                    each.register_hook(self._enter_backward)

    def _enter_backward(self, gradient: torch.Tensor) -> None:
        if self._in_backward:
            return
        self._in_backward = True
        self._gather.acquire(self, forward=False)
        if not self._is_let_go_by_input:
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self, *gradients: Any) -> None:
        self._in_backward = False
        self.drop()


def gather_layers(model: nn.Module, engine: Any, *, device: torch.device, prefetch: bool) -> LayerGather | None:
    """Take the leaf modules of ``model`` out of DeepSpeed's keeping, once the engine stands.

    Returns:
        ``None`` if there are none, or DeepSpeed's hooks are not those that are known: then it gathers as it always
        does.
    """
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    modules = list(_leaves(model))
    if not modules or offload is None:
        return None
    hooks = [list(_hooks_on(module, offload)) for module in modules]
    if any(len(each) != _NUM_HOOKS for each in hooks):
        print("DeepSpeed's hooks are not those that are known: it gathers the layers itself, which takes longer")
        return None
    for handle in (handle for each in hooks for handle in each):
        handle.remove()
    for module in modules:
        _read_plainly(module)
        make_lean(module)
    small = _keep_adapter_whole(modules, list(offload.persistent_parameters))
    _reduce_resident(modules, engine.optimizer)  # before the rest: it gives memory back
    layers = [GatheredLayer(module, device) for module in modules]
    ours = {id(parameter) for layer in layers for parameter in layer.frozen}
    resident = ResidentParameters([each for each in small if id(each) not in ours], device)
    offload.persistent_parameters = engine.optimizer.persistent_parameters = [resident] if resident.parameters else []
    _stay_whole(offload, engine.optimizer, resident, model)
    offload.layer_gather = LayerGather(layers, prefetch=prefetch)
    return offload.layer_gather  # type: ignore[no-any-return]


def _stay_whole(offload: Any, optimizer: Any, resident: ResidentParameters, model: nn.Module) -> None:
    """Leave ``resident`` whole while the optimizer steps: it is brought up to date afterwards.

    DeepSpeed partitions everything before a step, by walking over all modules, twice. What a checkpoint holds is still
    partitioned.
    """
    partition_all = offload.partition_all_parameters
    everything: list[Any] = [each for each in model.parameters() if is_partitioned(each)]
    leaving = [each for each in everything if not each.ds_persist]

    def partition_all_parameters() -> None:
        if any(each.ds_status == ZeroParamStatus.INFLIGHT for each in leaving):
            partition_all()
            resident.all_gather()
            return
        for each in leaving:
            each.ds_active_sub_modules.clear()
            if each.ds_status == ZeroParamStatus.AVAILABLE:
                each.partition()

    def checkpoint_event_prologue() -> None:
        resident.partition()
        partition_all()

    offload.partition_all_parameters = partition_all_parameters
    optimizer.checkpoint_event_prologue = checkpoint_event_prologue


def _reduce_resident(modules: list[nn.Module], optimizer: Any) -> None:
    """Reduce the gradients of what is whole in ``modules`` all at once."""
    inside: dict[Any, None] = dict.fromkeys(each for module in modules for each in module.parameters())
    trained = [each for each in inside if is_partitioned(each) and each.requires_grad and each.ds_persist]
    if trained and not reduce_together(optimizer, trained):
        print("gradients are reduced one by one, by DeepSpeed")


def _keep_adapter_whole(modules: list[nn.Module], resident: list[Any]) -> list[Any]:
    """``resident`` with the trained parameters of ``modules``, if they are small."""
    inside: list[Any] = [each for module in modules for each in module.parameters() if is_partitioned(each)]
    trained = [each for each in inside if each.requires_grad and not each.ds_persist]
    if sum(each.ds_numel * each.element_size() for each in trained) > MAX_ADAPTER_BYTES:
        return resident
    for each in trained:
        each.ds_persist = True
    return [*resident, *trained]


_NUM_HOOKS = 4  # before and after the forward, and as many that lead to those around the backward


class _PlainParameters(ZeROOrderedDict):  # type: ignore[misc]
    """Parameters that are read without a question; DeepSpeed's own dictionary looks at each one's state."""

    __getitem__ = dict.__getitem__


def _read_plainly(module: nn.Module) -> None:
    for each in module.modules():
        plain = _PlainParameters(parent_module=each)
        for name, parameter in each._parameters.items():
            plain[name] = parameter
        each._parameters = plain


def _hooks_on(module: nn.Module, offload: Any) -> Iterator[Any]:
    wanted = (module._forward_pre_hooks, module._forward_hooks)
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        hooks = handle.hooks_dict_ref()
        if any(hooks is each for each in wanted) and handle.id in hooks:
            yield handle


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    if z3_leaf_module(model):
        yield model
        return
    for child in model.children():
        yield from _leaves(child)


def _packed_parameters(module: nn.Module) -> Iterator[tuple[ShardedLinear4bit, str, nn.Parameter]]:
    for each in module.modules():
        if isinstance(each, ShardedLinear4bit):
            for name in ("weight", STATISTICS):
                parameter = each._parameters.get(name)
                if parameter is not None:
                    yield each, name, parameter


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (each for each in output.values() if isinstance(each, torch.Tensor))
    elif isinstance(output, tuple | list):
        yield from (each for each in output if isinstance(each, torch.Tensor))


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
