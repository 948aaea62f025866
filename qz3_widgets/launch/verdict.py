"""How an attempt ended, from everything that is known about it: pure but for the launcher's log."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass

from ..runs.alive import ProcessId
from ..runs.ranks import Death, RankTrace
from ..runs.secrets import redact
from ..runs.status import WITHOUT_A_WORD, Status, utc_now, utc_text
from .watch import LauncherLog, signal_name


@dataclass(frozen=True)
class AttemptEnd:
    """What the supervisor knows when nothing of the run is left."""

    exit_code: int | None  # of the launcher; None: it never ran
    stopped: bool  # somebody asked for the end
    death: Death | None  # the first rank that was gone and should not have been
    death_process: ProcessId | None
    traces: tuple[RankTrace, ...]
    start_error: str | None = None
    disk_was_full: bool = False


DISK_FULL = "the disk that holds the run was full; make room and start it again"


def judge(status: Status, end: AttemptEnd, log: LauncherLog) -> Status:
    """``status`` with the end in it: state, exit code, who failed first, and why."""
    judged = _judge(status, end, log)
    error = judged.error or WITHOUT_A_WORD
    if judged.state != "failed" or not end.disk_was_full:
        return judged
    # On a full disk the ranks can't say why they end, so "without a word" means nothing.
    return dataclasses.replace(judged, error=DISK_FULL if error == WITHOUT_A_WORD else f"{DISK_FULL} ({error})")


def _judge(status: Status, end: AttemptEnd, log: LauncherLog) -> Status:
    ended = dataclasses.replace(status, ended=utc_now(), exit_code=end.exit_code)
    outcomes = [trace.outcome for trace in end.traces]
    expected = status.num_ranks or len(outcomes)
    if end.exit_code == 0 and len(outcomes) >= max(expected, 1) and set(outcomes) == {"succeeded"}:
        return dataclasses.replace(ended, state="succeeded")
    if end.death is None and end.stopped:
        return dataclasses.replace(ended, state="cancelled", message="stopped on request")
    failed = dataclasses.replace(ended, state="failed")
    if end.exit_code == 0 and (end.death is None or end.death.error is None):
        told = outcomes.count("succeeded")
        error = f"the launcher ended well, but only {told} of {expected} ranks recorded a good end"
        return dataclasses.replace(failed, error=error)
    if end.death is not None:
        return _of_rank(failed, end.death, end.death_process, log)
    if set(outcomes) == {"cancelled"} and end.exit_code != -signal.SIGKILL and log.root_cause() is None:
        message = "ended by a SIGTERM that did not come from here"
        return dataclasses.replace(ended, state="cancelled", message=message)
    return _of_launcher(failed, end, log)


def _of_rank(failed: Status, death: Death, process: ProcessId | None, log: LauncherLog) -> Status:
    report = log.exit_of(process.pid) if process is not None else None
    killed_by = report.signal_name if report is not None else log.signal_without_torchrun()
    error = death.error
    if error is None and killed_by is not None:
        by_whom = ": by hand, or by the system for want of memory" if killed_by == signal.SIGKILL.name else ""
        error = f"killed by {killed_by}{by_whom}"
    elif error is None and report is not None:
        error = log.first_exception() or f"it ended with exit code {report.exit_code}"
    return dataclasses.replace(
        failed,
        failed_rank=death.rank,
        failed_at=utc_text(death.time),
        signal=killed_by,
        error=redact(error or WITHOUT_A_WORD),
        message=f"rank {death.rank} failed first; its log is logs/rank-{death.rank:05d}.log",
    )


def _of_launcher(failed: Status, end: AttemptEnd, log: LauncherLog) -> Status:
    """The launcher ended badly, and no rank's trace tells why."""
    cause = log.root_cause()
    killed_by = signal_name(cause.exit_code if cause is not None else end.exit_code)
    error = end.start_error or log.first_exception()
    if error is None and killed_by is not None:
        who = "the launcher" if cause is None else f"rank {cause.rank}"
        error = f"{who} was killed by {killed_by}"
    error = error or log.last_line() or f"the launcher ended with exit code {end.exit_code}"
    when = "while its ranks ran" if end.traces else "before its ranks began to record"
    return dataclasses.replace(
        failed,
        failed_rank=cause.rank if cause is not None else None,
        failed_at=utc_now(),
        signal=killed_by,
        error=redact(error),
        message=f"the launcher ended {when}; see logs/launcher.log",
    )
