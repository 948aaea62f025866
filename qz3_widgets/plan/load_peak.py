"""The most that a rank holds while the model loads: one parameter after the other, each on top of those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .shapes import ModelShape, Weight
from .state import NOISE_BYTES, Components, Setting, parts_of


def load_peak(setting: Setting, settled: Components) -> tuple[Components, str]:
    """The fullest moment of the load, and its name.

    What is not loaded yet at that moment is taken off all components alike.
    """
    if setting.strategy == "sharded":
        moments = [*_parts_passing(setting, settled), *_exchanges(setting, sum(settled.values()))]
    else:
        moments = list(_weights_passing(setting, settled))
    total = sum(settled.values())
    best, moment = max(moments, default=(total, ""))
    if best <= total:
        return {"loading": 0, **settled}, "the model is loaded"
    scale = min(1.0, total / best)
    before = {name: math.floor(size * scale) for name, size in settled.items()}
    return {**before, "loading": best - sum(before.values())}, moment


def _weights_passing(setting: Setting, settled: Components) -> Iterator[tuple[int, str]]:
    """As transformers loads: a weight in 16 bit, and what bitsandbytes makes of it beside it, its scales in fp32."""
    sizes = setting.sizes
    weights = list(_in_order(setting.shape))
    kept = [_whole(setting, weight) for weight, _ in weights]
    still_to_come = sum(size * count for size, (_, count) in zip(kept, weights, strict=True))
    for own, (weight, count) in zip(kept, weights, strict=True):
        still_to_come -= own * count
        passing = sizes.rounded(weight.numel * sizes.dtype_bytes)
        if weight.quantized:
            packed = sizes.packed(weight.numel) * sizes.storage_bytes
            passing += sizes.rounded(packed) + sizes.rounded(sizes.num_scales(weight.numel) * 4)
        yield sum(settled.values()) - still_to_come - own + passing, f"{weight.name} passes through"


def _whole(setting: Setting, weight: Weight) -> int:
    """What a loaded weight holds where it is not sharded."""
    sizes = setting.sizes
    if not weight.quantized:
        return sizes.rounded(weight.numel * sizes.dtype_bytes)
    packed = sizes.packed(weight.numel) * sizes.storage_bytes
    return sum(map(sizes.rounded, (packed, sizes.scale_bytes(weight.numel), *sizes.nested(weight.numel))))


def _parts_passing(setting: Setting, settled: Components) -> Iterator[tuple[int, str]]:
    """Each parameter passes through as one rank's part in 16 bit.

    From a file the part is the parameter's own memory (of a 4-bit weight, it is quantized from it); random weights are
    a piece of a pool that is repeated, and its product with their spread.
    """
    sizes = setting.sizes
    total = sum(settled.values())
    if setting.is_random and sizes.device == "cpu":
        # In fp32 first, which on a GPU's host nobody counts; before the first matrix.
        yield 3 * NOISE_BYTES, "the noise of random weights is made"
    still_to_come = sum(
        sum(map(sizes.rounded, parts_of(setting, weight).values())) * count for weight, count in setting.shape.weights()
    )
    # Where a piece of noise begins depends on the parameter's name: among many short ones some cross a period's end.
    lengths = [(w.numel / setting.num_ranks * sizes.dtype_bytes, count) for w, count in setting.shape.weights()]
    crosses = sum(length * count for length, count in lengths if length < NOISE_BYTES) > NOISE_BYTES / 2
    for weight, count in _in_order(setting.shape):
        own = sum(map(sizes.rounded, parts_of(setting, weight).values()))
        part = weight.numel / setting.num_ranks * sizes.dtype_bytes
        if setting.is_random:
            passing = part + _noise(part, crosses=crosses)
        else:
            passing = part + (2 * sum(parts_of(setting, weight).values()) if weight.quantized else 0)
        still_to_come -= own * (count - 1)
        held = total if setting.offloads_parameters else total - still_to_come
        yield math.ceil(held + passing), f"{weight.name} passes through"
        still_to_come -= own


EXCHANGE_SCALES = 2**22
"""Scales of a rank that are exchanged together (``training.sharding.quantizer``)."""

EXCHANGE_BYTES = {True: 13, False: 31}
"""For each of them while they are exchanged, with double quantization and without; see ``training.sharding.scales``.

With: fp32 until then (4), in bf16 to send, in the order of the receivers, as they arrive, and in order again (2 each).
Without, the fullest moment is when they are dealt out, in fp32: seven times, in the order of each stage. Weights do
not divide evenly among their owners, which adds a tenth.
"""


def _noise(part: float, *, crosses: bool) -> float:
    """A piece of the noise as long as ``part``, cut out of as many periods as it touches."""
    if part < NOISE_BYTES:
        return 2 * NOISE_BYTES if crosses else part
    return math.ceil(part / NOISE_BYTES + 0.5) * NOISE_BYTES


def _exchanges(setting: Setting, total: int) -> Iterator[tuple[int, str]]:
    """The last exchange of scales, and the last full one."""
    sizes = setting.sizes
    weights = [(weight, count) for weight, count in setting.shape.weights() if weight.quantized]
    num_scales = sum(sizes.num_scales(weight.numel) * count for weight, count in weights)
    own = num_scales // setting.num_ranks
    if own == 0:
        return
    statistics = sum(parts_of(setting, weight)["statistics"] * count for weight, count in weights)
    nested = sum(sum(sizes.nested(weight.numel)) * count for weight, count in weights)
    last = own % EXCHANGE_SCALES or EXCHANGE_SCALES
    whole = 0 if setting.shards_statistics else 6 * setting.num_ranks  # everybody's, in bf16 and in fp32
    for scales, missing in ((last, 0), (EXCHANGE_SCALES if own > EXCHANGE_SCALES else 0, last)):
        # Before the exchange these statistics are not there, nor is what is loaded after it.
        without = (statistics + nested) * (scales + missing) // own
        later = total * missing // own if missing else 0
        taken = (EXCHANGE_BYTES[sizes.double_quant] + whole) * scales
        yield math.ceil(total - without - later + taken), f"the scales of {scales:,} blocks are exchanged"


def _in_order(shape: ModelShape) -> Iterator[tuple[Weight, int]]:
    """Parameters in the order in which transformers loads them, by name; of like layers the last."""
    stacks = sorted({block.stack for block in shape.blocks})
    first = stacks[0] if stacks else ""
    for weight in sorted(shape.outside, key=lambda each: each.name):
        if weight.name < first:
            yield weight, 1
    for block in shape.blocks:
        for weight in sorted(block.weights, key=lambda each: each.name):
            yield weight, block.count
    for weight in sorted(shape.outside, key=lambda each: each.name):
        if weight.name >= first:
            yield weight, 1
