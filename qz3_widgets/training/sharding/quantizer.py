"""transformers' 4-bit loading with one difference: each parameter is partitioned the moment it exists.

Through transformers' own extension points: a subclass of its bitsandbytes quantizer asks to convert every
parameter, and its conversion, the last step of the loader's pipeline, hands back parameters that ZeRO-3 holds in
parts. Where the loader passes a :class:`~.sources.Source` (an unread tensor of the checkpoint), only this rank's
slice of it is read and quantized.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import torch
from torch import nn
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto as registry
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from .linear import StateWithoutScales, give_statistics, let_go, num_storage_elements, take_off_statistics
from .partition import Partitioner, hollow, padded, part_of
from .quantize import Recipe, exchange_scales, make_state, quantize_slice
from .scales import Unsettled, settle_scales
from .sources import Source

_METHOD = "bitsandbytes_4bit"
_CONVERT_FAILED = 13


_EXCHANGE_SCALES = 2**22
"""Scales of whole weights, for each rank, that go into one exchange: small matrices together, large ones by few."""


@dataclass(frozen=True)
class Pending:
    """A weight that is quantized and partitioned, but for its statistics."""

    parameter: Any
    module: bnb.nn.Linear4bit
    weight: Unsettled


class ShardingOptions:
    """What a load needs to know; set while :func:`sharded_quantizer` is active."""

    def __init__(
        self, partitioner: Partitioner, *, shard_statistics: bool, release_gathered: bool, mark: Callable[[str], None]
    ) -> None:
        """``mark`` is told the name of a parameter's module now and then."""
        self.partitioner = partitioner
        self.shard_statistics = shard_statistics
        self.release_gathered = release_gathered
        self.mark = mark
        self.num_sliced = 0
        self.num_whole = 0
        self.pending: list[Pending] = []


_options: ShardingOptions | None = None


@contextmanager
def sharded_quantizer(options: ShardingOptions) -> Iterator[ShardingOptions]:
    """While active, ``from_pretrained`` with a 4-bit ``BitsAndBytesConfig`` shards as it loads."""
    global _options  # noqa: PLW0603 - transformers makes the quantizer itself, and passes it nothing of ours
    before, kind = _options, registry.AUTO_QUANTIZER_MAPPING[_METHOD]
    _options = options
    registry.AUTO_QUANTIZER_MAPPING[_METHOD] = ShardingQuantizer
    try:
        yield options
    finally:
        _options = before
        registry.AUTO_QUANTIZER_MAPPING[_METHOD] = kind


def _active() -> ShardingOptions:
    if _options is None:
        raise RuntimeError("the sharding quantizer is used outside of sharded_quantizer()")
    return _options


class ShardingQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Bitsandbytes' quantizer that converts, and so partitions, every parameter."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Yes for all parameters; buffers stay with transformers."""
        module, name = get_module_from_name(model, param_name)
        return name in module._parameters

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Nothing to reserve: the loader would otherwise ask the allocator for the whole model ahead of time."""
        return 0

    def get_quantize_ops(self) -> Any:
        """The conversion that partitions."""
        return ShardingQuantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """The conversion for checkpoints that are quantized already."""
        return {"deserialize": ShardingDeserialize}


def _or_leave(convert: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """End the process if a conversion fails.

    transformers collects exceptions of conversions and goes on; this rank would miss a collective, and the others would
    wait for it until the timeout.
    """

    @wraps(convert)
    def guarded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return convert(*args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever it is, going on means a hang
            print(traceback.format_exc(), file=sys.stderr)
            on_failure(sys.exc_info()[1])
            os._exit(_CONVERT_FAILED)

    return guarded


def _no_record(error: BaseException | None) -> None:
    """Until the rank's session says how a failure is recorded."""


on_failure: Callable[[BaseException | None], None] = _no_record
"""Called before the process ends because a conversion failed; the rank's session writes its end record here."""


class ShardingQuantize(Bnb4bitQuantize):  # type: ignore[misc]
    """The last step of loading a 16-bit checkpoint: quantize, or not, and partition."""

    @_or_leave
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """One target parameter, or several if a checkpoint tensor was split."""
        out: dict[str, Any] = {}
        for name, found in input_dict.items():
            value = found[0] if isinstance(found, list) else found
            module, leaf = get_module_from_name(model, name)
            if not isinstance(module, bnb.nn.Linear4bit) or leaf != "weight":
                out[name] = _plain(value)
            elif isinstance(value, Source):
                out[name] = _quantized_slice(value, module)
            else:
                whole = super().convert({name: value}, full_layer_name=full_layer_name, model=model, **kwargs)[name]
                out[name] = _quantized_whole(whole, module)
        return out


class ShardingDeserialize(Bnb4bitDeserialize):  # type: ignore[misc]
    """The last step of loading a checkpoint that bitsandbytes has quantized: its bytes are cut, never converted."""

    @_or_leave
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """A packed weight with its statistics, or one tensor that was not quantized."""
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if len(found) == 1:
            ((name, value),) = found.items()
            return {name: _plain(value)}
        module, _ = get_module_from_name(model, full_layer_name)
        weight = found.pop("weight")
        partitioner = _active().partitioner
        device = partitioner.device
        name = next(name for name in found if name.rpartition(".")[2] == "absmax")
        absmax = found[name]
        sliced = _shards_statistics() and isinstance(absmax, Source)
        if sliced:  # read below, and only this rank's part
            found[name] = torch.empty(0, dtype=absmax.stored)
        statistics = {name: value.whole() if isinstance(value, Source) else value for name, value in found.items()}
        state = functional.QuantState.from_dict(qs_dict=statistics, device=device)
        recipe = Recipe(state.blocksize, state.quant_type, state.nested, weight.dtype)
        parameter: Any
        if isinstance(weight, Source):
            part = part_of(weight.numel(), partitioner.num_ranks, partitioner.rank)
            piece = padded(weight.read_stored(part.begin, part.end), part.size).to(device)
            parameter = _params4bit(hollow(weight.shape, weight.stored, device), recipe, module)
            partitioner.adopt(parameter, piece)
            _active().num_sliced += 1
        else:
            parameter = _params4bit(weight, recipe, module)
            partitioner.partition(parameter)
            _active().num_whole += 1
        if sliced:
            _read_statistics(parameter, state, module, absmax)
            return {"weight": parameter}
        _finish(parameter, state, module)
        return {"weight": parameter}


def _shards_statistics() -> bool:
    return _active().release_gathered and _active().shard_statistics


def _read_statistics(parameter: Any, state: functional.QuantState, module: bnb.nn.Linear4bit, absmax: Source) -> None:
    """Give a layer its part of the scales that a checkpoint holds, read from the file by itself."""
    partitioner, storage = _active().partitioner, parameter.quant_storage
    state.absmax = None
    state.__class__ = StateWithoutScales
    _give_state(parameter, state, module)
    size = absmax.stored.itemsize
    num_elements = num_storage_elements(absmax.numel() * size, storage)
    part = part_of(num_elements, partitioner.num_ranks, partitioner.rank)
    # Whole scales around the part's bytes, which may begin or end within one.
    begin, end = part.begin * storage.itemsize, min(part.end * storage.itemsize, absmax.numel() * size)
    raw = absmax.read_stored(begin // size, -(-end // size)).view(torch.uint8)[begin % size :][: max(0, end - begin)]
    piece = padded(raw, part.size * storage.itemsize).clone().view(storage).to(partitioner.device)
    whole = hollow((num_elements,), storage, partitioner.device)
    partitioner.adopt(give_statistics(let_go(module), whole, absmax.numel(), absmax.stored), piece)


def _plain(value: Any) -> nn.Parameter:
    """A parameter that is not quantized: embeddings, norms, biases, the head."""
    options = _active()
    partitioner = options.partitioner
    if not isinstance(value, Source):
        parameter = nn.Parameter(value, requires_grad=False)
        partitioner.partition(parameter)
        options.num_whole += 1
        return parameter
    part = part_of(value.numel(), partitioner.num_ranks, partitioner.rank)
    piece = padded(value.read(part.begin, part.end), part.size)
    parameter = nn.Parameter(hollow(value.shape, value.dtype, partitioner.device), requires_grad=False)
    partitioner.adopt(parameter, piece)
    options.num_sliced += 1
    return parameter


def _quantized_slice(value: Source, module: bnb.nn.Linear4bit) -> Any:
    options, old = _active(), module.weight
    partitioner = options.partitioner
    recipe = Recipe(old.blocksize, old.quant_type, old.compress_statistics, old.quant_storage)
    source = value.T if issubclass(module.source_cls, Conv1D) else value
    part, scales, counts = quantize_slice(
        source.read, source.numel(), recipe, num_ranks=partitioner.num_ranks, rank=partitioner.rank
    )
    shape = (recipe.num_storage_elements(source.numel()), 1)
    parameter = _params4bit(hollow(shape, recipe.quant_storage, partitioner.device), recipe, module)
    partitioner.adopt(parameter, part)
    # transformers puts it there too, when this returns; the scales may be exchanged before that.
    module._parameters["weight"] = parameter
    module._is_hf_initialized = True
    options.pending.append(Pending(parameter, module, Unsettled(scales, counts, source.shape, source.dtype, recipe)))
    options.num_sliced += 1
    if sum(pending.weight.num_scales for pending in options.pending) >= _EXCHANGE_SCALES * partitioner.num_ranks:
        finish_pending()
    return parameter


def finish_pending() -> None:
    """Settle the statistics of the weights that were quantized by slices, and give each its quantization state.

    A collective call: all ranks load the same tensors in the same order, and come here at the same ones.
    """
    options = _active()
    waiting, options.pending = options.pending, []
    if not waiting:
        return
    if _shards_statistics():
        _settle(waiting)
    else:
        _share_all(waiting)
    options.mark("scales_exchanged")


def _settle(waiting: list[Pending]) -> None:
    """Each rank gets its part of the statistics."""
    partitioner = _active().partitioner
    settled = settle_scales(
        [pending.weight for pending in waiting],
        num_ranks=partitioner.num_ranks,
        rank=partitioner.rank,
        group=partitioner.group,
    )
    for pending, each in zip(waiting, settled, strict=True):
        weight, module = pending.weight, pending.module
        _give_state(pending.parameter, each.state, module)
        whole = hollow((weight.num_elements,), each.part.dtype, partitioner.device)
        statistics = give_statistics(let_go(module), whole, weight.num_scales, weight.statistics_dtype)
        partitioner.adopt(statistics, each.part)


def _share_all(waiting: list[Pending]) -> None:
    """Every rank gets the whole statistics."""
    dtypes = {pending.weight.dtype for pending in waiting}
    whole = exchange_scales(
        [pending.weight.scales for pending in waiting],
        [pending.weight.counts for pending in waiting],
        dtypes.pop() if len(dtypes) == 1 else torch.float32,
        _active().partitioner.group,
    )
    for pending, absmax in zip(waiting, whole, strict=True):
        state = make_state(absmax, pending.weight.shape, pending.weight.dtype, pending.weight.recipe)
        _finish(pending.parameter, state, pending.module)


def _quantized_whole(parameter: Any, module: bnb.nn.Linear4bit) -> Any:
    """A weight that transformers' pipeline had to have whole, and has quantized."""
    options = _active()
    state = parameter.quant_state
    options.partitioner.partition(parameter)
    _finish(parameter, state, module)
    options.num_whole += 1
    return parameter


def _params4bit(data: torch.Tensor, recipe: Recipe, module: nn.Module) -> Any:
    """A ``Params4bit`` over packed data, without the quantization that its constructor would start."""
    parameter = torch.Tensor._make_subclass(bnb.nn.Params4bit, data, False)
    parameter.blocksize = recipe.blocksize
    parameter.compress_statistics = recipe.compress_statistics
    parameter.quant_type = recipe.quant_type
    parameter.quant_storage = recipe.quant_storage
    parameter.bnb_quantized = True
    parameter.module = module
    return parameter


def _give_state(parameter: Any, state: functional.QuantState, module: bnb.nn.Linear4bit) -> None:
    parameter.quant_state = module.quant_state = state
    module._is_hf_initialized = True
    # Set before the statistics are taken off, which looks at the weight; transformers sets it again.
    module._parameters["weight"] = parameter


def _finish(parameter: Any, state: functional.QuantState, module: bnb.nn.Linear4bit) -> None:
    options = _active()
    _give_state(parameter, state, module)
    if options.release_gathered:
        layer = let_go(module)
        if options.shard_statistics:
            options.partitioner.partition(take_off_statistics(layer))
