"""From the launch to the end of the first step: what the seconds went into."""

from __future__ import annotations

import pandas as pd

_NAMES = {"start": "imports", "load": "load", "attach": "adapter", "engine": "engine", "data": "data"}
PARTS = ("launcher", "imports", "operator build", "data", "load", "adapter", "engine", "first step")
"""In their order in time; data come in two pieces, before the load and behind the adapter."""


def startup_parts(last: pd.DataFrame, *, launched: float | None, origin: float | None) -> dict[str, float]:
    """Seconds of each part, of the lowest rank; a part under way counts up to the newest record.

    Args:
        last: Memory records of the last attempt.
        launched: Seconds since the epoch at which the supervisor started the launcher; ``None`` without one.
        origin: Seconds since the epoch at which the rank's clock began.
    """
    if len(last) == 0:
        return {}
    own = last[last["rank"] == last["rank"].min()].sort_values("time_seconds", kind="stable")
    found: dict[str, float] = {}
    if launched is not None and origin is not None and origin >= launched:
        found["launcher"] = origin - launched
    begun: dict[str, float] = {"imports": 0.0}
    first_step = float("inf")
    for phase, event, time in zip(own["phase"], own["event"], own["time_seconds"], strict=True):
        name = _NAMES.get(str(phase))
        if event == "step_begin":
            begun["first step"] = first_step = time
        elif event == "step_end" and "first step" in begun:
            found["first step"] = time - begun.pop("first step")
            break
        elif event == "phase_begin" and name is not None and name != "imports":
            begun[name] = time
        elif event == "phase_end" and name in begun:
            found[name] = found.get(name, 0.0) + time - begun.pop(name)
        elif event == "operator_build_begin":
            begun["operator build"] = time
        elif event == "operator_build_end" and "operator build" in begun:
            found["operator build"] = time - begun.pop("operator build")
    newest = float(own["time_seconds"].max())
    for name, time in begun.items():
        if time <= first_step:
            found[name] = found.get(name, 0.0) + newest - time
    if "operator build" in found and "data" in found:
        found["data"] = max(0.0, found["data"] - found["operator build"])  # it is built there
    return {name: found[name] for name in PARTS if name in found}
