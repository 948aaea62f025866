"""Whole runs with stand-ins for accelerate and the training script: seconds, and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qz3_widgets.launch import process as launch
from qz3_widgets.plan.plan import Plan
from qz3_widgets.runs.files import size_of
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.ranks import read_ranks
from qz3_widgets.runs.status import Status, read_status, resolve
from qz3_widgets.runs.store import Run, list_runs, open_run

from .conftest import plan_of, processes_of, wait_for

Behave = Callable[[str | dict[str, str]], None]


def _end_of(run: Run, seconds: float = 25.0) -> Status:
    wait_for(lambda: read_status(run.layout).has_ended, seconds)
    wait_for(lambda: not processes_of(run.layout.root), 5.0)
    return run.status


def _rank(run: Run, rank: int) -> psutil.Process:
    wait_for(lambda: rank in read_ranks(run.layout))
    identity = read_ranks(run.layout)[rank].process
    assert identity is not None
    found = identity.find()
    assert found is not None
    return found


def test_a_run_succeeds(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:4")
    run = launch.start(plan, runs_dir=runs_dir)
    assert run.state == "running"
    status = _end_of(run)
    assert (status.state, status.exit_code, status.failed_rank, status.error) == ("succeeded", 0, None, None)
    assert status.started is not None
    assert status.ended is not None
    assert status.started < status.ended
    assert not run.layout.stop_requested.exists()
    assert [entry.name for entry in runs_dir.iterdir()] == [run.run_id]


def test_an_exception_in_a_rank_is_the_error_of_the_run(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave({"all": "steps:1000", "1": "raise"})
    run = launch.start(plan, runs_dir=runs_dir)
    status = _end_of(run)
    assert (status.state, status.failed_rank, status.exit_code) == ("failed", 1, 1)
    assert status.error is not None
    assert status.error.startswith("ValueError: the data of rank 1 is bad")
    assert "Planted" not in run.layout.status_json.read_text()
    assert "Traceback" in run.layout.rank_log(1).read_text()


@pytest.mark.parametrize("others", ["steps:1000", "deaf"])
def test_a_killed_rank_ends_the_run_and_is_named(plan: Plan, runs_dir: Path, behave: Behave, others: str) -> None:
    behave({"0": others, "1": "steps:1000"})
    run = launch.start(plan, runs_dir=runs_dir)
    victim = _rank(run, 1)
    wait_for(lambda: all(size_of(run.layout.memory_trace(rank)) > 900 for rank in (0, 1)))
    killed = time.time()
    victim.kill()
    status = _end_of(run, 28.0)
    assert time.time() - killed < 28.0
    assert (status.state, status.failed_rank, status.signal) == ("failed", 1, "SIGKILL")
    assert status.error is not None
    assert status.error.startswith("killed by SIGKILL")
    assert status.failed_at is not None
    assert {rank: trace.outcome for rank, trace in read_ranks(run.layout).items()}[1] is None
    assert all(run.layout.memory_trace(rank).stat().st_size > 900 for rank in (0, 1))


def test_a_rank_that_dies_by_itself(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave({"0": "die", "1": "steps:1000"})
    status = _end_of(launch.start(plan, runs_dir=runs_dir))
    assert (status.state, status.failed_rank, status.signal) == ("failed", 0, "SIGKILL")


def test_a_rank_that_leaves_without_a_word(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave({"0": "exit:3", "1": "steps:1000"})
    status = _end_of(launch.start(plan, runs_dir=runs_dir))
    assert (status.state, status.failed_rank, status.signal) == ("failed", 0, None)
    assert status.error == "it ended with exit code 3"


def test_a_rank_that_fails_before_its_trace(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave({"0": "steps:1000", "1": "import"})
    status = _end_of(launch.start(plan, runs_dir=runs_dir))
    assert (status.state, status.failed_rank) == ("failed", 1)
    assert status.error == "ModuleNotFoundError: No module named 'torch'"


def test_a_killed_launcher_leaves_no_rank(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 1)
    group = read_status(run.layout).process_group
    assert group is not None
    os.kill(group, signal.SIGKILL)
    status = _end_of(run)
    assert status.state == "failed"
    assert status.error == "the launcher was killed by SIGKILL"


def test_what_the_ranks_started_goes_too(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("nursery")
    run = launch.start(plan, runs_dir=runs_dir)
    wait_for(lambda: len(_rank(run, 0).children()) == 1)
    child = _rank(run, 0).children()[0]
    _rank(run, 0).kill()
    _end_of(run)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_stop_gently(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    stopped = launch.stop(run.layout.root)
    assert stopped.status.state == "cancelled"
    assert "cancelled" in stopped.message
    wait_for(lambda: not processes_of(run.layout.root))  # the supervisor writes the end, and then goes
    assert {trace.outcome for trace in read_ranks(run.layout).values()} == {"cancelled"}
    again = launch.stop(run.layout.root)
    assert again.message == f"{run.run_id} has already ended: cancelled"


def test_stop_at_once(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    assert launch.stop(run.layout.root).status.state == "cancelled"
    wait_for(lambda: not processes_of(run.layout.root))  # the supervisor writes the end, and then goes


def test_stop_firmly(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("deaf")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    begin = time.monotonic()
    stopped = launch.stop(run.layout.root, grace_seconds=1.0)
    assert time.monotonic() - begin < 8.0
    assert stopped.status.state == "cancelled"
    wait_for(lambda: not processes_of(run.layout.root))  # the supervisor writes the end, and then goes


def test_stop_through_the_file_alone(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    run.layout.stop_requested.write_text('{"grace_seconds": 2}')
    assert _end_of(run).state == "cancelled"


def test_stop_does_no_harm_to_others(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:60")
    bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        first, second = (launch.start(plan, runs_dir=runs_dir) for _ in range(2))
        assert first.run_id != second.run_id
        _rank(first, 1)
        launch.stop(first.layout.root)
        assert second.state == "running"
        assert bystander.poll() is None
        assert _end_of(second).state == "succeeded"
        assert first.state == "cancelled"
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_that_reuses_a_number_is_left_alone(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    launch.stop(run.layout.root)
    bystander = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        # As if the supervisor and the launcher had died long ago and their numbers belonged to somebody else by now.
        status = read_status(run.layout).to_json()
        long_ago = {key: status[key] - 100 for key in ("pid_created", "launcher_created")}
        status |= {"state": "running", "pid": bystander.pid, "process_group": bystander.pid, **long_ago}
        run.layout.status_json.write_text(json.dumps(status))
        assert run.state == "cancelled"  # by the traces
        launch.stop(run.layout.root)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_without_its_supervisor_a_run_goes_on(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:40")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    pid = read_status(run.layout).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert run.state == "running"
    wait_for(lambda: run.state != "running")
    assert run.state == "succeeded"
    assert read_status(run.layout).state == "running"  # nobody was there to write it down


def test_everything_killed_is_lost(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("deaf")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    # The supervisor first, or it sees the others go and writes down how.
    os.kill(read_status(run.layout).pid or 0, signal.SIGKILL)
    for process in processes_of(run.layout.root):
        process.kill()
    wait_for(lambda: not processes_of(run.layout.root))
    # A process that is being torn down has lost its command line, by which it is found here, before it is gone.
    wait_for(lambda: run.state != "running")
    assert run.state == "lost"
    assert "without a result" in str(run.status.message)


def test_stop_without_a_supervisor(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave({"0": "steps:1000", "1": "deaf"})
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    os.kill(read_status(run.layout).pid or 0, signal.SIGKILL)
    stopped = launch.stop(run.layout.root, grace_seconds=1.0)
    assert stopped.status.state == "cancelled"
    wait_for(lambda: not processes_of(run.layout.root))  # the supervisor writes the end, and then goes
    assert run.state == "cancelled"


def test_stop_with_a_frozen_supervisor(
    plan: Plan, runs_dir: Path, behave: Behave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_CLEAN_UP_SECONDS", 1.0)
    behave("steps:1000")
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 0)
    os.kill(read_status(run.layout).pid or 0, signal.SIGSTOP)
    assert launch.stop(run.layout.root, grace_seconds=0.5).status.state == "cancelled"
    wait_for(lambda: not processes_of(run.layout.root))  # the supervisor writes the end, and then goes


def test_another_python_process_attaches_and_stops(plan: Plan, runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    code = f"""
        import sys, time
        sys.path[:0] = [{str(Path(__file__).parents[3])!r}]
        from qz3_widgets.launch.process import stop
        from qz3_widgets.runs.store import open_run
        run = open_run("latest", {str(runs_dir)!r})
        print(run.state, stop(run.layout.root).status.state)
    """
    run = launch.start(plan, runs_dir=runs_dir)
    _rank(run, 1)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["running", "cancelled"]
    assert run.state == "cancelled"


def test_a_run_outlives_who_started_it(runs_dir: Path, behave: Behave) -> None:
    behave("steps:30")
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parents[3])!r}]
        from pathlib import Path
        from qz3_widgets.launch import directory, process
        from tests.unit.launch.conftest import FAKES, plan_of
        directory.find_train_script = lambda: FAKES / "rank.py"
        process.start(plan_of(), runs_dir={str(runs_dir)!r})
        os.killpg(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run = open_run("latest", runs_dir)
    assert run.state == "running"
    assert _end_of(run).state == "succeeded"


def test_resume_goes_on_in_the_same_directory(runs_dir: Path, behave: Behave) -> None:
    behave("steps:1000")
    run = launch.start(plan_of(training__save_steps=1), runs_dir=runs_dir)
    _rank(run, 0)
    _rank(run, 1)
    with pytest.raises(ValueError, match="still running; stop it first"):
        launch.resume(run.layout.root)
    launch.stop(run.layout.root)
    with pytest.raises(ValueError, match=r"no checkpoint to resume from: training\.save_steps"):
        launch.resume(run.layout.root)
    shards = run.layout.checkpoints_dir / "checkpoint-2" / "global_step2"
    shards.mkdir(parents=True)
    for rank in (0, 1, 2):
        (shards / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="is incomplete"):
        launch.resume(run.layout.root)
    (shards.parent / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"launch\.num_processes is 2, but 3 ranks wrote"):
        launch.resume(run.layout.root)
    (shards / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    assert run.status.attempt == 1
    behave("steps:3")
    before = run.layout.memory_trace(0).read_bytes()
    assert launch.resume(run.layout.root) == run
    status = _end_of(run)
    assert (status.state, status.attempt, status.error) == ("succeeded", 2, None)
    assert run.layout.memory_trace(0).read_bytes().startswith(before)
    assert "--resume" in run.layout.rank_log(0).read_text()
    assert len(list_runs(runs_dir)) == 1


def test_launch_sh_alone(plan: Plan, tmp_path: Path, behave: Behave) -> None:
    from qz3_widgets.launch.directory import render_into

    behave("steps:20")
    layout = render_into(plan, tmp_path / "by hand" / "r1")
    assert resolve(layout).state == "pending"
    moved = RunLayout(layout.root.with_name("moved r2"))
    layout.root.rename(moved.root)
    process = subprocess.Popen(["bash", str(moved.launch_sh)], cwd="/", stdout=subprocess.DEVNULL)
    wait_for(lambda: len(read_ranks(moved)) == 2)
    assert resolve(moved).state == "running"
    assert process.wait() == 0
    assert resolve(moved).state == "succeeded"
    # Once more, by hand, and stopped from outside.
    process = subprocess.Popen(["bash", str(moved.launch_sh)], cwd="/", stdout=subprocess.DEVNULL)
    wait_for(lambda: resolve(moved).state == "running")
    assert launch.stop(moved.root).status.state == "cancelled"
    assert process.wait() == 1
    assert resolve(moved).state == "cancelled"
    wait_for(lambda: not processes_of(moved.root))  # the supervisor writes the end, and then goes


def test_a_launcher_that_cannot_start(
    plan: Plan, runs_dir: Path, behave: Behave, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZ3_PYTHON", "/nowhere/python")
    status = _end_of(launch.start(plan, runs_dir=runs_dir))
    assert (status.state, status.exit_code) == ("failed", 2)
    assert status.error == "launch.sh: there is no Python at /nowhere/python; name one in QZ3_PYTHON"


def test_a_supervisor_that_cannot_start_leaves_nothing(
    plan: Plan, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no bash
    with pytest.raises(ValueError, match="could not be started: .*bash"):
        launch.start(plan, runs_dir=runs_dir)
    assert list(runs_dir.iterdir()) == []
