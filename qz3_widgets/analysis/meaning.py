"""What a comparison means for the choice of GPUs: on which common size each run fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plan.overhead import assumed
from ..units import GIB, format_bytes
from .compare import Comparison

GPU_GIB = (16, 24, 32, 40, 48, 80, 96, 141)
"""Memory of common GPUs."""


def gpu_sentence(comparison: Comparison) -> str | None:
    """On which GPUs the runs fit, where that differs; ``None`` for runs on a CPU, or that did not finish a step.

    To what torch allocated comes what a context and NCCL are assumed to take.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for run_id in comparison.run_ids:
        summary = comparison.summaries[run_id]
        peak = _peak_of_all_phases(summary)
        if summary["device"] != "cuda" or peak is None:
            return None
        needed = peak + assumed("cuda", int(summary["world_size"] or 1)).fixed_bytes
        found[run_id] = (peak, next((size for size in GPU_GIB if size * GIB >= needed), None))
    sizes = {size for _, size in found.values()}
    if len(sizes) < 2:
        return None
    parts = [
        f"{comparison.labels[run_id]} ({format_bytes(peak)}) "
        + (f"fits GPUs of {size} GiB" if size is not None else f"fits no GPU of up to {GPU_GIB[-1]} GiB")
        for run_id, (peak, size) in found.items()
    ]
    return f"{'; '.join(parts)}."


def _peak_of_all_phases(summary: Mapping[str, Any]) -> int | None:
    """Of the fullest rank, in any phase; ``None`` if no step was reached."""
    if not any("step" in rank["phases"] for rank in summary["ranks"]):
        return None
    peaks = [phase["peak_bytes"] for rank in summary["ranks"] for phase in rank["phases"].values()]
    return max((int(peak) for peak in peaks if peak is not None), default=None)
