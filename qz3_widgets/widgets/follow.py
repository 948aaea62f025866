"""What a live view knows of a run: read once, as far as it was written, at a bounded cost."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..analysis.memory import phase_spans
from ..analysis.names import config_of
from ..analysis.progress import Progress, ProgressReader
from ..runs.files import modified
from ..runs.status import Status
from ..runs.store import Run
from ..trace.frames import concat
from ..trace.reader import MemoryTrace, RankRecords, assemble
from ..trace.tail import TailReader

_RECORDS = 6_000  # of all ranks: more than a figure has pixels for
_FEWEST_RECORDS = 600  # of one rank
# Reading takes a few milliseconds for each rank, in the notebook's own process: one part in so many of a core's time.
# Two ranks are looked at twice a second all the same, eight once a second, and hundreds every few seconds.
_READ_SHARE = 40
_MAX_READ_SECONDS = 5.0
# Without a supervisor on this machine the state is worked out from the traces, whose last header may be far from their
# end: that may take a share of the time only. A new status.json is seen at once.
_STATUS_SHARE = 100
_MAX_STATUS_SECONDS = 5.0
# Peaks and times in phases come from all records; between two looks at all of them only the newest are looked at.
_SURVEY_SHARE = 100
_MAX_SURVEY_SECONDS = 5.0


@dataclass(frozen=True)
class RankNow:
    """One rank at the last record it wrote; ``None`` is what it did not say."""

    rank: int
    phase: str
    step: int | None
    allocated_bytes: int | None
    peak_bytes: int | None
    """Most that was allocated at once, in any phase."""
    outcome: str | None
    """``"succeeded"``, ``"failed"`` or ``"cancelled"`` once it has ended."""
    silent_seconds: float
    """Since its trace last grew."""


@dataclass(frozen=True)
class Survey:
    """What all records together say of the last attempt."""

    peak_bytes: dict[int, int]
    """Rank to the most that it had allocated at once."""
    step_peak_bytes: int | None
    """Largest peak of a step on any rank."""
    phase_seconds: dict[str, float]
    """Seconds that the lowest rank has spent in each phase, in the order in which it entered them."""


@dataclass(frozen=True)
class Now:
    """A run at one moment, as a view shows it."""

    progress: Progress
    ranks: tuple[RankNow, ...]
    missing_ranks: tuple[int, ...]
    """Promised by the others, and not heard of."""
    phases: tuple[tuple[str, float, bool], ...]
    """The lowest rank's phases in the order in which it entered them: name, seconds in it so far, is it in it now."""
    step_peak_bytes: int | None
    """Largest peak of a step on any rank."""
    capacity_bytes: int | None
    device: str | None
    step_seconds: float | None
    """Median of the last steps."""

    @property
    def status(self) -> Status:
        """The run's state."""
        return self.progress.status


class FollowedRun(Run):
    """A run as far as it was read by :meth:`poll`: what asks it for traces or state makes it read nothing again."""

    def __init__(self, run: Run) -> None:
        """Follow ``run``, which may be over or not have begun."""
        super().__init__(run.layout)
        config = config_of(run)
        num_ranks = 2 if config is None else config.launch.num_processes
        self._tail = _Tail(run.layout.root, max_records=max(_FEWEST_RECORDS, _RECORDS // num_ranks))
        self._status = run.status
        self._status_time = modified(self.layout.status_json)
        self._next_status = 0.0
        self._next_read = 0.0
        self._read_begun = 0.0
        self._reader = ProgressReader(self)
        self._reader.tail = _Newest(self._tail)
        self._survey = Survey({}, None, {})
        self._surveyed: tuple[Any, ...] | None = None
        self._next_survey = 0.0

    @property
    def status(self) -> Status:
        """The state at the last :meth:`poll`."""
        return self._status

    def memory(self, ranks: Sequence[int] | None = None) -> MemoryTrace:
        """The memory of all ranks, as far as it was read, old records thinned out."""
        trace = self._tail.memory()
        if ranks is None:
            return trace
        return dataclasses.replace(trace, frame=trace.frame[trace.frame["rank"].isin(list(ranks))])

    def metrics(self) -> pd.DataFrame:
        """Steps and evaluations, as far as they were read."""
        return self._tail.metrics()

    def poll(self) -> bool:
        """Read what is new, if that is not too soon after the last time; returns whether there was anything.

        Raises:
            ValueError: the run directory is gone, or a trace has another version of the format.
        """
        # The state first: of a run that has ended since, every record is there to be read.
        before = self._status
        self._read_status()
        changed = self._status != before
        if time.monotonic() < self._next_read and not changed:
            return False
        self._read_begun = time.thread_time()
        return self._tail.poll() or changed

    def read(self) -> Now:
        """The run as it is now, as far as it was polled."""
        progress = self._reader.read()
        trace = self._tail.newest()
        survey = self._take_survey(progress)
        steps = self.metrics()["step_seconds"].dropna().tail(20)
        here = None if progress.status.has_ended else progress.phase
        now = Now(
            progress=progress,
            ranks=tuple(self._rank(row, trace, survey) for row in trace.last_attempt().to_dict(orient="records")),
            missing_ranks=trace.missing_ranks,
            phases=tuple((phase, seconds, phase == here) for phase, seconds in survey.phase_seconds.items()),
            step_peak_bytes=survey.step_peak_bytes,
            capacity_bytes=min(trace.capacity_bytes.values(), default=None),
            device=trace.device,
            step_seconds=float(steps.median()) if len(steps) else None,
        )
        cost = time.thread_time() - self._read_begun
        self._next_read = time.monotonic() + min(_MAX_READ_SECONDS, _READ_SHARE * cost)
        return now

    def tick(self, now: Now) -> Now:
        """``now`` a moment later, if :meth:`poll` has brought nothing: only the clocks went on."""
        progress, silent = now.progress, self._tail.seconds_since_news()
        origin = self._tail.newest().clock_origin
        if origin is not None and not progress.status.has_ended and progress.status.state != "pending":
            progress = dataclasses.replace(progress, elapsed_seconds=max(0.0, time.time() - origin))
        ranks = tuple(dataclasses.replace(rank, silent_seconds=silent.get(rank.rank, 0.0)) for rank in now.ranks)
        return dataclasses.replace(now, progress=progress, ranks=ranks)

    def _read_status(self) -> None:
        begin, written = time.monotonic(), modified(self.layout.status_json)
        if written == self._status_time and begin < self._next_status:
            return
        self._status_time = written
        self._status = Run(self.layout).status
        end = time.monotonic()
        self._next_status = end + min(_MAX_STATUS_SECONDS, _STATUS_SHARE * (end - begin))

    def _take_survey(self, progress: Progress) -> Survey:
        """The last survey, or a new one if its time has come or the run is at something else now."""
        at = (progress.phase, progress.status.state, progress.step == 0)
        if at == self._surveyed and time.monotonic() < self._next_survey:
            return self._survey
        begin = time.thread_time()
        self._survey, self._surveyed = _survey(self.memory().last_attempt()), at
        cost = time.thread_time() - begin
        self._next_survey = time.monotonic() + min(_MAX_SURVEY_SECONDS, _SURVEY_SHARE * cost)
        return self._survey

    def _rank(self, row: dict[Any, Any], trace: MemoryTrace, survey: Survey) -> RankNow:
        rank = int(row["rank"])
        known = {name: None if pd.isna(row[name]) else int(row[name]) for name in ("step", "allocated_bytes")}
        return RankNow(
            rank=rank,
            phase=str(row["phase"]),
            step=known["step"],
            allocated_bytes=known["allocated_bytes"],
            peak_bytes=survey.peak_bytes.get(rank),
            outcome=trace.ends.get(rank, {}).get("outcome"),
            silent_seconds=self._tail.seconds_since_news().get(rank, 0.0),
        )


class _Tail(TailReader):
    """Puts the ranks together once for all who ask until the next record, and knows each one's newest record."""

    _together: MemoryTrace | None = None
    _latest: MemoryTrace | None = None

    def poll(self) -> bool:
        changed = super().poll()
        if changed:
            self._together = self._latest = None
        return changed

    def memory(self) -> MemoryTrace:
        if self._together is None:
            for records in self._ranks.values():
                # Each poll has added a small frame, and putting many together costs more than their rows do.
                records.frames = [concat(records.frames)] if records.frames else []
            self._together = super().memory()
        return self._together

    def newest(self) -> MemoryTrace:
        """As :meth:`memory`, but for the records: only the last one of each rank."""
        if self._latest is None:
            self._latest = assemble([_last_record(records) for records in self._ranks.values()])
        return self._latest


class _Newest(TailReader):
    """What a :class:`ProgressReader` is handed: it asks for the newest records only."""

    def __init__(self, tail: _Tail) -> None:
        self._tail = tail

    def poll(self) -> bool:
        """The run was polled already."""
        return False

    def memory(self) -> MemoryTrace:
        return self._tail.newest()

    def metrics(self) -> pd.DataFrame:
        return self._tail.metrics()


def _last_record(records: RankRecords) -> RankRecords:
    last = copy.copy(records)
    last.frames = [records.frames[-1].iloc[-1:]] if records.frames else []
    return last


def _survey(records: pd.DataFrame) -> Survey:
    if len(records) == 0:
        return Survey({}, None, {})
    peaks = records.groupby("rank", sort=True)["peak_allocated_bytes"].max().dropna()
    seconds: dict[str, float] = {}
    for phase, begin, end in phase_spans(records[records["rank"] == records["rank"].min()]):
        seconds[phase] = seconds.get(phase, 0.0) + end - begin
    largest = records["peak_allocated_bytes"][records["phase"] == "step"].max()
    return Survey(
        peak_bytes={int(str(rank)): int(size) for rank, size in peaks.items()},
        step_peak_bytes=None if pd.isna(largest) else int(largest),
        phase_seconds=seconds,
    )
