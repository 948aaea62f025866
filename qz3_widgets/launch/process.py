"""Starting, resuming and stopping runs. Everything that has to last is on disk: any Python process may call these."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.alive import ProcessId, known_process, this_host
from ..runs.checkpoints import resumable_checkpoint
from ..runs.files import size_of, write_json_atomic
from ..runs.layout import RunLayout
from ..runs.ranks import read_ranks
from ..runs.status import Status, read_status, resolve, utc_now, write_status
from ..runs.store import Run
from .directory import child_environment, create
from .tree import ProcessTree

if TYPE_CHECKING:
    from ..config.schema import LaunchSection
    from ..plan.plan import Plan

_START_SECONDS = 30.0  # for the supervisor to come up; it takes 0.3 on an idle machine
_CLEAN_UP_SECONDS = 15.0  # that the supervisor may need after the grace time


@dataclasses.dataclass(frozen=True)
class Stopped:
    """What :func:`stop` did."""

    status: Status
    message: str  # one sentence for people


def start(plan: Plan, *, runs_dir: str | Path = "runs", preset: str | None = None) -> Run:
    """Start ``plan`` as processes that outlive this one, and return the run at once.

    Args:
        plan: a checked configuration; see ``make_plan``.
        runs_dir: where the run directory is made.
        preset: the name of the preset that the configuration was made from; ``run.yaml`` then tells the differences.

    Raises:
        PlanError: the plan holds errors.
        ValueError: the folder can't be written or is full, the port is taken, or the processes did not come up. Nothing
            that looks like a run is left behind.
    """
    plan.raise_if_blocked()
    port = choose_port(plan.config.launch)
    layout = create(plan, Path(runs_dir), port=port, preset=preset)
    try:
        _start_supervisor(layout, [])
    except BaseException:
        shutil.rmtree(layout.root, ignore_errors=True)
        raise
    return Run(layout)


def resume(run_dir: str | Path) -> Run:
    """Go on from the newest checkpoint of a run that has ended, in the same directory.

    Logs and traces are continued, and nothing in them is lost; ``status.json`` counts the attempts.

    Raises:
        ValueError: the run has not ended, there is no usable checkpoint, or another number of ranks wrote it.
    """
    layout = RunLayout(Path(run_dir).absolute())
    before = resolve(layout)
    if not before.has_ended:
        first = "it was never started" if before.state == "pending" else "it is still running; stop it first"
        raise ValueError(f"{layout.run_id} can't be resumed: {first}")
    launch = Run(layout).config.launch
    resumable_checkpoint(layout, launch.num_processes)
    choose_port(launch)
    with contextlib.suppress(FileNotFoundError):
        layout.stop_requested.unlink()
    again = Status(
        run_id=before.run_id,
        state="pending",
        created=before.created,
        attempt=before.attempt + 1,
        num_ranks=before.num_ranks or launch.num_processes // launch.num_machines,
    )
    write_status(layout, again)
    try:
        _start_supervisor(layout, ["--resume"])
    except BaseException:
        write_status(layout, before)
        raise
    return Run(layout)


def stop(run_dir: str | Path, grace_seconds: float = 10.0) -> Stopped:
    """Stop a run: its ranks are asked to end, and killed after ``grace_seconds``. Nothing else is touched.

    Works from any process on the run's host, also if the supervisor is gone; from another host that shares the
    directory the supervisor is asked through a file. A run that has ended is left as it is, and the message says so.

    Raises:
        ValueError: no run there, or it runs on another host and did not react.
    """
    layout = RunLayout(Path(run_dir).absolute())
    read_status(layout)  # or there is nothing to stop
    status = resolve(layout)
    if status.has_ended:
        return Stopped(status, f"{layout.run_id} has already ended: {status.state}")
    if status.state == "pending" and status.launched_by == "launch.sh":
        return Stopped(status, f"{layout.run_id} was never started")
    write_json_atomic(layout.stop_requested, {"grace_seconds": grace_seconds, "requested": utc_now()})
    supervisor = known_process(status.pid, status.pid_created)
    elsewhere = status.host is not None and status.host != this_host()
    process = None if supervisor is None or elsewhere else supervisor.find()
    if process is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGTERM)
    # A supervisor that is just starting, or on another host, sees the file.
    starting = status.pid is None and status.launched_by == "supervisor"
    if process is not None or elsewhere or starting:
        deadline = time.monotonic() + grace_seconds + _CLEAN_UP_SECONDS
        _wait_until(lambda: _ended(layout) or (process is not None and not process.is_running()), deadline)
        status = read_status(layout)
        if status.has_ended:
            return Stopped(status, f"{layout.run_id} has ended: {status.state}")
    if elsewhere:
        raise ValueError(f"{layout.run_id} runs on {status.host} and has not reacted; stop it there")
    return _stop_without_supervisor(layout, status, supervisor, grace_seconds)


def choose_port(launch: LaunchSection) -> int:
    """The configured main port, or 0: on one machine the launcher then gets a free one without a race.

    Raises:
        ValueError: the configured port is in use here.
    """
    port = launch.main_process_port
    if port is None:
        return 0
    if launch.machine_rank == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                hint = "leave it empty for a free one" if launch.num_machines == 1 else "choose another one"
                raise ValueError(f"launch.main_process_port: {port} is in use on this machine; {hint}") from error
    return port


def _start_supervisor(layout: RunLayout, arguments: list[str]) -> None:
    """Start the supervisor in a session of its own and wait until it has taken over.

    Raises:
        ValueError: it has not; its processes are gone.
    """
    begin = size_of(layout.supervisor_log)
    # -P: a file in the current folder must not stand in for a module of the same name.
    command = [sys.executable, "-P", "-m", "qz3_widgets.launch.supervisor", str(layout.root), *arguments]
    with open(layout.supervisor_log, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=child_environment()
        )
    identity = ProcessId.of(process.pid)
    # Reaps it whenever it ends; a thread, because nobody here waits for a run.
    threading.Thread(target=process.wait, name=f"qz3-reaper-{process.pid}", daemon=True).start()
    taken_over = False
    try:
        deadline = time.monotonic() + _START_SECONDS
        _wait_until(lambda: read_status(layout).state != "pending" or process.returncode is not None, deadline)
        taken_over = read_status(layout).pid is not None
    finally:
        if not taken_over and identity is not None:
            ProcessTree([identity]).terminate(grace_seconds=_CLEAN_UP_SECONDS)
    if not taken_over:
        with open(layout.supervisor_log, "rb") as log:
            log.seek(begin)
            told = log.read()[-2000:].decode("utf-8", errors="replace").strip()
        reason = read_status(layout).error or (told.splitlines()[-1] if told else "no word from its supervisor")
        raise ValueError(f"{layout.run_id} could not be started: {reason}")


def _stop_without_supervisor(
    layout: RunLayout, status: Status, supervisor: ProcessId | None, grace_seconds: float
) -> Stopped:
    """End what is left of a run whose supervisor is gone or does not react."""
    launcher = known_process(status.process_group, status.launcher_created)
    ranks = [trace.process for trace in read_ranks(layout).values() if trace.host == this_host()]
    tree = ProcessTree(process for process in (supervisor, launcher, *ranks) if process is not None)
    left = tree.terminate(0.0 if supervisor is not None and supervisor.is_alive() else grace_seconds)
    with contextlib.suppress(FileNotFoundError):
        layout.stop_requested.unlink()
    if left:
        numbers = ", ".join(str(process.pid) for process in left)
        return Stopped(resolve(layout), f"{layout.run_id}: not even SIGKILL ended the processes {numbers}")
    found = resolve(layout)
    if found.state == "succeeded":
        return Stopped(found, f"{layout.run_id} had just ended: succeeded")
    ended = dataclasses.replace(status, state="cancelled", ended=utc_now(), message="stopped on request")
    write_status(layout, ended)
    return Stopped(ended, f"{layout.run_id} has ended: cancelled")


def _ended(layout: RunLayout) -> bool:
    status = read_status(layout)
    supervisor = known_process(status.pid, status.pid_created)
    # Its last act after the status is to remove the request; a moment later it is gone.
    if status.host == this_host() and supervisor is not None and supervisor.is_alive():
        return False
    return status.has_ended


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.03)
    return True
