"""Bytes of tensors and of their parts, as bitsandbytes packs them, ZeRO-3 cuts them and an allocator rounds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..config.schema import RunConfig

ITEMSIZE = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element, by the names of dtypes and of precisions."""

BLOCKSIZE = 64
"""Weights that share a scale: bitsandbytes' default, which transformers does not change."""

NESTED_BLOCKSIZE = 256
"""Scales that share a scale of their own under double quantization (``bitsandbytes.functional.quantize_4bit``)."""

CUDA_ROUNDING = 512
"""Bytes: what torch's caching allocator rounds a block up to (``kMinBlockSize``, ``c10/cuda/CUDACachingAllocator``)."""

LARGE_ALLOCATION, SEGMENT_ROUNDING, UNSPLIT_REST = 10 * 2**20, 2 * 2**20, 2**20
"""Bytes: from where a tensor gets a segment of its own, to what that is rounded, and what is not split off it."""

PART_ALIGNMENT, WHOLE_ALIGNMENT = 16, 256
"""Bytes to which a layer's parts, lying side by side, are rounded: of several ranks, and of a single one
(:mod:`qz3_widgets.training.sharding.flat`)."""


def ceil_div(number: int, by: int) -> int:
    """Rounded up."""
    return -(-number // by)


def round_up(size: float, to: int) -> int:
    """To a multiple of ``to``."""
    return ceil_div(math.ceil(size), to) * to


@dataclass(frozen=True)
class Sizes:
    """How one run's tensors are stored, cut and rounded."""

    device: Literal["cpu", "cuda"]
    num_ranks: int
    dtype_bytes: int  # of what is not quantized
    storage_bytes: int  # of an element of packed weights
    double_quant: bool

    @classmethod
    def of(cls, config: RunConfig, device: Literal["cpu", "cuda"], num_ranks: int) -> Sizes:
        """Those of a configuration."""
        quantization = config.quantization
        return cls(
            device=device,
            num_ranks=num_ranks,
            dtype_bytes=ITEMSIZE[config.model.dtype],
            storage_bytes=ITEMSIZE[quantization.bnb_4bit_quant_storage],
            double_quant=quantization.bnb_4bit_use_double_quant,
        )

    def rounded(self, size: float) -> int:
        """What the allocator hands out for ``size`` bytes: on a GPU in blocks, on a CPU as many as were asked for."""
        return round_up(size, CUDA_ROUNDING) if self.device == "cuda" else math.ceil(size)

    def segment(self, size: float) -> int:
        """What a large tensor takes that gets memory of its own: the end of a segment is not split off, if it is small.

        ``c10/cuda/CUDACachingAllocator``: from 10 MiB on, segments are rounded up to 2 MiB (``kRoundLarge``); a rest of
        up to 1 MiB (``kSmallSize``) stays with the block.
        """
        if self.device == "cpu" or size < LARGE_ALLOCATION:
            return self.rounded(size)
        whole = round_up(size, SEGMENT_ROUNDING)
        return whole if whole - size <= UNSPLIT_REST else self.rounded(size)

    def part(self, num_elements: int, itemsize: int) -> int:
        """One rank's part of a parameter: its share of the elements, the last ones padded."""
        return ceil_div(num_elements, self.num_ranks) * itemsize

    def packed(self, numel: int) -> int:
        """Storage elements of a 4-bit weight: two weights a byte."""
        return ceil_div(ceil_div(numel, 2), self.storage_bytes)

    def num_scales(self, numel: int) -> int:
        """One for each block of weights."""
        return ceil_div(numel, BLOCKSIZE)

    def scale_bytes(self, numel: int) -> int:
        """Scales of a weight: a byte each, or fp32 without double quantization."""
        return self.num_scales(numel) * (1 if self.double_quant else 4)

    def statistics(self, numel: int) -> int:
        """Storage elements that hold a weight's scales."""
        return ceil_div(self.scale_bytes(numel), self.storage_bytes)

    def nested(self, numel: int) -> tuple[int, ...]:
        """Tensors of double quantization that stay whole on every rank: scales of scales, and their mean (fp32)."""
        return (ceil_div(self.num_scales(numel), NESTED_BLOCKSIZE) * 4, 4) if self.double_quant else ()
