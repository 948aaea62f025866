"""Is that process still the one we mean? A process number alone is reused; with its time of creation it is unique."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil

# psutil adds a start tick to the time of boot, which moves a little whenever the clock is adjusted.
_CLOCK_SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class ProcessId:
    """One process on this host, for good: its number and when it was created (seconds since the epoch)."""

    pid: int
    created: float

    @classmethod
    def current(cls) -> ProcessId:
        """This process."""
        return cls(os.getpid(), psutil.Process().create_time())

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this number now, or ``None``."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def find(self) -> psutil.Process | None:
        """The process, or ``None`` if it has ended (zombies have) or its number belongs to another one by now."""
        try:
            process = psutil.Process(self.pid)
            with process.oneshot():
                same = abs(process.create_time() - self.created) <= _CLOCK_SLACK_SECONDS
                return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.find() is not None


def known_process(pid: int | None, created: float | None) -> ProcessId | None:
    """A :class:`ProcessId` where both halves are known. A number without its time is not trusted."""
    return None if pid is None or created is None else ProcessId(pid, created)


def this_host() -> str:
    """The name that status files and trace headers carry for this machine."""
    return socket.gethostname()
