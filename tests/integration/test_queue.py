"""The queue with real training: two runs, one after the other, from the command."""

from __future__ import annotations

from pathlib import Path

from qz3_widgets.config.io import save_config
from qz3_widgets.launch.queue import Queue
from qz3_widgets.runs.store import list_runs, open_run
from tests.conftest import Qz3

from .real_runs import Runs, end, losses, wait_for


def test_two_runs_one_after_the_other(runs: Runs, qz3: Qz3, tmp_path: Path) -> None:
    """The command that queued them has long ended when they run; what could not start is in nobody's way."""
    runs_dir = tmp_path / "queued runs"
    queue, where = Queue(runs_dir), ("--runs-dir", runs_dir)
    short = {"training__max_steps": 2, "data__eval_source": None, "zero__zero_stage": 2}
    assert qz3("queue", "pause", *where).returncode == 0
    data = runs.folder / "gone soon.jsonl"
    data.write_bytes(runs.train.read_bytes())
    for name, source in (("first", runs.train), ("broken", data), ("second", runs.train)):
        file = tmp_path / f"{name}.yaml"
        save_config(runs.config(name=name, data__source=str(source), **short), file)
        added = qz3("queue", "add", file, *where)
        assert added.returncode == 0, added.stderr
    data.unlink()  # its plan was sound when it was queued
    assert not queue.runner_alive()
    assert qz3("queue", "go-on", *where).returncode == 0
    wait_for(lambda: queue.state().running is not None)
    first = open_run(str(queue.state().running), runs_dir)
    assert first.config.name == "first"
    assert queue.runner_alive()
    wait_for(lambda: [entry.name for entry in queue.entries()] == ["broken", "second"], 5.0)
    assert len(list_runs(runs_dir)) == 1
    end(first)
    wait_for(lambda: not queue.runner_alive())
    second, again = list_runs(runs_dir)
    assert again == first
    assert second.config.name == "second"
    end(second)
    for run in (first, second):
        assert run.state == "succeeded", run.tail_log(num_lines=60)
        assert set(losses(run)) == {1, 2}
    assert first.status.ended is not None
    assert second.status.started is not None
    assert first.status.ended <= second.status.started
    (left,) = queue.entries()
    assert left.name == "broken"
    assert left.error is not None
    assert "data.source" in left.error
    assert queue.state().running is None
