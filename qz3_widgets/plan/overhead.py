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
# `tests/benchmarks/device_overhead.py` on the same GPUs: a first tensor takes 527 MiB, torch's kernels and cuBLAS make
# it 685, attention and bitsandbytes 703; a first reduction through NCCL adds 564 for a rank on its own.
ASSUMED_NCCL_ALONE_BYTES = 560 * MIB
# The same with `--capped`, rehearsals in three shapes: with 5, 10 and more than 20 % beyond the predicted peak for the
# allocator's cache they still ran out of memory, with 10, 20 and (not found) they did not. That is up to 30 % of what
# comes and goes in a step; what stays is not cut up.
ASSUMED_FRAGMENTATION = 0.30
ASSUMED_BAND = 0.05

_ON_A_CPU = "a CPU has neither context nor cache"


@dataclass(frozen=True)
class Overhead:
    """Of one device and rank, in bytes and as parts."""

    context_bytes: int
    nccl_bytes: int
    fragmentation: float  # reserved beyond the peak, as a part of what comes and goes: the peak less what is settled
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
    nccl = ASSUMED_NCCL_BYTES if num_ranks > 1 else ASSUMED_NCCL_ALONE_BYTES
    basis = "as measured on an H100 or two: no finished run on this kind of GPU was found"
    return Overhead(ASSUMED_CONTEXT_BYTES, nccl, ASSUMED_FRAGMENTATION, ASSUMED_BAND, basis)
