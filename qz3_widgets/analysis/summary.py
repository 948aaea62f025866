"""A run in one JSON-ready record: what ``qz3 show --json`` prints, and what views and comparisons are made of."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from ..runs.status import Status
from ..runs.store import Run
from ..trace.reader import MemoryTrace
from .device_peaks import peak_flops
from .failure import find_failure
from .loss import LossSummary, speed, summarize_loss
from .memory import fullest, imbalance, peaks
from .names import config_of
from .proof import prove
from .startup import startup_parts
from .truth import compare_with_expected

_PHASE_BYTES = ("settled_bytes", "peak_bytes", "reserved_peak_bytes", "device_peak_bytes", "host_peak_bytes")


def summarize(run: Run, *, trace: MemoryTrace | None = None) -> dict[str, Any]:
    """All figures of a run that a reader asks for first.

    Sizes are in bytes, times in seconds; ``None`` is what was not measured or not reached. A loss that was not a
    number is ``None`` too (JSON has no NaN), and ``first_nan_step`` says from which step on.

    Args:
        run: The run.
        trace: Its memory, if it was read already.
    """
    status, config, metrics = run.status, config_of(run), run.metrics()
    trace = run.memory() if trace is None else trace
    table = peaks(trace)
    loss, pace = summarize_loss(metrics), speed(metrics)
    failure = find_failure(status, trace)
    proof = prove(run)
    top = fullest(table)
    capacity = trace.capacity_bytes
    device_name = next((str(header.get("device_name")) for header in trace.headers.values()), None)
    ranks = trace.world_size or (None if config is None else config.launch.num_processes)
    devices = None if ranks is None else max(1, ranks // (1 if config is None else config.launch.ranks_per_gpu))
    per_device = None if pace.tokens_per_second is None or devices is None else pace.tokens_per_second / devices
    return {
        "run_id": run.run_id,
        "name": run.run_id if config is None else config.name,
        "state": status.state,
        "status": status.to_json(),
        "failure": None if failure is None else failure.to_json(),
        "config": None if config is None else config.model_dump(mode="json"),
        "preset": _preset(run),
        "given": _given(run),
        "rehearsal": any(bool(header.get("rehearsal")) for header in trace.headers.values()),
        "world_size": ranks,
        "missing_ranks": list(trace.missing_ranks),
        "num_damaged_lines": sum(trace.num_torn.values()),
        "num_attempts": max(trace.num_attempts, status.attempt),
        "device": trace.device,
        "device_name": device_name,
        "memory_source": next((str(header.get("source")) for header in trace.headers.values()), None),
        "capacity_bytes": min(capacity.values(), default=None),
        "ranks": [_rank(table, trace, rank) for rank in trace.ranks],
        "fullest": None if top is None else {"rank": top[0], "phase": top[1], "peak_bytes": top[2]},
        "imbalance": imbalance(table).to_dict(orient="records"),
        **_losses(loss),
        "tokens_per_second": pace.tokens_per_second,
        "tokens_per_second_per_device": per_device,
        "model_flops_utilization": _utilization(per_device, proof.flops_per_token, device_name),
        "step_seconds": pace.step_seconds,
        "step_parts": dict(pace.parts),
        "gather_wait_seconds": pace.gather_wait_seconds,
        "times": times(status, trace, table),
        "expected_against_measured": compare_with_expected(run, table),
        "computed_settings": proof.computed_settings,
        "chosen": proof.chosen,
        "proof": proof.verdict(),
    }


def times(status: Status, trace: MemoryTrace, table: pd.DataFrame) -> dict[str, Any]:
    """When a run started and ended, and how long it took (seconds), the first step and each phase on its own.

    Phases are those of the lowest rank that has a trace, of the last attempt; ``None`` is what was not reached.
    """
    started, ended = _epoch(status.started), _epoch(status.ended)
    origin = trace.clock_origin
    last = trace.last_attempt()
    first_step: float | None = None
    stepping = last[last["phase"] == "step"]["time_seconds"]
    if len(stepping) and origin is not None:
        # Without a supervisor, or where an earlier attempt was started: count from the start of the ranks.
        begin = started if started is not None and started <= origin else origin
        first_step = origin + float(stepping.min()) - begin
    total: float | None = None
    if started is not None and ended is not None:
        total = ended - started
    elif len(last) and origin is not None:
        total = origin + float(last["time_seconds"].max()) - (started if started is not None else origin)
    lowest = table[table["rank"] == table["rank"].min()]
    seconds = {
        str(phase): float(end - begin)
        for phase, begin, end in zip(lowest["phase"], lowest["begin_seconds"], lowest["end_seconds"], strict=True)
        if phase in ("start", "load", "attach", "data", "engine")
    }
    return {
        "created": status.created,
        "started": status.started,
        "ended": status.ended,
        "launch_to_first_step_seconds": first_step,
        "total_seconds": total,
        "phase_seconds": seconds,
        "startup_seconds": startup_parts(last, launched=started, origin=origin),
    }


def _preset(run: Run) -> str | None:
    try:
        return run.preset
    except ValueError:
        return None


def _given(run: Run) -> dict[str, Any]:
    try:
        return run.given
    except ValueError:
        return {}


def _rank(table: pd.DataFrame, trace: MemoryTrace, rank: int) -> dict[str, Any]:
    phases = {}
    for _, row in table[table["rank"] == rank].iterrows():
        phases[str(row["phase"])] = {name: None if pd.isna(row[name]) else int(row[name]) for name in _PHASE_BYTES}
    end = trace.ends.get(rank, {})
    return {"rank": rank, "phases": phases, "outcome": end.get("outcome"), "error": end.get("error")}


def _losses(loss: LossSummary) -> dict[str, Any]:
    """The loss summary under the names of the command's contract, NaN as ``None``."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(loss).items()
    }
    return {
        "num_steps": plain["num_steps"],
        "max_steps": plain["max_steps"],
        "num_tokens": plain["num_tokens"],
        "first_loss": plain["first"],
        "last_loss": plain["last"],
        "last_loss_smoothed": plain["last_smoothed"],
        "eval_loss_before": plain["eval_before"],
        "eval_loss_after": plain["eval_after"],
        "eval_loss_best": plain["eval_best"],
        "first_nan_step": plain["first_nan_step"],
    }


def _utilization(per_device: float | None, flops_per_token: int | None, device_name: str | None) -> float | None:
    """The part of what a device can compute that goes into the model; ``None`` where one of the two is not known."""
    peak = peak_flops(device_name)
    if per_device is None or flops_per_token is None or peak is None:
        return None
    return per_device * flops_per_token / peak


def _epoch(text: str | None) -> float | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
