"""What a comparison means for the choice of GPUs: on which common size each run fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plan.overhead import assumed
from ..units import GIB, format_bytes
from .compare import Comparison

GPU_GIB = (16, 24, 32, 40, 48, 80, 96, 141)
"""Memory of common GPUs."""

_UNKNOWN = {"failed": "it failed", "lost": "it was lost"}


def gpu_sentence(comparison: Comparison) -> str | None:
    """On which GPUs the runs fit, where that differs; ``None`` for runs on a CPU, or that did not finish a step.

    To what torch allocated comes what a context and NCCL are assumed to take, as in a plan; "narrowly" is what a
    fragmented cache may spoil. Of a run that failed it is not known, be it that memory was what it lacked; of one that
    is not at its end it is known as far as it came.
    """
    summaries = comparison.summaries
    if any(summary["device"] != "cuda" or _shares_gpus(summary) for summary in summaries.values()):
        return None
    judged = {
        run_id: peak
        for run_id in comparison.run_ids
        if summaries[run_id]["state"] not in _UNKNOWN and (peak := _peak_of_all_phases(summaries[run_id])) is not None
    }
    failed = [run_id for run_id in comparison.run_ids if summaries[run_id]["state"] in _UNKNOWN]
    found = {run_id: _fits(peak, summaries[run_id]) for run_id, peak in judged.items()}
    if not found or (len(set(found.values())) < 2 and not failed):
        return None
    parts = [
        f"{comparison.labels[run_id]} (at most {format_bytes(peak)}{_how_far(summaries[run_id])}) {found[run_id]}"
        for run_id, peak in judged.items()
    ]
    parts += [
        f"what {comparison.labels[run_id]} needs is not known: {_UNKNOWN[summaries[run_id]['state']]}"
        for run_id in failed
    ]
    return f"{'; '.join(parts)}."


def _fits(peak: int, summary: Mapping[str, Any]) -> str:
    overhead = assumed("cuda", int(summary["world_size"] or 1))
    needed = peak + overhead.fixed_bytes
    size = next((size for size in GPU_GIB if size * GIB >= needed), None)
    if size is None:
        return f"fits no GPU of up to {GPU_GIB[-1]} GiB"
    stays = [rank["phases"].get("step", {}).get("settled_bytes") or 0 for rank in summary["ranks"]]
    narrow = size * GIB - needed < max(peak * overhead.band, (peak - min(stays)) * overhead.fragmentation)
    return f"fits GPUs of {size} GiB{', narrowly' if narrow else ''}"


def _how_far(summary: Mapping[str, Any]) -> str:
    return "" if summary["state"] == "succeeded" else f" up to step {summary['num_steps']}"


def _shares_gpus(summary: Mapping[str, Any]) -> bool:
    """Whether a GPU holds more than what one rank tells of."""
    config = summary["config"]
    return config is not None and config["launch"]["ranks_per_gpu"] > 1


def _peak_of_all_phases(summary: Mapping[str, Any]) -> int | None:
    """Of the fullest rank, in any phase; ``None`` if no step was finished."""
    steps = [rank["phases"].get("step") for rank in summary["ranks"]]
    if not any(step is not None and step["settled_bytes"] is not None for step in steps):
        return None
    peaks = [phase["peak_bytes"] for rank in summary["ranks"] for phase in rank["phases"].values()]
    return max((int(peak) for peak in peaks if peak is not None), default=None)
