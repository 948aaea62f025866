"""Other ways to train: each must run, and where the arithmetic is the same, so must be the losses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from qz3_widgets.analysis.summary import summarize
from qz3_widgets.config.io import save_config
from qz3_widgets.runs.store import Run, open_run
from tests.conftest import Qz3

from .real_runs import WARMUP, Runs, losses, succeed

NOISE = 5e-3  # bf16 has eight bits, and sums are taken in another order


@pytest.fixture(scope="module")
def measure(ways: dict[str, Run]) -> dict[int, float]:
    """Losses of the run that the others differ from in one thing: ZeRO-3, non-reentrant checkpointing."""
    return first_losses(ways["measure"])


def first_losses(run: Run) -> dict[int, float]:
    """Losses of the first four steps."""
    found = losses(run)
    return {step: found[step] for step in range(1, 5)}


@pytest.mark.parametrize("mode", ["reentrant", "none"])
def test_checkpointing_does_not_change_the_losses(ways: dict[str, Run], measure: dict[int, float], mode: str) -> None:
    assert ways[mode].config.training.activation_checkpointing == mode
    assert first_losses(ways[mode]) == pytest.approx(measure, abs=NOISE)


def test_without_deepspeed_from_the_command(runs: Runs, measure: dict[int, float], qz3: Qz3, tmp_path: Path) -> None:
    """Plain data parallel; ``qz3 run`` follows it with a line for each change where there is no terminal."""
    config = tmp_path / "by hand.yaml"
    save_config(runs.config(**WARMUP), config)
    sets = ("--set", "zero.zero_stage=0", "--set", "name=ddp")
    done = qz3("run", config, *sets, "--runs-dir", runs.runs_dir, "--json", timeout=180.0)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    run = open_run(summary["run_id"], runs.runs_dir)
    assert summary["state"] == "succeeded"
    assert first_losses(run) == pytest.approx(measure, abs=NOISE)
    assert not run.layout.deepspeed_json.exists()
    lines = done.stderr.splitlines()
    assert f"run {run.run_id} in" in done.stderr
    assert any(line.startswith("starting the ranks") for line in lines)
    # Four steps of a tiny model may be over between two looks; the last line tells of them all the same.
    assert lines[-1].startswith("succeeded: step 4 of 4, loss ")
    assert not any(line != line.strip() or "\x1b" in line or "\r" in line for line in lines), lines


def test_two_runs_at_once(runs: Runs, tmp_path: Path) -> None:
    """Both started in one moment: neither waits for the other's port. One packs a CSV, one reads Parquet."""
    pairs = [
        {"prompt": row["messages"][0]["content"], "completion": " " + row["messages"][1]["content"]}
        for row in runs.train_rows
    ]
    table = tmp_path / "a table.csv"
    pd.DataFrame({"text": [pair["prompt"] + pair["completion"] for pair in pairs]}).to_csv(table, index=False)
    columns = tmp_path / "columns.parquet"
    pd.DataFrame(pairs).to_parquet(columns)
    packed = runs.start(
        name="packed",
        data__source=str(table),
        data__eval_source=None,
        data__eval_fraction=0.1,
        data__max_length=256,
        data__packing=True,
    )
    pair = runs.start(
        name="pairs",
        data__source=str(columns),
        data__eval_source=None,
        data__eval_fraction=0.1,
        data__loss_on="completion",
        quantization__bnb_4bit_quant_type="fp4",
    )
    for run in (packed, pair):
        succeed(run)
        found = losses(run)
        assert sorted(found) == [1, 2, 3, 4]
        assert found[4] < found[1]
    # One example has some 70 bytes, and a packed sequence holds three.
    per_step = {run.run_id: run.metrics()["num_tokens"].iloc[0] for run in (packed, pair)}
    assert per_step[packed.run_id] > 2 * per_step[pair.run_id]


def test_a_profile_on_request(ways: dict[str, Run]) -> None:
    run = ways["none"]
    for rank in (0, 1):
        with gzip.open(run.layout.profile(rank), "rt") as file:
            names = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
        assert any("allgather" in name or "all_gather" in name for name in names)
    assert not ways["measure"].layout.profile(0).exists()


def test_where_the_time_went_is_on_record(ways: dict[str, Run]) -> None:
    summary = summarize(ways["measure"])
    parts = summary["step_parts"]
    assert {"data", "forward", "backward", "optimizer"} == set(parts)
    # Two sampled steps of ten, the third and the eighth; a rank waits within its forward and its backward.
    waits = ways["measure"].metrics().query("event == 'step'").set_index("step")["gather_wait_seconds"].dropna()
    assert list(waits.index) == [3, 8]
    assert 0 < summary["gather_wait_seconds"] < summary["step_seconds"]
    assert summary["tokens_per_second_per_device"] == pytest.approx(summary["tokens_per_second"] / 2)
    assert summary["model_flops_utilization"] is None  # nobody knows what a CPU can do
    assert summary["chosen"]["gathered_layers"] == 2


def test_the_loss_counts_what_was_asked_for(ways: dict[str, Run], measure: dict[int, float]) -> None:
    run = ways["assistant"]
    found = losses(run)
    assert found[4] < found[1]
    assert found[1] != pytest.approx(measure[1], abs=1e-6)  # other tokens count
    weights = load_file(run.layout.adapter_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
