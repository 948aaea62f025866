"""Runs one after another: a queue on disk, which any process may change, and which a process of its own works off.

It lies in the hidden folder ``.queue`` of the runs folder: a file for each entry, their order, and two locks. Nothing
is kept in memory, so notebooks, commands and the runner see the same queue, and none of them is needed for it to last.
The runs have the environment of whoever started the runner; it is written nowhere, for it may hold secrets.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config.changes import from_plain
from ..config.presets import preset as preset_config
from ..config.schema import RunConfig
from ..plan.plan import make_plan
from ..plan.prospect import refuse_if_too_large
from ..runs.files import read_json_object, write_json_atomic
from ..runs.secrets import redact
from ..runs.status import utc_now
from ..runs.store import Run
from .directory import child_environment, refuse_secrets

_VERSION = 1
_MAY_BE_NONE = {"preset", "starting", "error"}
_LOCK_SECONDS = 0.5  # whoever asks whether there is a runner holds its lock for some microseconds


@dataclass(frozen=True)
class Entry:
    """One run that waits, or that could not be started."""

    entry_id: str
    name: str
    config: RunConfig
    preset: str | None
    added: str
    """ISO 8601, UTC."""
    working_dir: str
    """Where relative paths in the configuration start."""
    even_if_too_large: bool = False
    starting: str | None = None
    """When the runner began to start it; it is then no more to be moved or removed."""
    error: str | None = None
    """Why it could not be started."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"version": _VERSION, **content, "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: str) -> Entry:
        """Back from :meth:`to_json`.

        Raises:
            ValueError: something else; names ``source``.
        """
        if content.get("version") != _VERSION:
            raise ValueError(f"{source} is no entry of this version")
        values: dict[str, Any] = {field.name: content.get(field.name) for field in dataclasses.fields(cls)}
        config = from_plain(values.pop("config"), source=source)
        for name, value in values.items():
            wanted = bool if name == "even_if_too_large" else str
            if not isinstance(value, wanted) and not (value is None and name in _MAY_BE_NONE):
                raise ValueError(f"{source} can't be read: {name} is {value!r}")
        try:
            datetime.fromisoformat(values["starting"] or values["added"])
        except ValueError as error:
            raise ValueError(f"{source} can't be read: {error}") from error
        return cls(config=config, **values)


@dataclass(frozen=True)
class QueueState:
    """The queue in figures."""

    num_waiting: int
    num_not_started: int
    paused: bool
    running: str | None
    """Id of the run that was started from the queue and goes on."""
    runner_alive: bool


class Queue:
    """The queue of one runs folder."""

    def __init__(self, runs_dir: str | Path = "runs") -> None:
        """Reads nothing yet, and makes nothing."""
        self.runs_dir = Path(runs_dir).expanduser().absolute()
        self.folder = self.runs_dir / ".queue"

    @property
    def log(self) -> Path:
        """What the runner did, with times."""
        return self.folder / "runner.log"

    def entries(self) -> tuple[Entry, ...]:
        """Those that wait, in their order, and then those that could not be started. A damaged file is left out."""
        found, _ = self._read_entries()
        order = [entry_id for entry_id in dict.fromkeys(self._state()["order"]) if entry_id in found]
        rest = sorted(
            (entry for entry_id, entry in found.items() if entry_id not in order), key=lambda each: each.added
        )
        together = [*(found[entry_id] for entry_id in order), *rest]
        return tuple(sorted(together, key=lambda entry: entry.error is not None))

    def state(self) -> QueueState:
        """The queue in figures, in a few milliseconds."""
        state, entries = self._state(), self.entries()
        waiting = [entry for entry in entries if entry.error is None]
        return QueueState(
            num_waiting=len(waiting),
            num_not_started=len(entries) - len(waiting),
            paused=bool(state["paused"]),
            running=self._running(state["running"]),
            runner_alive=self.runner_alive(),
        )

    def version(self) -> tuple[int, ...]:
        """Changes when entries or their order do, or it is paused; costs two looks at the disk."""
        found: list[int] = []
        for path in (self.folder / "entries", self.folder / "state.json"):
            try:
                stat = path.stat()
            except OSError:
                found += [0, 0]
            else:
                # Two changes within one tick of the clock differ in the file that took the other's place.
                found += [stat.st_mtime_ns, stat.st_ino]
        return tuple(found)

    def add(self, config: RunConfig, *, preset: str | None = None, even_if_too_large: bool = False) -> Entry:
        """Put a run at the end, and see to it that a runner is alive.

        Args:
            config: What to run; relative paths in it start in this process's working directory.
            preset: The preset that it was made from.
            even_if_too_large: Start it even if the plan says that it does not fit.

        Raises:
            PlanError: it can't be started on this machine; the plan is made again when its turn comes.
            ValueError: a field holds a secret, there is no such preset, or the folder can't be written.
        """
        refuse_secrets(config)
        if preset is not None:
            preset_config(preset)
        plan = make_plan(config)
        plan.raise_if_blocked()
        if not even_if_too_large:
            refuse_if_too_large(plan)
        entry = Entry(
            entry_id=f"{config.name}-{secrets.token_hex(3)}",
            name=config.name,
            config=config,
            preset=preset,
            added=utc_now(),
            working_dir=str(Path.cwd()),
            even_if_too_large=even_if_too_large,
        )
        with self.locked():
            self.write_entry(entry)
            state = self._state()
            self._write_state({**state, "order": [*state["order"], entry.entry_id]})
        self.ensure_runner()
        return entry

    def find(self, name: str) -> Entry:
        """An entry by its id, the unique beginning of one, or its run's name.

        Raises:
            ValueError: none, or several; the message names them.
        """
        entries = self.entries()
        for matches in (
            [entry for entry in entries if entry.entry_id == name],
            [entry for entry in entries if entry.name == name],
            [entry for entry in entries if name and entry.entry_id.startswith(name)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                several = ", ".join(entry.entry_id for entry in matches)
                raise ValueError(f"{len(matches)} entries are called {name!r}: {several}; write one of these")
        there = ", ".join(entry.entry_id for entry in entries) or "it is empty"
        raise ValueError(f"there is no entry {name!r} in the queue: {there}")

    def move(self, entry_id: str, place: int) -> None:
        """Put an entry at ``place`` of those that wait, counted from 0; beyond the ends it goes to the end.

        One that could not be started waits again from then on.

        Raises:
            ValueError: no such entry, or it is being started; the folder can't be written.
        """
        with self.locked():
            entry = self._changeable(entry_id)
            waiting = [entry.entry_id for entry in self.entries() if entry.error is None and entry.entry_id != entry_id]
            waiting.insert(max(0, place), entry_id)
            self._write_state({**self._state(), "order": waiting})
            if entry.error is not None:
                self.write_entry(dataclasses.replace(entry, error=None, starting=None))
        if entry.error is not None:
            self.ensure_runner()

    def remove(self, entry_id: str) -> None:
        """Take an entry out, also one that could not be started.

        Raises:
            ValueError: no such entry, or it is being started.
        """
        with self.locked():
            self._changeable(entry_id)
            self.drop(entry_id)

    def pause(self) -> None:
        """Start nothing more; what runs goes on."""
        with self.locked():
            self._write_state({**self._state(), "paused": True})

    def go_on(self) -> None:
        """Start the next one again."""
        with self.locked():
            self._write_state({**self._state(), "paused": False})
        self.ensure_runner()

    def ensure_runner(self) -> None:
        """Start a runner if something waits and none is alive.

        Raises:
            ValueError: the folder can't be written.
        """
        if not self.has_work():
            return
        with self.locked():
            if self.runner_alive():
                return
            with open(self.folder / "runner.lock", "ab") as lock, open(self.log, "ab") as log:
                if not _lock_soon(lock.fileno()):
                    return
                # The runner inherits the lock, so that there is one from this moment on and not when it has come up.
                command = [sys.executable, "-P", "-m", "qz3_widgets.launch.queue_runner", str(self.runs_dir)]
                process = subprocess.Popen(
                    [*command, str(lock.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=child_environment(),
                    pass_fds=(lock.fileno(),),
                )
            # Nobody here waits for it, and what has ended is to be reaped.
            threading.Thread(target=process.wait, name=f"qz3-reaper-{process.pid}", daemon=True).start()

    def runner_alive(self) -> bool:
        """Whether a runner works on this queue, on any machine that shares the folder's locks."""
        path = self.folder / "runner.lock"
        try:
            with open(path, "rb") as file:
                return not _try_lock(file.fileno(), shared=True)
        except OSError:
            return False

    def has_work(self) -> bool:
        """Whether something waits and may be started."""
        return not self._state()["paused"] and any(entry.error is None for entry in self.entries())

    # What follows is for the runner.

    def next(self) -> Entry | None:
        """The entry whose turn it is; none, if none waits or the queue is paused."""
        if self._state()["paused"]:
            return None
        return next((entry for entry in self.entries() if entry.error is None), None)

    def write_entry(self, entry: Entry) -> None:
        """Write an entry; the caller holds the lock."""
        file = self._entry_file(entry.entry_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, entry.to_json())

    def drop(self, entry_id: str) -> None:
        """Forget an entry; the caller holds the lock."""
        self._entry_file(entry_id).unlink(missing_ok=True)
        state = self._state()
        self._write_state({**state, "order": [each for each in state["order"] if each != entry_id]})

    def note_running(self, run_id: str | None) -> None:
        """Remember the run that was started last; the caller holds the lock."""
        self._write_state({**self._state(), "running": run_id})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the queue meanwhile.

        Raises:
            ValueError: the folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "ab") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                yield
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"the queue in {self.folder} can't be written: {reason}; make room or give yourself the right to "
                "write there, or choose another folder with --runs-dir or QZ3_RUNS_DIR"
            ) from error

    @contextmanager
    def runner_lock(self, inherited: int | None = None) -> Iterator[bool]:
        """Be the one runner; gives whether that is so.

        Args:
            inherited: The descriptor of the lock that :meth:`ensure_runner` took for the runner; closed at the end.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "runner.lock" if inherited is None else inherited, "ab") as file:
            yield _lock_soon(file.fileno())

    def _changeable(self, entry_id: str) -> Entry:
        entry = self._read_entries()[0].get(entry_id)
        if entry is None:
            raise ValueError(f"{entry_id} is no more in the queue; it was started or removed")
        if entry.starting is not None and entry.error is None:
            raise ValueError(f"{entry.name} is being started; stop the run instead")
        return entry

    def _entry_file(self, entry_id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry_id):
            raise ValueError(f"{entry_id!r} is no entry of the queue")
        return self.folder / "entries" / f"{entry_id}.json"

    def damaged(self) -> tuple[str, ...]:
        """Sentences about files in the queue that can't be read; it goes on without them."""
        problems = list(self._read_entries()[1])
        if (self.folder / "state.json").exists():
            try:
                read_json_object(self.folder / "state.json")
            except ValueError as error:
                problems.append(f"{error}; what waits is in the order in which it was added")
        return tuple(redact(problem) for problem in problems)

    def _read_entries(self) -> tuple[dict[str, Entry], list[str]]:
        """The entries by id, and what is wrong with other files."""
        found: dict[str, Entry] = {}
        problems = []
        for file in sorted((self.folder / "entries").glob("*.json")):
            try:
                entry = Entry.from_json(read_json_object(file), source=str(file))
            except ValueError as error:
                if file.exists():  # or it was started or removed just now
                    problems.append(str(error))
                continue
            if entry.entry_id == file.stem:
                found[entry.entry_id] = entry
            else:
                problems.append(f"{file} is a copy of the entry {entry.entry_id}; remove it")
        return found, problems

    def _state(self) -> dict[str, Any]:
        try:
            content = read_json_object(self.folder / "state.json")
        except ValueError:
            content = {}
        order = content.get("order")
        return {
            "order": [each for each in order if isinstance(each, str)] if isinstance(order, list) else [],
            "paused": content.get("paused") is True,
            "running": content.get("running") if isinstance(content.get("running"), str) else None,
        }

    def _write_state(self, state: Mapping[str, Any]) -> None:
        write_json_atomic(self.folder / "state.json", dict(state))

    def _running(self, run_id: str | None) -> str | None:
        if run_id is None or os.sep in run_id or not (self.runs_dir / run_id).is_dir():
            return None
        return None if Run(self.runs_dir / run_id).status.has_ended else run_id


def _try_lock(descriptor: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_soon(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while not (locked := _try_lock(descriptor)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return locked
