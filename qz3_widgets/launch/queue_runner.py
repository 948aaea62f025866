"""The process that works off a queue: ``python -m qz3_widgets.launch.queue_runner RUNS_DIR``. One for each queue.

It starts the next run when no other of the folder goes on on this machine, and ends when nothing waits. Killed at any
moment, it leaves a queue from which the next runner goes on: an entry is marked before its run is made, and forgotten
afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from ..plan.plan import Plan, make_plan
from ..plan.prospect import refuse_if_too_large
from ..runs.alive import this_host
from ..runs.files import modified
from ..runs.secrets import redact
from ..runs.status import read_status, utc_now
from ..runs.store import Run, list_runs
from .process import start
from .queue import Entry, Queue

POLL_SECONDS = 1.0
_COMING_UP_SECONDS = 60.0
"""A run that has been pending for longer is none that is just being started: whoever was at it has died."""
_POLLS_AFTER_ERROR = 10

Start = Callable[[Plan, Path, str | None], Run]


def running_here(runs_dir: Path, *, by_hand: bool = False) -> list[Run]:
    """Runs of the folder that go on on this machine, whoever started them.

    Args:
        runs_dir: The folder of runs.
        by_hand: Look also for runs that had ended and that ``launch.sh`` has begun again, which nothing but their
            traces tells of: 1 ms for each run, instead of 0.05.

    Raises:
        ValueError: the folder can't be read.
    """
    found = []
    for run in list_runs(runs_dir):
        try:
            told = read_status(run.layout)
        except ValueError:
            continue
        elsewhere = told.host is not None and told.host != this_host()
        if elsewhere or (told.has_ended and not by_hand):
            continue
        status = run.status
        coming_up = (
            status.state == "pending"
            and status.launched_by == "supervisor"
            and time.time() - modified(run.layout.status_json) < _COMING_UP_SECONDS
        )
        if status.state == "running" or coming_up:
            found.append(run)
    return found


def check_again(entry: Entry) -> Plan:
    """The entry's plan at the moment of its start; the current folder is the one where it was added.

    Raises:
        PlanError: it can't be started any more.
    """
    plan = make_plan(entry.config)
    plan.raise_if_blocked()
    if not entry.even_if_too_large:
        refuse_if_too_large(plan)
    return plan


class QueueRunner:
    """Works off one queue."""

    def __init__(
        self,
        queue: Queue,
        *,
        begin: Start = lambda plan, runs_dir, preset: start(plan, runs_dir=runs_dir, preset=preset),
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """``begin`` starts a plan in a folder of runs."""
        self.queue = queue
        self._begin = begin
        self._poll_seconds = poll_seconds

    def run(self, inherited_lock: int | None = None) -> bool:
        """Work until nothing waits; returns whether this was the runner, and not another one.

        Args:
            inherited_lock: See :meth:`.Queue.runner_lock`.
        """
        with self.queue.runner_lock(inherited_lock) as alone:
            if not alone:
                return False
            self._say(f"begins, process {os.getpid()}")
            while self._goes_on():
                pass
            self._say("ends: nothing waits, or the queue is paused")
        # Something may have been added after the last look, by somebody who still saw this runner.
        if self.queue.has_work():
            return self.run()
        return True

    def _goes_on(self) -> bool:
        try:
            return self._one()
        except ValueError as error:  # the queue can't be read or written, for a full disk for example
            self._say(f"waits: {error}")
            time.sleep(self._poll_seconds * _POLLS_AFTER_ERROR)
            return True

    def _one(self) -> bool:
        """Start the next entry in its turn; returns whether there may be another one."""
        entry = self.queue.next()
        if entry is None:
            return False
        if entry.starting is not None:
            self._recover(entry)
            return True
        folder = self.queue.runs_dir
        if running_here(folder) or running_here(folder, by_hand=True):
            time.sleep(self._poll_seconds)
            return True
        try:
            with _inside(entry.working_dir):
                plan = check_again(entry)
                if not self._mark(entry):
                    return True
                run = self._begin(plan, folder, entry.preset)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this entry's, and the others have their turn
            self._fail(entry, error)
        else:
            self._started(entry, run)
        return True

    def _mark(self, entry: Entry) -> bool:
        """Note that an entry is being started; returns whether it is still its turn."""
        with self.queue.locked():
            if self.queue.next() != entry:
                return False
            self.queue.write_entry(dataclasses.replace(entry, starting=utc_now()))
        return True

    def _started(self, entry: Entry, run: Run) -> None:
        self._say(f"{entry.entry_id} is {run.run_id}")
        with self.queue.locked():
            self.queue.note_running(run.run_id)
            self.queue.drop(entry.entry_id)

    def _fail(self, entry: Entry, error: Exception) -> None:
        expected = isinstance(error, (ValueError, OSError))
        text = redact(str(error) if expected else f"{type(error).__name__}: {error}")
        self._say(f"{entry.entry_id} could not be started: {text}")
        with self.queue.locked():
            if any(each.entry_id == entry.entry_id for each in self.queue.entries()):  # or it was removed meanwhile
                self.queue.write_entry(dataclasses.replace(entry, starting=None, error=text))

    def _recover(self, entry: Entry) -> None:
        """What a runner before this one was starting when it was killed: its run is there, or it is tried again."""
        run = self._run_of(entry)
        if run is not None:
            while run.state == "pending" and _processes_of(run):
                time.sleep(self._poll_seconds)
            if run.state == "pending":  # its files are there, and nobody came to start it
                shutil.rmtree(run.layout.root, ignore_errors=True)
                run = None
        if run is not None:
            self._started(entry, run)
        else:
            self._say(f"{entry.entry_id} was about to be started; tries again")
            with self.queue.locked():
                self.queue.write_entry(dataclasses.replace(entry, starting=None))

    def _run_of(self, entry: Entry) -> Run | None:
        """The run that was made from an entry, if there is one."""
        since = datetime.fromisoformat(str(entry.starting))
        for run in list_runs(self.queue.runs_dir):
            created = run.created if run.created.tzinfo else run.created.replace(tzinfo=UTC)
            if created < since:
                return None
            try:
                if created - since < timedelta(seconds=_COMING_UP_SECONDS) and run.config == entry.config:
                    return run
            except ValueError:
                continue
        return None

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end it
            print(f"{utc_now()} {redact(text)}", flush=True)  # noqa: T201 - standard output is the runner's log


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Relative paths start in ``folder``.

    Raises:
        ValueError: it can't be entered.
    """
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as error:
        reason = error.strerror or error
        message = f"{folder}, where it was added and where its relative paths start, can't be entered: {reason}"
        raise ValueError(message) from error
    try:
        yield
    finally:
        os.chdir(before)


def _processes_of(run: Run) -> list[psutil.Process]:
    """Living processes whose command line names the run's directory: a supervisor that is just coming up."""
    root = str(run.layout.root)
    return [process for process in psutil.process_iter(["cmdline"]) if root in (process.info["cmdline"] or [])]


def main(arguments: list[str]) -> None:
    """Work off the queue of the folder ``arguments[0]``; ``arguments[1]`` is the descriptor of its lock, if held."""
    queue = Queue(arguments[0])
    os.chdir("/")  # it outlives the folder in which it was started
    QueueRunner(queue).run(int(arguments[1]) if len(arguments) > 1 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
