"""How far a run is: one record for a progress bar, in a terminal or a notebook."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from ..runs.status import Status
from ..runs.store import Run
from ..trace.tail import TailReader

_WORDS = {
    "start": "starting the ranks",
    "load": "loading the model",
    "attach": "attaching the adapter",
    "data": "preparing the data",
    "engine": "building the DeepSpeed engine",
    "step": "training",
    "eval": "evaluating",
    "save": "saving",
}
_BUILDING = ("operator_build_begin", "operator_build")  # events of the first rank while it builds
_WINDOW = 20  # steps that the time left is estimated from


@dataclass(frozen=True)
class Progress:
    """A run at one moment; ``None`` is what is not known yet. Sizes in bytes, times in seconds."""

    status: Status
    phase: str | None
    doing: str
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    elapsed_seconds: float | None
    seconds_left: float | None
    allocated_bytes: dict[int, int]
    """Rank to what it has allocated now."""


class ProgressReader:
    """Follows one run; :meth:`read` is cheap when nothing happened."""

    def __init__(self, run: Run) -> None:
        """Follow ``run``, which may be over or not have begun."""
        self.run = run
        self.tail = TailReader(run.layout.root, max_records=1_000)

    def read(self) -> Progress:
        """Read what is new and say how far the run is."""
        self.tail.poll()
        status = self.run.status
        trace, metrics = self.tail.memory(), self.tail.metrics()
        records = trace.last_attempt()
        last = records.groupby("rank", observed=True).last()
        lowest = last.iloc[0] if len(last) else None
        phase = None if lowest is None else str(lowest["phase"])
        steps = metrics[metrics["event"] == "step"]
        step = int(steps["step"].iloc[-1]) if len(steps) else 0
        known = metrics["max_steps"].dropna()
        max_steps = int(known.iloc[-1]) if len(known) else None
        origin = trace.clock_origin
        running = not status.has_ended and status.state != "pending"
        return Progress(
            status=status,
            phase=phase,
            doing=_doing(status, phase, lowest is not None and str(lowest["event"]) in _BUILDING),
            step=step,
            max_steps=max_steps,
            loss=float(steps["loss"].iloc[-1]) if len(steps) else None,
            tokens_per_second=float(steps["tokens_per_second"].iloc[-1]) if len(steps) else None,
            elapsed_seconds=_elapsed(running, origin, records),
            seconds_left=_left(steps["step_seconds"].tail(_WINDOW).tolist(), step, max_steps) if running else None,
            allocated_bytes={int(str(rank)): int(size) for rank, size in last["allocated_bytes"].dropna().items()},
        )


def _doing(status: Status, phase: str | None, building: bool) -> str:
    if status.has_ended:
        return status.state
    if building:
        return "building DeepSpeed's operator for the CPU: once on this machine, about a minute"
    return _WORDS["start"] if phase is None else _WORDS.get(phase, phase)


def _elapsed(running: bool, origin: float | None, records: object) -> float | None:
    if origin is None:
        return None
    if running:
        return max(0.0, time.time() - origin)
    seconds = records["time_seconds"]  # type: ignore[index]
    return float(seconds.max()) if len(seconds) else None


def _left(step_seconds: list[float], step: int, max_steps: int | None) -> float | None:
    if max_steps is None or not step_seconds or step >= max_steps:
        return None
    return median(step_seconds) * (max_steps - step)
