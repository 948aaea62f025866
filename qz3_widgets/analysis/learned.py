"""What finished runs have told of a machine: the context's memory, fragmentation, and how far predictions were off."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..plan.overhead import ASSUMED_BAND, Overhead, assumed
from ..runs.store import Run, list_runs
from .memory import MAIN_PHASES, peaks
from .truth import compare_with_expected

_MOST_RUNS = 20
_FEWEST_FOR_BAND = 3


def learn(runs_dir: Path, device: Literal["cpu", "cuda"], num_ranks: int) -> Overhead:
    """The overhead of a device of this kind, from the newest succeeded runs in ``runs_dir``; else what is assumed.

    The context and NCCL together are what the whole device held beyond what the allocator had reserved, at its least,
    when the engine stood; only runs whose ranks each had a device tell it. The band is the largest difference between
    expected and measured peaks.
    """
    start = assumed(device, num_ranks)
    context: list[float] = []
    fragmentation: list[float] = []
    residuals: list[float] = []
    names = []
    for run in list_runs(runs_dir)[:_MOST_RUNS]:
        try:
            found = _of_run(run, device)
        except (ValueError, KeyError, OSError):  # a damaged run teaches nothing
            continue
        if found is None:
            continue
        names.append(run.run_id)
        context += found["context"]
        fragmentation += found["fragmentation"]
        residuals += found["residuals"]
    if not names:
        return start
    told = f"{len(names)} finished run{'s' if len(names) != 1 else ''} on this kind of device"
    enough = len(residuals) >= _FEWEST_FOR_BAND
    # Never narrower than one part in a hundred: what was not tried yet may be a little worse.
    band = max(0.01, float(np.max(np.abs(residuals)))) if enough else ASSUMED_BAND
    basis = f"{told}{'' if enough else '; the band is assumed'}"
    if device == "cpu" or not context:
        return Overhead(start.context_bytes, start.nccl_bytes, start.fragmentation, band, basis)
    # What is reserved is cached as long as there is room for it: not all of it would be missed.
    needed = min([start.fragmentation, *([float(np.median(fragmentation))] if fragmentation else [])])
    return Overhead(int(np.median(context)), 0, needed, band, basis)


def _of_run(run: Run, device: str) -> dict[str, list[float]] | None:
    if run.state != "succeeded":
        return None
    trace = run.memory()
    own = {str(header.get("device", "")).partition(":")[0] for header in trace.headers.values()}
    if own != {device}:
        return None
    table = peaks(trace)
    compared = compare_with_expected(run, table)
    found: dict[str, list[float]] = {"context": [], "fragmentation": [], "residuals": []}
    if compared is not None:
        found["residuals"] = [
            float(row["relative"])
            for row in compared["rows"]
            if row["figure"] == "peak_bytes" and row["phase"] in MAIN_PHASES
        ]
    if device == "cuda":
        devices = [str(header.get("device")) for header in trace.headers.values()]
        alone = len(set(devices)) == len(devices)
        for _, row in table.iterrows():
            peak, reserved = _number(row["peak_bytes"]), _number(row["reserved_peak_bytes"])
            settled = _number(row["settled_bytes"])
            if str(row["phase"]) == "step" and peak and reserved and settled is not None and peak > settled:
                found["fragmentation"].append(max(0.0, (reserved - peak) / (peak - settled)))
            used = _number(row["device_peak_bytes"])
            if str(row["phase"]) == "ready" and alone and used and reserved:
                found["context"].append(max(0.0, used - reserved))
    return found


def _number(value: Any) -> float | None:
    return None if value is None or value != value or str(value) == "<NA>" else float(value)
