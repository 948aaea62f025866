"""A run's processes: finding all of them, and ending them, and nothing else.

The launcher starts each rank in a session of its own, so neither a process group nor a session holds them all. On Linux
the supervisor makes itself the parent of whatever loses its parent below it, which makes "all my descendants" complete;
elsewhere, and when the supervisor is gone, the trace headers say which processes the ranks are.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Iterable

import psutil

from ..runs.alive import ProcessId

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0  # a process in an uninterruptible wait may take a moment to die


def adopt_orphans() -> bool:
    """Become the parent of every orphan among this process's descendants. Returns whether the system can do that."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


class ProcessTree:
    """Some processes and everything below them, remembered once seen: a child whose parent has ended stays in it."""

    def __init__(self, roots: Iterable[ProcessId], *, except_pid: int | None = None) -> None:
        """``except_pid`` is a process that is looked below but is not part of the tree (this one)."""
        self._roots = list(roots)
        self._except_pid = except_pid
        self._seen: dict[int, psutil.Process] = {}

    def add(self, root: ProcessId) -> None:
        """One more process to look below."""
        if root not in self._roots:
            self._roots.append(root)

    def living(self) -> list[psutil.Process]:
        """Everything in the tree that runs now."""
        for root in self._roots:
            process = root.find()
            if process is not None:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    for found in (process, *process.children(recursive=True)):
                        self._seen[found.pid] = found
        self._seen = {pid: process for pid, process in self._seen.items() if _runs(process)}
        return [process for pid, process in self._seen.items() if pid != self._except_pid]

    def terminate(self, grace_seconds: float, between: Callable[[], None] = lambda: None) -> list[psutil.Process]:
        """Ask all of it to end (SIGTERM), and kill what is left after ``grace_seconds``.

        ``between`` is called meanwhile (to reap). Returns what even SIGKILL has not ended, which should be nothing.
        """
        left = self.living()
        _signal_all(left, psutil.Process.terminate)
        deadline = time.monotonic() + grace_seconds
        while left and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            between()
            left = self.living()
        deadline = time.monotonic() + _KILL_SECONDS
        while left and time.monotonic() < deadline:
            _signal_all(left, psutil.Process.kill)
            time.sleep(_POLL_SECONDS)
            between()
            left = self.living()
        return left


def _signal_all(processes: Iterable[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        # psutil checks the time of creation again before it sends, so a reused number is never hit.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            send(process)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
