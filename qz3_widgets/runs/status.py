"""A run's state: as ``status.json`` has it, and as it is at present."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from .alive import known_process, this_host
from .files import modified, read_json_object, write_json_atomic
from .layout import RunLayout
from .ranks import RankTrace, first_death, list_traces, read_ranks

SCHEMA_VERSION = 1

State = Literal["pending", "running", "succeeded", "failed", "cancelled", "lost"]
Launcher = Literal["supervisor", "launch.sh"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled", "lost"})
"""States that a run does not leave by itself."""

WITHOUT_A_WORD = "it ended without a word: killed from outside, or by the system for want of memory"
"""The error of a rank that left no end record."""

# The supervisor notes the start just before the ranks come up; both clocks are this host's.
_SLACK_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """What ``status.json`` holds. Times are ISO 8601 in UTC."""

    run_id: str
    state: State
    created: str
    launched_by: Launcher = "supervisor"
    attempt: int = 1  # 2 after the first resume
    num_ranks: int | None = None  # that run on this machine
    rehearsal: bool = False  # one rank alone, that plays one of many
    host: str | None = None
    pid: int | None = None  # of the supervisor
    pid_created: float | None = None  # seconds since the epoch; with pid it names one process for good
    process_group: int | None = None  # of the launcher, whose process number it is too
    launcher_created: float | None = None
    started: str | None = None
    ended: str | None = None
    exit_code: int | None = None  # of the launcher; negative: the signal that killed it
    failed_rank: int | None = None
    failed_at: str | None = None
    signal: str | None = None  # that killed the failed rank, as far as it is known
    error: str | None = None  # one line
    message: str | None = None  # one sentence for people
    last_news: str | None = dataclasses.field(default=None, compare=False)  # newest record; found, never stored

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """The content of ``status.json``."""
        content = dataclasses.asdict(self)
        del content["last_news"]
        return {"schema_version": SCHEMA_VERSION, **content}

    @classmethod
    def from_json(cls, content: dict[str, Any], *, source: str = "status.json") -> Status:
        """Back from :meth:`to_json`; keys of a later version are ignored.

        Raises:
            ValueError: no state, or one that does not exist.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"last_news"}
        values = {key: value for key, value in content.items() if key in known}
        if values.get("state") not in STATES:
            raise ValueError(f"{source}: state is {values.get('state')!r}, not one of {', '.join(STATES)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{source}: {error}") from error


def utc_now() -> str:
    """The present time as status files have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def utc_text(seconds: float) -> str:
    """Seconds since the epoch, as status files have it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def read_status(layout: RunLayout) -> Status:
    """What ``status.json`` says, be it still true or not.

    Raises:
        ValueError: the file is missing or holds something else; the message names it.
    """
    return Status.from_json(read_json_object(layout.status_json), source=str(layout.status_json))


def write_status(layout: RunLayout, status: Status) -> None:
    """Replace ``status.json`` in one step.

    Raises:
        OSError: it can't be written; the old file is untouched.
    """
    write_json_atomic(layout.status_json, status.to_json())


def resolve(layout: RunLayout) -> Status:
    """The true present state: ``status.json``, checked against the processes and the traces. Writes nothing.

    Never raises for a damaged ``status.json``: the state then comes from the traces, and ``message`` names the damage.
    """
    try:
        status = read_status(layout)
    except ValueError as error:
        status = Status(run_id=layout.run_id, state="pending", created=utc_text(0.0), launched_by="launch.sh")
        return _from_traces(layout, status, problem=str(error))
    if status.has_ended:
        again = _started_again_by_hand(layout, status)
        return status if again is None else _from_traces(layout, status, since=again)
    if status.host is not None and status.host != this_host():
        # Another machine's processes can't be seen from here: its own supervisor keeps the file.
        return dataclasses.replace(status, last_news=_newest(read_ranks(layout).values()))
    supervisor = known_process(status.pid, status.pid_created)
    if supervisor is not None and supervisor.is_alive():
        return dataclasses.replace(status, state="running")
    return _from_traces(layout, status, since=_begin_of_attempt(status))


def _from_traces(layout: RunLayout, status: Status, *, since: float = 0.0, problem: str | None = None) -> Status:
    """The state without a supervisor to ask, from ranks that began after ``since`` (seconds since the epoch)."""
    # A resumed run's older headers are no news.
    ranks = [trace for trace in read_ranks(layout).values() if trace.began >= since]
    news = _newest(ranks)
    found = dataclasses.replace(status, last_news=news, message=problem)
    launcher = known_process(status.process_group, status.launcher_created)
    if any(trace.is_alive() for trace in ranks) or (launcher is not None and launcher.is_alive()):
        return dataclasses.replace(found, state="running", ended=None, exit_code=None)
    if not ranks:
        if status.pid is None and status.state == "pending" and problem is None:
            return found
        message = problem or "its processes are gone, and no rank has left a trace"
        return dataclasses.replace(found, state="lost", message=message)
    elsewhere = {trace.host for trace in ranks if trace.host != this_host() and trace.outcome is None}
    if elsewhere:
        message = problem or f"it runs on {', '.join(sorted(elsewhere))}, which can't be checked from here"
        return dataclasses.replace(found, state="running", ended=None, message=message)
    ended = dataclasses.replace(found, ended=news)
    outcomes = [trace.outcome for trace in ranks]
    expected = status.num_ranks or ranks[0].world_size
    if len(ranks) >= expected and set(outcomes) == {"succeeded"}:
        return dataclasses.replace(ended, state="succeeded")
    if "failed" in outcomes or ("cancelled" in outcomes and None in outcomes):
        death = first_death(ranks)
        assert death is not None
        return dataclasses.replace(
            ended,
            state="failed",
            failed_rank=death.rank,
            failed_at=utc_text(death.time),
            error=death.error or WITHOUT_A_WORD,
        )
    if "cancelled" in outcomes and len(ranks) < expected:
        error = f"only {len(ranks)} of {expected} ranks came to record anything, and the others were asked to end"
        return dataclasses.replace(ended, state="failed", failed_at=news, error=error)
    if "cancelled" in outcomes:
        return dataclasses.replace(ended, state="cancelled", message=problem or "its ranks were asked to end")
    silent = ", ".join(str(trace.rank) for trace in ranks if trace.outcome is None) or "some"
    message = problem or f"its processes are gone without a result (no end record of rank {silent})"
    return dataclasses.replace(ended, state="lost", message=message)


def _begin_of_attempt(status: Status) -> float:
    return 0.0 if status.started is None else datetime.fromisoformat(status.started).timestamp() - _SLACK_SECONDS


def _started_again_by_hand(layout: RunLayout, status: Status) -> float | None:
    """If ``launch.sh`` was run after the end that ``status`` tells of: a time between the two."""
    if status.ended is None:
        return None
    limit = datetime.fromisoformat(status.ended).timestamp() + 0.001  # what was rounded off
    if max(map(modified, list_traces(layout).values()), default=0.0) <= limit:
        return None
    return limit if any(trace.began > limit for trace in read_ranks(layout).values()) else None


def _newest(ranks: Iterable[RankTrace]) -> str | None:
    times = [trace.last_news for trace in ranks]
    return utc_text(max(times)) if times else None
