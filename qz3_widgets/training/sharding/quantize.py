"""Quantize one rank's slice of a weight, to the very bytes that quantizing the whole weight would give.

bitsandbytes quantizes in blocks (64 weights by default), each with a scale of its own (``absmax``): a slice that is
widened to whole blocks quantizes to the same bytes. Double quantization looks at all scales of a weight at once, so
these are exchanged, 1/128 of the 16-bit weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import bitsandbytes.functional as bnb
import torch
import torch.distributed as dist

from .partition import Part, padded, part_of

NESTED_BLOCKSIZE = 256  # of the scales' own quantization; Params4bit leaves bitsandbytes no choice


@dataclass(frozen=True)
class Recipe:
    """How a weight is quantized; the names are those of ``bitsandbytes.nn.Params4bit``."""

    blocksize: int
    quant_type: str
    compress_statistics: bool
    quant_storage: torch.dtype

    def num_storage_elements(self, num_weights: int) -> int:
        """Elements of the packed weight.

        Raises:
            ValueError: the packed bytes do not fill the last element.
        """
        num_bytes = (num_weights + 1) // 2
        if num_bytes % self.quant_storage.itemsize:
            raise ValueError(
                f"quantization.bnb_4bit_quant_storage: {num_weights} weights pack into {num_bytes} bytes, which "
                f"{self.quant_storage} does not divide; use uint8"
            )
        return num_bytes // self.quant_storage.itemsize


@dataclass(frozen=True)
class _Slice:
    """A rank's storage elements, the weights in them, and the blocks that begin there."""

    part: Part
    first_weight: int
    last_weight: int
    first_block: int  # touched
    last_block: int
    first_own_block: int  # begins in this slice: each block belongs to one rank

    @property
    def num_own_blocks(self) -> int:
        return max(0, self.last_block - self.first_own_block) if self.last_weight > self.first_weight else 0


def _slice_of(num_weights: int, recipe: Recipe, num_ranks: int, rank: int) -> _Slice:
    part = part_of(recipe.num_storage_elements(num_weights), num_ranks, rank)
    weights_per_element = 2 * recipe.quant_storage.itemsize
    first = min(part.begin * weights_per_element, num_weights)
    last = min(part.end * weights_per_element, num_weights)
    size = recipe.blocksize
    return _Slice(part, first, last, first // size, -(-last // size), -(-first // size))


def quantize_slice(
    read: Callable[[int, int], torch.Tensor], num_weights: int, recipe: Recipe, *, num_ranks: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Quantize what ``rank`` holds of a weight.

    Args:
        read: gives the flattened weights ``[begin, end)``.
        num_weights: of the whole weight.
        recipe: how to quantize.
        num_ranks: among which the weight is partitioned.
        rank: this one.

    Returns:
        This rank's packed storage elements, padded to the size of a part; the scales of the blocks that begin in
        its slice, fp32; and how many blocks begin in each rank's slice, for :func:`exchange_scales`.
    """
    own = _slice_of(num_weights, recipe, num_ranks, rank)
    if own.last_weight > own.first_weight:
        begin = own.first_block * recipe.blocksize
        weights = read(begin, min(own.last_block * recipe.blocksize, num_weights))
        # The operator behind quantize_4bit, which would make the code table anew for each weight and wait for the GPU.
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            weights, recipe.blocksize, recipe.quant_type, torch.uint8
        )
        surplus = (own.first_weight - begin) // 2
        num_bytes = (own.part.end - own.part.begin) * recipe.quant_storage.itemsize
        raw = packed.reshape(-1)[surplus : surplus + num_bytes]
        absmax = absmax.view(-1)[own.first_own_block - own.first_block :]
    else:
        nothing = read(0, 0)
        raw = torch.empty(0, dtype=torch.uint8, device=nothing.device)
        absmax = torch.empty(0, dtype=torch.float32, device=nothing.device)
    # A copy: the storage must hold the part and nothing else, at an address that suits the dtype.
    part = padded(raw, own.part.size * recipe.quant_storage.itemsize).clone().view(recipe.quant_storage)
    counts = [_slice_of(num_weights, recipe, num_ranks, other).num_own_blocks for other in range(num_ranks)]
    return part, absmax, counts


def exchange_scales(
    scales: Sequence[torch.Tensor],
    counts: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Give every rank the scales of whole weights; one collective of all ranks for all of the weights.

    Args:
        scales: of each weight, this rank's.
        counts: of each weight, how many scales each rank has; the same on all ranks.
        dtype: of the weights that were quantized. A scale is the magnitude of one of them, so it travels in their dtype
            without loss.
        group: the ranks; the default group, if left out.
    """
    num_ranks = len(counts[0])
    if num_ranks == 1:
        return list(scales)
    size = max(sum(count[rank] for count in counts) for rank in range(num_ranks))
    own = padded(torch.cat(list(scales)).to(dtype), size)
    # Zeros: in a rehearsal the collective fills in nothing, and what memory held before could be anything.
    gathered = torch.zeros(num_ranks * size, dtype=dtype, device=own.device)
    dist.all_gather_into_tensor(gathered, own.contiguous(), group=group)
    begins = [rank * size for rank in range(num_ranks)]
    whole = []
    for count in counts:
        pieces = [gathered[begin : begin + num] for begin, num in zip(begins, count, strict=True)]
        whole.append(torch.cat(pieces).to(torch.float32))
        begins = [begin + num for begin, num in zip(begins, count, strict=True)]
    return whole


def make_state(absmax: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, recipe: Recipe) -> bnb.QuantState:
    """The quantization state that bitsandbytes would have made with these scales, nested if the recipe says so.

    Source: ``quantize_4bit`` in ``bitsandbytes/functional.py``.
    """
    code = code_table(recipe.quant_type, absmax.device)
    common = {
        "shape": torch.Size(shape),
        "code": code,
        "blocksize": recipe.blocksize,
        "quant_type": recipe.quant_type,
        "dtype": dtype,
    }
    if not recipe.compress_statistics:
        return bnb.QuantState(absmax=absmax, **common)
    offset = absmax.mean()
    table = dynamic_code_table(absmax.device)
    nested, state2 = bnb.quantize_blockwise(absmax - offset, table, blocksize=NESTED_BLOCKSIZE)
    state2.code = table
    return bnb.QuantState(absmax=nested, offset=offset, state2=state2, **common)


@cache
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type; one tensor for all weights of a device."""
    return cast("torch.Tensor", bnb.get_4bit_type(quant_type, device=device))


@cache
def dynamic_code_table(device: torch.device) -> torch.Tensor:
    """The 256 values that scales are quantized to; one tensor for all weights of a device."""
    return cast("torch.Tensor", bnb.create_dynamic_map().to(device))
