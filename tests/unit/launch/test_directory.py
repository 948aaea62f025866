from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.io import load_config
from qz3_widgets.config.presets import preset
from qz3_widgets.launch import directory, process
from qz3_widgets.plan.issue import Issue
from qz3_widgets.plan.plan import Plan, PlanError
from qz3_widgets.runs.files import read_json_object
from qz3_widgets.runs.layout import is_run_directory
from qz3_widgets.runs.status import read_status
from qz3_widgets.runs.store import list_runs

from .conftest import plan_of, processes_of

REAL_FIND_TRAIN_SCRIPT = directory.find_train_script  # before the fixture puts a fake in its place


def test_a_new_directory_is_complete(plan: Plan, runs_dir: Path) -> None:
    layout = directory.create(plan, runs_dir, port=0)
    assert is_run_directory(layout.root)
    assert sorted(entry.name for entry in layout.root.iterdir()) == [
        "accelerate.yaml", "deepspeed.json", "launch.sh", "logs", "manifest.json", "plan.json", "probes", "run.yaml",
        "status.json", "trace",
    ]  # fmt: skip
    assert os.access(layout.launch_sh, os.X_OK)
    status = read_status(layout)
    assert (status.state, status.run_id, status.num_ranks) == ("pending", layout.root.name, 2)
    assert read_json_object(layout.plan_json)["world_size"] == 2
    assert load_config(layout.run_yaml) == plan.config
    accelerate = yaml.safe_load(layout.accelerate_yaml.read_text())
    assert accelerate["deepspeed_config"]["deepspeed_config_file"] == str(layout.deepspeed_json)


def test_run_yaml_tells_what_differs_from_the_preset() -> None:
    config = with_changes(preset("demo"), {"lora.r": 4, "lora.target_modules": ["q_proj"], "name": "2e-4"})
    content = yaml.safe_load(directory.run_yaml(config, "demo"))
    assert content["preset"] == "demo"
    assert content["given"] == {"name": "2e-4", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    assert content["resolved"]["lora"]["lora_alpha"] == 16


def test_names_never_collide(plan: Plan, runs_dir: Path) -> None:
    made: list[Path] = []
    makers = [
        threading.Thread(target=lambda: made.append(directory.create(plan, runs_dir, port=0).root)) for _ in range(6)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(set(made)) == 6
    assert len(list_runs(runs_dir)) == 6
    assert not [entry for entry in runs_dir.iterdir() if entry.name.startswith(".")]


def test_a_plan_with_errors_is_not_started(runs_dir: Path) -> None:
    blocked = Plan(**{**vars(plan_of()), "issues": (Issue("rule", "error", "lora.r", "is too large", None),)})
    with pytest.raises(PlanError, match=r"lora\.r"):
        process.start(blocked, runs_dir=runs_dir)
    assert not runs_dir.exists()


def test_a_runs_folder_that_is_a_file(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match="runs: it can't be written .*--runs-dir"):
        process.start(plan, runs_dir=tmp_path / "runs")
    with pytest.raises(ValueError, match="it can't be written"):
        process.start(plan, runs_dir=tmp_path / "runs" / "deeper")


def test_a_runs_folder_without_permission(plan: Plan, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="my runs: it can't be written .Permission denied."):
        process.start(plan, runs_dir=runs_dir)


def test_too_little_space(plan: Plan, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 5 * 2**20))
    with pytest.raises(ValueError, match="has 5.0 MiB free, and a run needs 200.0 MiB"):
        process.start(plan, runs_dir=runs_dir)
    assert list(runs_dir.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(plan: Plan, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directory, "write_status", full)
    with pytest.raises(ValueError, match="the disk is full; make room"):
        process.start(plan, runs_dir=runs_dir)
    assert list(runs_dir.iterdir()) == []
    assert not processes_of(runs_dir)


def test_a_port_in_use(runs_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"launch\.main_process_port: {port} is in use .* leave it empty"):
            process.start(plan_of(launch__main_process_port=port), runs_dir=runs_dir)
    assert not runs_dir.exists()


def test_no_secret_enters_a_run_directory(runs_dir: Path) -> None:
    plan = plan_of(data__source="https://me:s3cretword@example.org/data.jsonl")
    with pytest.raises(ValueError, match=r"data\.source: the value looks like it holds a secret") as caught:
        process.start(plan, runs_dir=runs_dir)
    assert "s3cretword" not in str(caught.value)
    assert list(runs_dir.iterdir()) == []


def test_render_into(plan: Plan, tmp_path: Path) -> None:
    layout = directory.render_into(plan, tmp_path / "a" / "r")
    assert read_status(layout).launched_by == "launch.sh"
    directory.render_into(plan_of(lora__r=4), layout.root)  # not started: may be made anew
    assert load_config(layout.run_yaml).lora.r == 4
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        directory.render_into(plan, foreign)
    with pytest.raises(ValueError, match="it can't be written"):
        directory.render_into(plan, foreign / "thesis.tex")


def test_the_train_script_in_a_checkout() -> None:
    root = Path(directory.__file__).parents[2]
    assert directory.package_root() == root
    assert REAL_FIND_TRAIN_SCRIPT() == root / "launchers" / "train_qlora.py"


def test_a_missing_train_script_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "__file__", str(tmp_path / "qz3_widgets" / "launch" / "directory.py"))
    with pytest.raises(ValueError, match=r"train_qlora\.py is neither at .*launchers.* nor at .*_launchers"):
        REAL_FIND_TRAIN_SCRIPT()
    installed = tmp_path / "qz3_widgets" / "_launchers" / "train_qlora.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert REAL_FIND_TRAIN_SCRIPT() == installed
