"""Rehearsals on the CPU: one process that is one rank of many, marked as such wherever it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.analysis.proof import prove
from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.io import save_config
from qz3_widgets.config.presets import preset
from qz3_widgets.config.shapes import read_shape
from qz3_widgets.launch.process import start
from qz3_widgets.plan.rehearsal import make_rehearsal
from qz3_widgets.runs.store import Run, list_runs
from tests.conftest import Qz3

from .real_runs import RUN_SECONDS, Runs, losses, succeed

FP32 = {
    # Some CPUs multiply bf16 matrices a hundred times slower than fp32 ones, in the backward pass.
    "training.precision": "fp32",
    "model.dtype": "float32",
    "quantization.bnb_4bit_compute_dtype": "float32",
    "quantization.bnb_4bit_quant_storage": "float32",
}


@pytest.fixture(scope="module")
def rehearsal(runs: Runs) -> Run:
    """Rank 1 of 4."""
    config = runs.config(
        name="tiny",
        model__load_strategy="auto",
        zero__stage3_param_persistence_threshold=100,
        # A rehearsal's data are made up, so these need not be there.
        data__source="/no/such/file.jsonl",
        data__eval_source=None,
    )
    plan = make_rehearsal(config, 4, rank=1, steps=2, arithmetic=True)
    plan.raise_if_blocked()
    return succeed(start(plan, runs_dir=runs.runs_dir))


def test_it_goes_through_the_training_code(rehearsal: Run) -> None:
    assert sorted(losses(rehearsal)) == [1, 2]
    trace = rehearsal.memory()
    assert list(trace.headers) == [1]
    phases = set(trace.frame["phase"])
    assert {"load", "attach", "engine", "step"} <= phases
    document = prove(rehearsal).to_json()
    assert [rank["rank"] for rank in document["ranks"]] == [1]
    assert document["ranks"][0]["held_share"] == pytest.approx(0.25, abs=0.01)
    assert document["zero3"]["partitioned_fraction"] == 1.0


def test_it_is_marked_everywhere(runs: Runs, rehearsal: Run, qz3: Qz3) -> None:
    assert rehearsal.run_id.startswith("rehearsal-tiny-")
    assert rehearsal.plan_json["rehearsal"] == {"rank": 1, "world_size": 4, "arithmetic": True}
    header = rehearsal.memory().headers[1]
    assert (header["rehearsal"], header["world_size"]) == (True, 4)
    metrics = json.loads(rehearsal.layout.metrics.read_text(encoding="utf-8").splitlines()[0])
    assert (metrics["rehearsal"], metrics["rank"]) == (True, 1)
    assert [run.run_id for run in list_runs(runs.runs_dir) if run.run_id == rehearsal.run_id]
    shown = qz3("show", rehearsal.layout.root, check=True).stdout
    assert "rehears" in shown.lower()
    listed = json.loads(qz3("runs", "--runs-dir", runs.runs_dir, "--json", check=True).stdout)
    [own] = [row for row in listed if row["run_id"] == rehearsal.run_id]
    assert "rehearsal of one rank" in own["proof"]["sentence"]
    log = rehearsal.layout.rank_log(1).read_text(encoding="utf-8")
    assert "step 2 of 2: " in log
    assert "without communication" in log
    assert "loss" not in log  # it would mean nothing


def test_there_is_nothing_to_keep_of_it(rehearsal: Run) -> None:
    assert rehearsal.adapter_dir is None
    assert not list(rehearsal.layout.checkpoints_dir.glob("*"))


def test_what_cant_be_rehearsed_is_said_at_once(qz3: Qz3, tmp_path: Path) -> None:
    config = tmp_path / "big.yaml"
    save_config(preset("llama-3.1-8b"), config)
    for options, message in (
        (["--world-size", "4", "--rank", "4"], "rank must be from 0 to 3, not 4"),
        (["--set=zero.zero_stage=2", "--set=zero.leaf_modules=none"], "only ZeRO-3 is rehearsed"),
        (["--layers", "33"], "has 32 layers, and @33 asks for 33"),
    ):
        done = qz3("rehearse", config, *options, timeout=RUN_SECONDS)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_405b_layer_by_its_presets_name_without_arithmetic(qz3: Qz3, tmp_path: Path) -> None:
    """Nothing is computed on a CPU, so the width of a model is no matter; three steps of the preset's own batches.

    The preset names the model by its hub id, and nothing is downloaded.
    """
    options = ["--world-size", "8", "--rank", "7", "--layers", "2", "--runs-dir", tmp_path, "--json"]
    done = qz3("rehearse", "llama-3.1-405b", *options, timeout=RUN_SECONDS)
    assert done.returncode == 0, done.stderr
    [run] = list_runs(tmp_path)
    assert run.plan_json["rehearsal"] == {"rank": 7, "world_size": 8, "arithmetic": False}
    assert run.config.model.name_or_path == "random:llama-3.1-405b@2"
    assert sorted(losses(run)) == [1, 2, 3]
    assert prove(run).ok
    listed = json.loads(qz3("runs", "--runs-dir", tmp_path, "--json", check=True).stdout)
    assert [each["run_id"] for each in listed] == [run.run_id]
    table = peaks(run.memory()).set_index("phase")
    # Two layers in 4 bit with their scales, embedding and head in 16 bit: an eighth of each.
    held = (2 * 3.19e9 * (0.5 + 1 / 64) + 2 * 128256 * 16384 * 2) / 8
    assert table.loc["load", "settled_bytes"] == pytest.approx(held, rel=0.03)
    assert table.loc["step", "peak_bytes"] > 4 * table.loc["load", "peak_bytes"]


def test_memory_is_the_same_without_arithmetic(tmp_path: Path) -> None:
    # Few words, so that the loss is small: its kernels for CPUs take memory that those for GPUs do not, and a rehearsal
    # without arithmetic is about GPUs.
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(read_shape("llama-3.2-1b") | {"vocab_size": 1024}))
    config = with_changes(
        preset("llama-3.1-8b"),
        {
            "model.name_or_path": f"random:{shape}",
            "data.max_length": 64,
            "training.per_device_train_batch_size": 1,
            "training.gradient_accumulation_steps": 1,
            "launch.device": "cpu",
        }
        | FP32,
    )
    plans = [make_rehearsal(config, 4, rank=1, steps=2, num_layers=1, arithmetic=given) for given in (True, False)]
    both = [start(plan, runs_dir=tmp_path) for plan in plans]
    computed, allocated = (peaks(succeed(run).memory()).set_index("phase") for run in both)
    for phase in ("load", "ready", "step"):
        # What quantizes on a CPU makes copies in fp32, which a GPU's kernel does not: the peak of the load is another.
        for name in ("settled_bytes",) if phase == "load" else ("settled_bytes", "peak_bytes"):
            # Kernels take temporary memory that nobody sees but the allocator.
            assert allocated.loc[phase, name] == pytest.approx(computed.loc[phase, name], rel=0.04), (phase, name)
