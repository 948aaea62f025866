"""Random weights that need no memory until they are read, for models in a shape nobody has downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ..sharding.sources import Source

_PERIOD = 2**20 + 7
"""Length of the noise; odd, so that the rows of a matrix, whose lengths are even, do not repeat."""


class Noise(Source):
    """A tensor whose elements are a function of its name and their index."""

    _noise: dict[torch.device, torch.Tensor] = {}  # noqa: RUF012 - one for all tensors of a device

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, spread: float) -> None:
        """``spread`` is the standard deviation of a matrix's elements; vectors are all 1, biases all 0."""
        super().__init__(shape, dtype)
        self._constant = None if len(shape) > 1 else float(not name.endswith("bias"))
        self._spread = spread
        self._offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") % _PERIOD

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """On the target device, since a large model has more elements than a CPU makes in reasonable time."""
        count = max(0, end - begin)
        if self._constant is not None:
            return torch.full((count,), self._constant, dtype=self.stored, device=self.device)
        noise = self._noise_on(self.device)
        start = (begin + self._offset) % _PERIOD
        copies = -(-(start + count) // _PERIOD)
        line = noise if copies <= 1 else noise.repeat(copies)
        return (line[start : start + count] * self._spread).to(self.stored)

    @classmethod
    def _noise_on(cls, device: torch.device) -> torch.Tensor:
        if device not in cls._noise:
            generator = torch.Generator().manual_seed(0)
            cls._noise[device] = (
                torch.randn(_PERIOD, generator=generator, dtype=torch.float32).to(torch.bfloat16).to(device)
            )
        return cls._noise[device]
