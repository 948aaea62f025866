"""From the scales that each rank has found to the statistics that each rank keeps, without anyone seeing all of them.

Double quantization looks at all scales of a weight at once: their mean, and blocks of 256 of them. So each weight has
an owner, who gets its scales, quantizes them to the very bytes that bitsandbytes would have made, and deals the bytes
out to the ranks in ZeRO-3's parts. The weights of a batch are owned in turn: a rank sends and receives about 1/N of
what an exchange of all scales among all would take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.distributed as dist

from .linear import StateWithoutScales, as_storage_elements, num_storage_elements
from .partition import padded, part_of
from .quantize import NESTED_BLOCKSIZE, Recipe, code_table, dynamic_code_table, make_state


@dataclass(frozen=True)
class Unsettled:
    """A weight that is quantized, of whose scales this rank has those of its own blocks."""

    scales: torch.Tensor  # fp32, of the blocks that begin in this rank's part
    counts: list[int]  # how many each rank has
    shape: torch.Size  # of the weight
    dtype: torch.dtype  # of the weight
    recipe: Recipe

    @property
    def num_scales(self) -> int:
        """Of the whole weight."""
        return sum(self.counts)

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Of the scales once they are quantized themselves, or not."""
        return torch.uint8 if self.recipe.compress_statistics else torch.float32

    @property
    def num_elements(self) -> int:
        """Of the statistics in the weight's storage dtype."""
        return num_storage_elements(self.num_scales * self.statistics_dtype.itemsize, self.recipe.quant_storage)

    @property
    def num_nested(self) -> int:
        """Scales of the scales, and their mean: fp32, whole on every rank."""
        return -(-self.num_scales // NESTED_BLOCKSIZE) + 1 if self.recipe.compress_statistics else 0


@dataclass(frozen=True)
class Settled:
    """What a rank keeps of a weight's statistics."""

    state: Any  # a quantization state without scales
    part: torch.Tensor  # this rank's storage elements of the statistics, 1-D, padded to the size of a part


def settle_scales(
    weights: Sequence[Unsettled], *, num_ranks: int, rank: int, group: dist.ProcessGroup | None = None
) -> list[Settled]:
    """Give every rank its part of the statistics of ``weights``; three collectives of all ranks for all of them.

    All ranks pass the same weights in the same order.
    """
    if not weights:
        return []
    owned = [[index for index in range(len(weights)) if index % num_ranks == owner] for owner in range(num_ranks)]
    states = _quantize_owned(weights, owned, num_ranks, rank, group)
    parts = _deal_out(weights, owned, states, num_ranks, rank, group)
    nested = _share_nested(weights, owned, states, num_ranks, rank, group)
    return [Settled(_state(weight, values), part) for weight, part, values in zip(weights, parts, nested, strict=True)]


def _quantize_owned(
    weights: Sequence[Unsettled], owned: list[list[int]], num_ranks: int, rank: int, group: dist.ProcessGroup | None
) -> dict[int, bnb.QuantState]:
    """The whole quantization states of the weights that this rank owns."""
    dtypes = {weight.dtype for weight in weights}
    # A scale is the magnitude of one weight, so it travels in the weights' dtype without loss.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    mine = owned[rank]
    received = _all_to_all(
        torch.cat([weights[index].scales for owner in owned for index in owner]).to(dtype),
        [sum(weights[index].counts[rank] for index in owner) for owner in owned],
        [sum(weights[index].counts[sender] for index in mine) for sender in range(num_ranks)],
        num_ranks,
        group,
    ).to(torch.float32)
    pieces: dict[int, list[torch.Tensor]] = {index: [] for index in mine}
    begin = 0
    for sender in range(num_ranks):
        for index in mine:
            end = begin + weights[index].counts[sender]
            pieces[index].append(received[begin:end])
            begin = end
    return {
        index: make_state(torch.cat(pieces[index]), weights[index].shape, weights[index].dtype, weights[index].recipe)
        for index in mine
    }


def _deal_out(
    weights: Sequence[Unsettled],
    owned: list[list[int]],
    states: dict[int, bnb.QuantState],
    num_ranks: int,
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """This rank's part of each weight's statistics."""

    def size_of(index: int) -> int:
        return part_of(weights[index].num_elements, num_ranks, rank).size * weights[index].recipe.quant_storage.itemsize

    raw: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    for index in owned[rank]:
        elements = as_storage_elements(states[index].absmax, torch.uint8)
        whole = padded(elements, size_of(index) * num_ranks)
        for receiver, piece in enumerate(whole.chunk(num_ranks)):
            raw[receiver].append(piece)
    sent = [piece for pieces in raw for piece in pieces]
    own_bytes = sum(size_of(index) for index in owned[rank])
    received = _all_to_all(
        torch.cat(sent) if sent else torch.empty(0, dtype=torch.uint8, device=weights[0].scales.device),
        [own_bytes] * num_ranks,
        [sum(size_of(index) for index in owner) for owner in owned],
        num_ranks,
        group,
    )
    parts: dict[int, torch.Tensor] = {}
    begin = 0
    for owner in owned:
        for index in owner:
            end = begin + size_of(index)
            # A copy: the storage must hold the part and nothing else, at an address that suits the dtype.
            parts[index] = received[begin:end].clone().view(weights[index].recipe.quant_storage)
            begin = end
    return [parts[index] for index in range(len(weights))]


def _share_nested(
    weights: Sequence[Unsettled],
    owned: list[list[int]],
    states: dict[int, bnb.QuantState],
    num_ranks: int,
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """The scales of each weight's scales, their mean last; fp32."""
    size = max(sum(weights[index].num_nested for index in owner) for owner in owned)
    nothing = torch.empty(0, dtype=torch.float32, device=weights[0].scales.device)
    if size == 0:
        return [nothing] * len(weights)
    values = [
        torch.cat([states[index].state2.absmax, states[index].offset.reshape(1)])
        for index in owned[rank]
        if weights[index].num_nested
    ]
    gathered = _all_gather(padded(torch.cat([nothing, *values]), size), num_ranks, group)
    nested = [nothing] * len(weights)
    for owner, indices in enumerate(owned):
        begin = owner * size
        for index in indices:
            end = begin + weights[index].num_nested
            nested[index] = gathered[begin:end]
            begin = end
    return nested


def _state(weight: Unsettled, nested: torch.Tensor) -> StateWithoutScales:
    device, recipe = weight.scales.device, weight.recipe
    state = StateWithoutScales(
        absmax=None,
        shape=weight.shape,
        code=code_table(recipe.quant_type, device),
        blocksize=recipe.blocksize,
        quant_type=recipe.quant_type,
        dtype=weight.dtype,
    )
    if recipe.compress_statistics:
        state.nested = True
        # Copies, or each would keep the whole collective's buffer.
        state.offset = nested[-1].clone()
        state.state2 = bnb.QuantState(
            absmax=nested[:-1].clone(),
            code=dynamic_code_table(device),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    return state


def _all_to_all(
    sent: torch.Tensor,
    sent_counts: list[int],
    received_counts: list[int],
    num_ranks: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    if num_ranks == 1:
        return sent
    # A byte more for each receiver: torch refuses a rank that has nothing to send and something to receive.
    sent_bytes = [sent.itemsize * count for count in sent_counts]
    received_bytes = [sent.itemsize * count for count in received_counts]
    more = torch.zeros(1, dtype=torch.uint8, device=sent.device)
    pieces = sent.contiguous().view(torch.uint8).split(sent_bytes)
    raw = torch.cat([each for piece in pieces for each in (piece, more)])
    staged = raw.device.type != "cpu" and dist.get_backend(group) == "gloo"  # which has no all-to-all between GPUs
    source = raw.cpu() if staged else raw
    # Zeros: in a rehearsal the collective fills in nothing, and what memory held before could be anything.
    received = torch.zeros(sum(received_bytes) + num_ranks, dtype=torch.uint8, device=source.device)
    split = [count + 1 for count in received_bytes]
    dist.all_to_all_single(received, source, split, [count + 1 for count in sent_bytes], group)
    received = torch.cat([piece[:-1] for piece in received.split(split)])
    return received.to(sent.device).view(sent.dtype)


def _all_gather(own: torch.Tensor, num_ranks: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    if num_ranks == 1:
        return own
    gathered = torch.zeros(num_ranks * own.numel(), dtype=own.dtype, device=own.device)
    dist.all_gather_into_tensor(gathered, own.contiguous(), group=group)
    return gathered
