"""Where and when a run died, in one record and in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..runs.secrets import redact
from ..runs.status import Status
from ..trace.reader import MemoryTrace
from ..units import format_duration


@dataclass(frozen=True)
class Failure:
    """The end of the rank that failed first; ``None`` is what nobody knows."""

    rank: int | None
    phase: str | None
    step: int | None
    time_seconds: float | None
    """Since the start of the attempt, on rank 0's clock."""
    at: str | None
    """ISO 8601, UTC."""
    error: str | None

    @property
    def where(self) -> str:
        """``"step 7"``, ``"load"``, or ``"an unknown phase"``."""
        if self.phase == "step" and self.step is not None:
            return f"step {self.step}"
        return self.phase or "an unknown phase"

    @property
    def sentence(self) -> str:
        """``"Rank 1 failed in step 7, 41 s after the start: killed by SIGKILL"``."""
        who = "The run" if self.rank is None else f"Rank {self.rank}"
        text = f"{who} failed" if self.phase is None else f"{who} failed in {self.where}"
        if self.time_seconds is not None:
            text += f", {format_duration(self.time_seconds)} after the start"
        return f"{text}: {self.error}" if self.error else text

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**vars(self), "sentence": self.sentence}


def find_failure(status: Status, trace: MemoryTrace) -> Failure | None:
    """How a run with state ``failed`` or ``lost`` ended; ``None`` for any other."""
    if status.state not in ("failed", "lost"):
        return None
    ends = {rank: end for rank, end in trace.ends.items() if end.get("outcome") == "failed"}
    rank = status.failed_rank
    if rank is None and ends:
        rank = min(ends, key=lambda rank: float(ends[rank].get("time_seconds", 0.0)))
    end = ends.get(rank) if rank is not None else None
    last = trace.last_attempt()
    if rank is not None:
        last = last[last["rank"] == rank]
    phase: str | None = None
    step: int | None = None
    seconds: float | None = None
    if len(last):
        row = last.iloc[int(last["time_seconds"].to_numpy().argmax())]
        phase, seconds = str(row["phase"]), float(row["time_seconds"])
        step = None if row["step"] is None or row["step"] != row["step"] else int(row["step"])
    if end is not None:
        phase, step = end.get("phase", phase), end.get("step", step)
        seconds = float(end.get("time_seconds", seconds or 0.0))
    elif status.failed_at is not None and trace.clock_origin is not None and rank is not None:
        seconds = _seconds_since(trace.clock_origin, status.failed_at, seconds)
    error = status.error or (None if end is None else end.get("error")) or status.message
    return Failure(
        rank=rank,
        phase=phase,
        step=step,
        time_seconds=seconds,
        at=status.failed_at or status.ended or status.last_news,
        error=None if error is None else redact(error),
    )


def _seconds_since(origin: float, text: str, fallback: float | None) -> float | None:
    try:
        seconds = datetime.fromisoformat(text).timestamp() - origin
    except ValueError:
        return fallback
    # Clocks of two machines can differ: a rank does not die before its last record.
    return max(seconds, fallback or 0.0)
