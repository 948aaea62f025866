"""What a GPU holds beyond torch's allocator: the CUDA context, NCCL's buffers, and what fragmentation keeps reserved.

They depend on driver, card and libraries, not on the model. Until runs on the machine have told (a trace has what the
whole device holds and what the allocator has reserved, at every record), these are assumptions, and named as such.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..units import MIB

# In the steps of runs on H100s: 921 MiB beyond what the allocator had reserved with one GPU (659 while loading; `qz3
# rehearse llama-3.1-70b`), 2,259 with two that talk through NCCL (`qz3 run llama-3.1-8b` with random weights).
ASSUMED_CONTEXT_BYTES = 920 * MIB
ASSUMED_NCCL_BYTES = 1340 * MIB
ASSUMED_FRAGMENTATION = 0.10
ASSUMED_BAND = 0.05

_ON_A_CPU = "a CPU has neither context nor cache"


@dataclass(frozen=True)
class Overhead:
    """Of one device and rank; bytes, and parts of the allocator's peak."""

    context_bytes: int
    nccl_bytes: int
    fragmentation: float  # reserved beyond allocated, as a part of the peak
    band: float  # how far a measured peak may lie from the predicted one, as a part of it
    basis: str  # what these figures rest on, in words

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the model."""
        return self.context_bytes + self.nccl_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "context_bytes": self.context_bytes,
            "nccl_bytes": self.nccl_bytes,
            "fragmentation": self.fragmentation,
            "band": self.band,
            "basis": self.basis,
        }


def assumed(device: Literal["cpu", "cuda"], num_ranks: int) -> Overhead:
    """Before anything was measured on the machine at hand."""
    if device == "cpu":
        return Overhead(0, 0, 0.0, ASSUMED_BAND, f"{_ON_A_CPU}; the band is assumed")
    nccl = ASSUMED_NCCL_BYTES if num_ranks > 1 else 0
    basis = "as measured on an H100 or two: no finished run on this kind of GPU was found"
    return Overhead(ASSUMED_CONTEXT_BYTES, nccl, ASSUMED_FRAGMENTATION, ASSUMED_BAND, basis)
