"""``qz3 render CONFIG DIR && bash DIR/launch.sh``: the same training without the package's help."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from qz3_widgets.config.io import save_config
from qz3_widgets.runs.store import Run
from tests.conftest import Qz3

from .real_runs import RUN_SECONDS, WARMUP, Runs, losses, processes_of, wait_for


def test_render_and_run_by_hand(runs: Runs, ways: dict[str, Run], qz3: Qz3, tmp_path: Path) -> None:
    measure = losses(ways["measure"])
    config = tmp_path / "my config.yaml"
    save_config(runs.config(name="by-hand", zero__zero_stage=2, **WARMUP), config)
    folder = tmp_path / "rendered here"
    rendered = qz3("render", config, folder)
    assert rendered.returncode == 0, rendered.stderr
    assert str(folder / "launch.sh") in rendered.stderr
    run = Run(folder)
    assert run.state == "pending"
    elsewhere = tmp_path / "some where else"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", str(folder / "launch.sh")],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.status.launched_by == "launch.sh"
    assert run.state == "succeeded"
    wait_for(lambda: not processes_of(folder), 5.0)
    assert list(elsewhere.iterdir()) == []
    assert "[rank 0] step 4 of 4: loss" in done.stdout
    assert losses(run) == pytest.approx({step: measure[step] for step in range(1, 5)}, abs=5e-3)
    assert run.adapter_dir is not None
    shown = json.loads(qz3("show", folder, "--json").stdout)
    assert (shown["state"], shown["num_steps"]) == ("succeeded", 4)
    again = qz3("render", config, folder)
    assert (again.returncode, again.stdout) == (2, "")
    assert "has been started; name a new folder" in again.stderr
