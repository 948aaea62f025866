"""What happens to a run's ranks, seen from their traces, the process table and the launcher's log."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runs.alive import ProcessId
from ..runs.files import size_of
from ..runs.layout import RunLayout
from ..runs.ranks import Death, RankTrace, first_death, list_traces, read_rank, read_ranks

_LOG_BYTES = 512 * 1024
# torchrun says this about each rank as soon as it has seen its end.
_EXIT_LINE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: \d+ \(pid: (\d+)\)")
# And this about all of them at its own end, the one that it noticed first behind the others.
_REPORT = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) \(pid: (\d+)\)")
_ROOT_CAUSE = "Root Cause (first observed failure):"
# Without torchrun (one process), accelerate reports a signal so.
_DIED = re.compile(r"died with <Signals\.(\w+):")
_RANK_PREFIX = r"(?:\[(?:rank ?\d+|[a-z]+\d+)\]:? ?)?"
_EXCEPTION = re.compile(rf"^{_RANK_PREFIX}([\w.]*(?:Error|Exception|Interrupt|Exit)\b(?::.*)?)$", re.MULTILINE)
_NOT_A_CAUSE = ("ChildFailedError", "SignalException", "CalledProcessError")


@dataclass(frozen=True)
class RankExit:
    """How the launcher says that a rank's process ended."""

    rank: int | None  # over all machines; None: not said
    pid: int
    exit_code: int  # negative: the signal

    @property
    def signal_name(self) -> str | None:
        """``"SIGKILL"``, or ``None`` if no signal ended it."""
        return signal_name(self.exit_code)


class RankWatch:
    """Follows the ranks of one attempt: what stood in the traces before it is not its concern."""

    def __init__(self, layout: RunLayout) -> None:
        """Call this before the launcher starts."""
        self._layout = layout
        self._after: Mapping[int, int] = {rank: size_of(path) for rank, path in list_traces(layout).items()}
        self._known: dict[int, RankTrace] = {}

    def processes(self) -> dict[int, ProcessId]:
        """The ranks' processes, as far as they have begun their traces."""
        for rank, path in list_traces(self._layout).items():
            if rank not in self._known:
                trace = read_rank(path, self._after.get(rank, 0))
                if trace is not None:
                    self._known[rank] = trace
        return {rank: trace.process for rank, trace in self._known.items() if trace.process is not None}

    def traces(self) -> dict[int, RankTrace]:
        """What the traces say now, last records included."""
        return read_ranks(self._layout, self._after)

    def find_death(self) -> Death | None:
        """The first rank that is gone and should not be, or ``None`` while all is well."""
        gone = [rank for rank, process in self.processes().items() if not process.is_alive()]
        if not gone:
            return None
        traces = self.traces()
        death = first_death(traces[rank] for rank in gone if rank in traces)
        if death is None or death.error is not None:
            return death
        # It left no record of its end, so the moment of finding out is the best there is.
        return Death(death.rank, time.time(), None)


class LauncherLog:
    """The part of the launcher's log that one attempt has written."""

    def __init__(self, path: Path) -> None:
        """Call this before the launcher starts."""
        self._path = path
        self._begin = size_of(path)

    def exit_of(self, pid: int) -> RankExit | None:
        """What torchrun says of the end of the rank with this process number."""
        text = self._text()
        found = [RankExit(None, int(process), int(code)) for code, process in _EXIT_LINE.findall(text)]
        found += [_report(match) for match in _REPORT.finditer(text)]
        return next((told for told in found if told.pid == pid), None)

    def root_cause(self) -> RankExit | None:
        """The rank that torchrun saw failing first; where several end at once, that is any of them."""
        _, mark, rest = self._text().partition(_ROOT_CAUSE)
        match = _REPORT.search(rest) if mark else None
        return _report(match) if match else None

    def signal_without_torchrun(self) -> str | None:
        """The signal that ended the only rank of a launcher without torchrun."""
        match = _DIED.search(self._text())
        return match.group(1) if match else None

    def first_exception(self) -> str | None:
        """The last line of the first traceback of a rank."""
        for match in _EXCEPTION.finditer(self._text()):
            text = match.group(1)
            if not any(name in text for name in _NOT_A_CAUSE):
                return text
        return None

    def last_line(self) -> str | None:
        """The last line that is not blank."""
        lines = [line.strip() for line in self._text().splitlines() if line.strip()]
        return lines[-1] if lines else None

    def _text(self) -> str:
        try:
            with open(self._path, "rb") as file:
                file.seek(max(self._begin, size_of(self._path) - _LOG_BYTES))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""


def _report(match: re.Match[str]) -> RankExit:
    return RankExit(int(match[1]), int(match[3]), int(match[2]))


def signal_name(exit_code: int | None) -> str | None:
    """``-9`` and ``137`` are ``"SIGKILL"``; ``None`` for what is no signal's."""
    if exit_code is None:
        return None
    number = -exit_code if exit_code < 0 else exit_code - 128
    try:
        return signal.Signals(number).name
    except ValueError:
        return None
