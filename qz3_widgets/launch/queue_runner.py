"""The process that works off a queue: ``python -m qz3_widgets.launch.queue_runner RUNS_DIR``. One for each queue.

It starts the next run when no other of the folder goes on on this machine, and ends when nothing waits. Killed at any
moment, it leaves a queue from which the next runner goes on: an entry is marked before its run is made, and forgotten
afterwards.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ..plan.plan import Plan
from ..runs.secrets import redact
from ..runs.status import utc_now
from ..runs.store import Run, list_runs
from .process import start
from .queue import Entry, Queue, check_again, running_here

POLL_SECONDS = 1.0

Start = Callable[[Plan, Path, str | None], Run]


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

    def run(self) -> bool:
        """Work until nothing waits; returns whether this was the runner, and not another one."""
        with self.queue.runner_lock() as alone:
            if not alone:
                return False
            self._say(f"begins, process {os.getpid()}")
            self._recover()
            while self._one():
                pass
            self._say("ends: nothing waits")
        # Something may have been added after the last look, by somebody who still saw this runner.
        if self.queue.has_work():
            return self.run()
        return True

    def _one(self) -> bool:
        """Start the next entry in its turn; returns whether there may be another one."""
        if self.queue.next() is None:
            return False
        if running_here(self.queue.runs_dir):
            time.sleep(self._poll_seconds)
            return True
        with self.queue.locked():
            entry = self.queue.next()  # the order may have changed
            if entry is None:
                return False
            entry = dataclasses.replace(entry, starting=utc_now())
            self.queue.write_entry(entry)
        try:
            os.chdir(entry.working_dir)
            run = self._begin(check_again(entry), self.queue.runs_dir, entry.preset)
        except (ValueError, OSError) as error:
            self._say(f"{entry.entry_id} could not be started: {error}")
            self._fail(entry, redact(str(error)))
        else:
            self._say(f"{entry.entry_id} is {run.run_id}")
            self._started(entry, run.run_id)
        return True

    def _started(self, entry: Entry, run_id: str) -> None:
        with self.queue.locked():
            self.queue.note_running(run_id)
            self.queue.drop(entry.entry_id)

    def _fail(self, entry: Entry, error: str) -> None:
        with self.queue.locked():
            self.queue.write_entry(dataclasses.replace(entry, error=error))

    def _recover(self) -> None:
        """What a runner before this one was starting when it was killed: its run is there, or it is tried again."""
        for entry in self.queue.entries():
            if entry.starting is None or entry.error is not None:
                continue
            run = _run_of(entry, self.queue.runs_dir)
            if run is not None:
                self._say(f"{entry.entry_id} had become {run.run_id}")
                self._started(entry, run.run_id)
            else:
                with self.queue.locked():
                    self.queue.write_entry(dataclasses.replace(entry, starting=None))

    def _say(self, text: str) -> None:
        print(f"{utc_now()} {redact(text)}", flush=True)  # noqa: T201 - standard output is the runner's log


def _run_of(entry: Entry, runs_dir: Path) -> Run | None:
    """The run that was made from an entry, if there is one."""
    since = datetime.fromisoformat(str(entry.starting))
    for run in list_runs(runs_dir):
        created = run.created if run.created.tzinfo else run.created.replace(tzinfo=UTC)
        if created < since.replace(microsecond=0):
            return None
        try:
            if run.config == entry.config:
                return run
        except ValueError:
            continue
    return None


def main() -> None:
    """Work off the queue of the folder that the command line names."""
    QueueRunner(Queue(sys.argv[1])).run()


if __name__ == "__main__":
    main()
