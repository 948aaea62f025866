"""The small process that stays with a run: ``python -m qz3_widgets.launch.supervisor RUN_DIR [launch.sh's arguments]``.

It starts ``launch.sh``, watches the ranks, leaves nothing running, and writes the end into ``status.json``. It lives in
a session of its own, so that whoever started the run may die. SIGTERM or a file ``stop-requested`` in the run directory
ask it to stop the run. It imports little, to be there at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from ..runs.alive import ProcessId, this_host
from ..runs.layout import RunLayout
from ..runs.ranks import Death
from ..runs.secrets import redact
from ..runs.status import Status, read_status, utc_now, write_status
from .tree import ProcessTree, adopt_orphans
from .verdict import AttemptEnd, judge
from .watch import LauncherLog, RankWatch

POLL_SECONDS = 0.5
DEFAULT_GRACE_SECONDS = 10.0
_AFTER_DEATH_SECONDS = 10.0  # that torchrun gets to end the other ranks itself
_TERM_SECONDS = 2.0
_LINGER_SECONDS = 2.0  # for helpers of the ranks to go by themselves after a good end
_FULL_BYTES = 16 * 1024  # less is as good as nothing
_WRITE_SECONDS = 60.0  # of trying to write the last status to a full disk


class Supervisor:
    """One attempt at a run, from its start to its end."""

    def __init__(self, layout: RunLayout, arguments: list[str]) -> None:
        """Nothing is started before :meth:`run`."""
        self._layout = layout
        self._arguments = arguments
        self._status = read_status(layout)
        self._watch = RankWatch(layout)
        self._log = LauncherLog(layout.launcher_log)
        self._tree = ProcessTree([ProcessId.current()], except_pid=os.getpid())
        self._launcher: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._start_error: str | None = None
        self._signalled = False
        self._stop_deadline: float | None = None
        self._death: Death | None = None
        self._death_deadline: float | None = None
        self._disk_was_full = False
        self._wake_end, write_end = os.pipe()
        os.set_blocking(self._wake_end, False)
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def run(self) -> Status:
        """Start, watch, clean up, and write the end. Returns the status that it wrote, or tried to."""
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        try:
            self._start()
        except OSError as error:  # no bash, or no room for the status
            self._say(f"could not start: {error}")
            self._start_error = str(error)
        else:
            while self._exit_code is None:
                self._look_around()
                self._wait()
        self._clean_up()
        return self._finish()

    def _start(self) -> None:
        me = ProcessId.current()
        with open(self._layout.launcher_log, "ab") as log:
            self._launcher = subprocess.Popen(
                ["bash", str(self._layout.launch_sh), *self._arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
        launcher = ProcessId.of(self._launcher.pid)
        self._status = dataclasses.replace(
            self._status,
            state="running",
            host=this_host(),
            pid=me.pid,
            pid_created=me.created,
            process_group=self._launcher.pid,
            launcher_created=launcher.created if launcher else None,
            started=utc_now(),
        )
        self._say(f"started launch.sh as process {self._launcher.pid}")
        write_status(self._layout, self._status)

    def _look_around(self) -> None:
        """One look at everything; decides whether the run has to be ended."""
        now = time.monotonic()
        with contextlib.suppress(OSError):
            self._disk_was_full |= shutil.disk_usage(self._layout.root).free < _FULL_BYTES
        for process in self._watch.processes().values():
            self._tree.add(process)
        if self._stop_deadline is None and self._is_stop_wanted():
            grace = self._read_grace()
            self._stop_deadline = now + grace
            self._say(f"asks the launcher to end, within {grace:g} s")
            self._signal_launcher(signal.SIGTERM)
        if self._stop_deadline is None and self._death is None:
            self._death = self._watch.find_death()
            if self._death is not None:
                self._death_deadline = now + _AFTER_DEATH_SECONDS
                self._say(f"rank {self._death.rank} is gone: {self._death.error or 'it left no word'}")
        due = [deadline for deadline in (self._stop_deadline, self._death_deadline) if deadline is not None]
        if due and now >= min(due):
            self._end_everything(_TERM_SECONDS if self._stop_deadline is None else 0.5)

    def _wait(self) -> None:
        """Sleep until something happens, at most :data:`POLL_SECONDS`."""
        select.select([self._wake_end], [], [], POLL_SECONDS)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_end, 1024)
        self._reap()

    def _reap(self) -> None:
        """Collect ended children, adopted ones too. The launcher's exit code is remembered."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._launcher is not None and pid == self._launcher.pid:
                self._exit_code = self._launcher.returncode = os.waitstatus_to_exitcode(status)

    def _clean_up(self) -> None:
        """Nothing of the run may outlive it."""
        if self._death is None and self._stop_deadline is None:
            self._death = self._watch.find_death()
        deadline = time.monotonic() + (_LINGER_SECONDS if self._exit_code == 0 else 0.0)
        while self._tree.living() and time.monotonic() < deadline:
            self._wait()
        self._end_everything(_TERM_SECONDS)

    def _end_everything(self, grace_seconds: float) -> None:
        for process in self._watch.processes().values():
            self._tree.add(process)
        living = self._tree.living()
        if living:
            self._say(f"ends {len(living)} processes: {', '.join(str(process.pid) for process in living)}")
            left = self._tree.terminate(grace_seconds, self._reap)
            if left:
                self._say(f"even SIGKILL did not end {', '.join(str(process.pid) for process in left)}")
        self._reap()

    def _finish(self) -> Status:
        end = AttemptEnd(
            exit_code=self._exit_code,
            stopped=self._stop_deadline is not None,
            death=self._death,
            death_process=self._watch.processes().get(self._death.rank) if self._death else None,
            traces=tuple(self._watch.traces().values()),
            start_error=self._start_error,
            disk_was_full=self._disk_was_full,
        )
        status = judge(self._status, end, self._log)
        self._say(f"{status.state}, exit code {status.exit_code}")
        deadline = time.monotonic() + _WRITE_SECONDS
        while True:
            try:
                write_status(self._layout, status)
                break
            except OSError as error:
                self._note(error)
                # The old file stays whole; without the new one the state is worked out from the traces.
                if time.monotonic() > deadline:
                    self._say(f"could not write status.json: {error}")
                    break
                time.sleep(1.0)
        with contextlib.suppress(OSError):
            self._layout.stop_requested.unlink()
        return status

    def _is_stop_wanted(self) -> bool:
        return self._signalled or self._layout.stop_requested.exists()

    def _read_grace(self) -> float:
        try:
            return float(json.loads(self._layout.stop_requested.read_text())["grace_seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return DEFAULT_GRACE_SECONDS

    def _signal_launcher(self, number: signal.Signals) -> None:
        if self._launcher is not None and self._exit_code is None:
            # Not reaped yet, so the number is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._launcher.pid, number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._signalled = True

    def _say(self, text: str) -> None:
        try:
            with open(self._layout.supervisor_log, "a", encoding="utf-8") as log:
                log.write(f"{utc_now()} {redact(text)}\n")
        except OSError as error:  # a full disk must not keep the supervisor from its work
            self._note(error)

    def _note(self, error: OSError) -> None:
        self._disk_was_full |= error.errno in (errno.ENOSPC, errno.EDQUOT)


def main(arguments: list[str]) -> int:
    """Supervise the run directory ``arguments[0]``; the rest goes to ``launch.sh``."""
    status = Supervisor(RunLayout(Path(arguments[0])), arguments[1:]).run()
    return 0 if status.state == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
