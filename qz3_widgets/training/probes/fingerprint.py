"""A checksum of the base model that is the same however the weights are spread over the ranks.

Each tensor's stored elements, taken as integers, are summed with their places as weights, modulo 2**64. A rank sums
what it holds; the sum over the ranks is the checksum of the whole. DeepSpeed's padding at the end of the last parts,
which is not initialized, is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..sharding.linear import STATISTICS
from ..sharding.partition import part_of
from .census import Weight

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**21}  # of 8 bytes while they are summed: in the cache of a CPU core
_ODD = 0x1E3779B97F4A7C15
MODULUS = 2**64


@dataclass(frozen=True)
class Print:
    """One tensor's sum on this rank, modulo 2**64."""

    value: int
    whole: bool  # of the whole tensor; otherwise of this rank's part
    dtype: str


def fingerprints(weights: Iterable[Weight], *, num_ranks: int, rank: int) -> dict[str, Print]:
    """Every stored tensor of ``weights``: parameters, scales wherever they are, and the scales' own scales."""
    summer = _Summer()
    found: dict[str, Print] = {}

    def add(name: str, values: torch.Tensor, begin: int, *, whole: bool) -> None:
        if values.device.type != "meta":
            kind = str(values.dtype).removeprefix("torch.")
            found[name] = Print(summer.sum(values, begin, salt=_salt(name)), whole, kind)

    for weight in weights:
        name, values, begin = weight.name, weight.parameter.detach().reshape(-1), 0
        if weight.is_partitioned:
            part, stored = part_of(weight.parameter.ds_numel, num_ranks, rank), weight.part
            assert stored is not None
            values, begin = stored.detach().view(-1)[: part.end - part.begin], part.begin
        if weight.is_statistics:
            # As bytes, under the name of the state's own: stock and sharded loading give the same.
            name = f"{name.removesuffix(STATISTICS)}weight.absmax"
            values, begin = values.view(torch.uint8), begin * values.element_size()
        add(name, values, begin, whole=not weight.is_partitioned)
        state = weight.state
        if state is not None and state.absmax is not None:
            add(f"{name}.absmax", state.absmax.detach().reshape(-1).view(torch.uint8), 0, whole=True)
        if state is not None and state.state2 is not None:
            add(f"{name}.nested_absmax", state.state2.absmax.detach().reshape(-1), 0, whole=True)
    return found


def totals(prints: Iterable[Print]) -> tuple[int, int]:
    """Sums over the parts and over the whole tensors, modulo 2**64."""
    parts = wholes = 0
    for entry in prints:
        if entry.whole:
            wholes += entry.value
        else:
            parts += entry.value
    return parts % MODULUS, wholes % MODULUS


class _Summer:
    """Sums of ``x * (place * odd + salt)``, in pieces."""

    def __init__(self) -> None:
        self._places: dict[torch.device, torch.Tensor] = {}

    def sum(self, values: torch.Tensor, begin: int, *, salt: int) -> int:
        """Over 1-D ``values``, the first of which has place ``begin``; modulo 2**64."""
        integers = values.view(_INTEGERS[values.element_size()])
        chunk = _CHUNK_ELEMENTS.get(values.device.type, 2**20)
        if values.device not in self._places:
            self._places[values.device] = torch.arange(chunk, dtype=torch.int64, device=values.device)
        places = self._places[values.device]
        # Integers wrap around, which is what modulo 2**64 means.
        sums = torch.zeros(2, dtype=torch.int64, device=values.device)
        for first in range(0, integers.numel(), chunk):
            piece = integers[first : first + chunk].to(torch.int64)
            total = piece.sum()
            sums[0] += piece.mul_(places[: piece.numel()]).sum() + total * (begin + first)
            sums[1] += total
        weighted, plain = sums.tolist()
        return int((weighted * _ODD + plain * salt) % MODULUS)


def _salt(name: str) -> int:
    """An odd number of its own for each name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") | 1
