"""One rank's life: its log, its end by error or signal, and what is left on disk of both.

Nothing here imports torch, so that a rank that fails at its imports still leaves a log and an end record.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

import psutil

from ..runs.layout import RunLayout
from ..runs.secrets import redact
from ..trace.records import Outcome

EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class RankIdentity:
    """Who this process is among the ranks, as the launcher's environment says."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    pid_created: float
    rehearsal: bool  # alone, and playing this rank

    @classmethod
    def from_environment(cls) -> RankIdentity:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; without a launcher this is rank 0 of 1, in a rehearsal any of any."""
        played = os.environ.get("QZ3_REHEARSAL_RANK")
        return cls(
            rank=int(played or os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("QZ3_REHEARSAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")),
            rehearsal=played is not None,
            host=socket.gethostname(),
            pid=os.getpid(),
            pid_created=psutil.Process().create_time(),
        )

    def header(self) -> dict[str, Any]:
        """The part of a trace header that says who writes."""
        return dict(vars(self))


class RankSession:
    """Context manager around a rank's work.

    Inside it, what Python prints goes to the rank's own log and, with the rank in front, to the launcher's; what
    native code prints to its standard error goes to the rank's log alone, where it survives a crash.
    """

    def __init__(self, layout: RunLayout, identity: RankIdentity) -> None:
        """Nothing happens before ``with``."""
        self.layout = layout
        self.identity = identity
        self.on_end: Callable[[Outcome, str | None], None] = lambda outcome, error: None
        self.on_signal: Callable[[Outcome, str | None], None] = lambda outcome, error: None

    def __enter__(self) -> RankSession:
        """Open the log and take over the signals."""
        self.layout.make_folders()
        self._log = open(self.layout.rank_log(self.identity.rank), "a", encoding="utf-8", buffering=1)
        # The rank's own console output, kept before descriptor 2 turns to the log.
        console = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        os.dup2(self._log.fileno(), 2)
        prefix = f"[rank {self.identity.rank}] "
        sys.stdout = sys.stderr = _Tee(self._log, console, prefix)
        faulthandler.enable(file=self._log)
        self._watch_signals()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        """Record how it ended; a failure leaves its traceback in the log. Does not return to Python's own shutdown.

        After a failure the other ranks may wait in a collective for this one, and libraries' exit handlers may wait
        for them: leaving at once lets the launcher end the run.
        """
        code = 0
        if error is None or (isinstance(error, SystemExit) and error.code in (0, None)):
            self.on_end("succeeded", None)
        else:
            code = 1
            print("".join(traceback.format_exception(kind, error, trace)), file=sys.stderr)
            self.on_end("failed", describe(error))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def _watch_signals(self) -> None:
        # Python runs a handler between two bytecodes of the main thread, which may sit in a collective for half an
        # hour. The C-level handler writes to this pipe at once, and a thread of ours acts on it.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _do_nothing)
        threading.Thread(target=self._end_on_signal, args=(read_end,), name="qz3-signals", daemon=True).start()

    def _end_on_signal(self, read_end: int) -> None:
        while True:
            number = os.read(read_end, 1)[0]
            if number in (signal.SIGTERM, signal.SIGINT):
                break
        name = signal.Signals(number).name
        self.on_signal("cancelled", f"ended by {name}")
        self._log.write(f"ended by {name}\n")
        self._log.flush()
        os._exit(EXIT_TERMINATED)


def describe(error: BaseException) -> str:
    """An exception as one line without secrets: ``"ValueError: ..."``."""
    text = " ".join(str(error).split())
    return redact(f"{type(error).__name__}: {text}")[:2000]


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The thread behind the wake-up pipe does the work."""


class _Tee:
    """A text stream into the rank's log, and line by line with a prefix to the launcher's."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, log: IO[str], console: IO[str], prefix: str) -> None:
        self._log, self._console, self._prefix = log, console, prefix
        self._pending = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        text = redact(text)
        with self._lock:
            self._try(self._log, text)
            # A progress bar rewrites its line with carriage returns: only whole lines reach the shared log.
            *lines, self._pending = (self._pending + text).split("\n")
            for line in lines:
                self._try(self._console, f"{self._prefix}{line.rsplit(chr(13), 1)[-1]}\n")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._lock:
            for stream in (self._log, self._console):
                try:
                    stream.flush()
                except OSError:  # a full disk or a closed terminal must not end the training
                    continue

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._log.fileno()

    @staticmethod
    def _try(stream: IO[str], text: str) -> None:
        try:
            stream.write(text)
        except (OSError, ValueError):  # as in flush()
            return
