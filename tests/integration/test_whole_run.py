"""Two whole runs of two ranks under ZeRO-3 with 4-bit weights, and everything that they leave behind."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.config.shapes import shape_file
from qz3_widgets.runs.checkpoints import list_checkpoints, num_processes_of
from qz3_widgets.runs.store import Run, list_runs
from qz3_widgets.trace.records import PHASES
from tests.conftest import Qz3

from .real_runs import Runs, losses

VOCABULARY = 2048
# The linear layers of tiny-llama: q, k, v, o, gate, up and down of two layers.
SHAPES = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]


@pytest.fixture(scope="module")
def random_model(runs: Runs) -> str:
    """Tiny, but with a vocabulary large enough for its sharding to weigh more than what the engine adds."""
    shape = json.loads(shape_file("tiny-llama").read_text(encoding="utf-8"))
    file = runs.folder / "shape.json"
    file.write_text(json.dumps({**shape, "vocab_size": VOCABULARY}), encoding="utf-8")
    return f"random:{file}"


@pytest.fixture(scope="module")
def plain(runs: Runs, random_model: str) -> Run:
    """Nothing but training: the measure of the others."""
    return runs.finished("plain", model__name_or_path=random_model, training__max_steps=6)


@pytest.fixture(scope="module")
def model_folder(runs: Runs, random_model: str) -> Path:
    """The same random model, as a folder with weights and a tokenizer."""
    from qz3_widgets.training.loading.base import BaseModel, model_class, random_sources
    from qz3_widgets.training.model import find_base
    from qz3_widgets.training.tokenizers import byte_tokenizer

    base: BaseModel = find_base(runs.config(model__name_or_path=random_model))
    state = {name: source.whole() for name, source in random_sources(base, torch.bfloat16).items()}
    model = model_class(base).from_pretrained(None, config=base.shape, state_dict=state, dtype=torch.bfloat16)
    folder = runs.folder / "tiny model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(runs: Runs, model_folder: Path) -> Run:
    """The same training, from a folder, with an evaluation before it and after each step, and with checkpoints."""
    return runs.finished(
        "evaluated",
        model__name_or_path=str(model_folder),
        training__max_steps=6,
        training__eval_on_start=True,
        training__eval_steps=1,
        training__save_steps=2,
        training__save_total_limit=2,
    )


def test_the_run_directory_is_complete(plain: Run) -> None:
    layout = plain.layout
    files = (
        layout.run_yaml, layout.plan_json, layout.manifest_json, layout.status_json, layout.accelerate_yaml,
        layout.deepspeed_json, layout.launch_sh, layout.launcher_log, layout.rank_log(0), layout.rank_log(1),
        layout.memory_trace(0), layout.memory_trace(1), layout.metrics,
    )  # fmt: skip
    assert [file.name for file in files if not file.is_file()] == []
    status = plain.status
    assert (status.exit_code, status.failed_rank, status.error) == (0, None, None)
    assert not layout.checkpoints_dir.exists() or not any(layout.checkpoints_dir.iterdir())
    assert [entry.name for entry in plain.layout.root.parent.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_tells_all_its_phases_in_order(plain: Run, rank: int) -> None:
    lines = [json.loads(line) for line in plain.layout.memory_trace(rank).read_text().splitlines()]
    header, *records, last = lines
    assert header["kind"] == "header"
    assert (header["rank"], header["world_size"], header["device"]) == (rank, 2, "cpu")
    assert header["source"] == "cpu-counting"
    assert header["capacity_bytes"] > 2**30
    assert (last["kind"], last["outcome"], last["error"]) == ("end", "succeeded", None)
    assert {record["kind"] for record in records} == {"memory"}
    times = [record["time_seconds"] for record in records]
    assert times == sorted(times)
    entered = [record["phase"] for record in records if record["event"] == "phase_begin"]
    # The data are read before the model, and tokenized after the adapter is there.
    assert entered == ["start", "data", "load", "attach", "data", "engine", "step", "eval", "step", "save"]
    assert set(entered) == set(PHASES)
    for before, after in pairwise(records):
        if after["event"] == "phase_begin":
            assert before["event"] == "phase_end"
            assert before["phase"] != after["phase"]
    # Samples all the while, about ten a second (a busy machine may make it fewer).
    assert sum(record["event"] == "sample" for record in records) > 2 * times[-1]
    steps = [record["step"] for record in records if record["event"] == "step_begin"]
    assert steps == [1, 2, 3, 4, 5, 6]
    for event in ("forward_end", "backward_end", "optimizer_begin", "step_end"):
        assert [record["step"] for record in records if record["event"] == event] == steps, event
    assert all(record["peak_allocated_bytes"] >= record["allocated_bytes"] for record in records)


def _bytes_of_model(folder: Path) -> tuple[int, int]:
    """Bytes of the 4-bit model that plain transformers loads: parameters alone, and with everything it holds."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    parameters = {parameter.data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    return sum(parameters.values()), sum(storages.values())


def test_stock_loading_leaves_the_whole_model_on_every_rank(evaluated: Run, model_folder: Path) -> None:
    parameters, whole = _bytes_of_model(model_folder)
    quantized = sum(rows * columns for rows, columns in SHAPES) // 2
    not_quantized = 2 * (2 * VOCABULARY * 64 + 5 * 64)  # embedding, head and norms in 16 bit
    assert parameters == quantized + not_quantized
    table = peaks(evaluated.memory()).set_index(["rank", "phase"])
    for rank in (0, 1):
        settled = int(table.loc[(rank, "load"), "settled_bytes"]) - int(table.loc[(rank, "start"), "settled_bytes"])
        # Counted to the byte, but for what the statistics' tables weigh when layers share them.
        assert whole <= settled <= whole + 4096
        assert table.loc[(rank, "load"), "peak_bytes"] > settled


def test_the_engine_shards_what_was_whole(evaluated: Run) -> None:
    table = peaks(evaluated.memory()).set_index(["rank", "phase"])["settled_bytes"]
    for rank in (0, 1):
        # Nearly half of it; the adapter, its optimizer's copy and the buckets came on top.
        assert table[rank, "ready"] < 0.75 * table[rank, "load"]
        assert table[rank, "step"] >= table[rank, "ready"]  # and the optimizer's state came
    # gloo's thread lets go of the adapter's gathering a moment after a step: at some step's end it is gone everywhere.
    frame = evaluated.memory().frame
    ends = frame[(frame["event"] == "step_end") & (frame["step"] > 1)].groupby("rank")["allocated_bytes"].min()
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


def test_metrics(plain: Run) -> None:
    frame = plain.metrics()
    steps, evaluations = frame[frame["event"] == "step"], frame[frame["event"] == "eval"]
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["max_steps"].unique().tolist() == [6]
    assert evaluations["step"].tolist() == [6]
    assert steps["learning_rate"].tolist() == [5e-3] * 6
    assert steps["num_tokens"].is_monotonic_increasing
    # Two ranks with two sequences of 96 tokens at most.
    assert 0 < steps["num_tokens"].iloc[0] <= 2 * 2 * 96
    assert (steps["step_seconds"] > 0).all()
    assert (steps["tokens_per_second"] > 0).all()
    assert (steps["grad_norm"] > 0).all()


def test_it_learns(plain: Run) -> None:
    found = losses(plain)
    assert found[1] == pytest.approx(math.log(VOCABULARY), abs=0.4)  # random weights know nothing
    assert found[6] < found[1] - 0.15


def test_an_evaluation_does_not_end_the_learning(plain: Run, evaluated: Run) -> None:
    """An eval-mode forward may repack 4-bit weights for a kernel that has no backward."""
    assert losses(evaluated) == pytest.approx(losses(plain), abs=2e-3)
    frame = evaluated.metrics()
    held_out = frame[frame["event"] == "eval"].drop_duplicates("step", keep="last")
    assert held_out["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    values = held_out["eval_loss"].tolist()
    assert values[-1] < values[0] - 0.15
    assert (frame[frame["event"] == "step"]["grad_norm"] > 0).all()
    assert values[-1] == pytest.approx(plain.metrics()["eval_loss"].iloc[-1], abs=2e-3)


def test_checkpoints_are_kept_as_asked(evaluated: Run) -> None:
    found = list_checkpoints(evaluated.layout)
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    assert [num_processes_of(path) for path in found] == [2, 2]
    assert (found[-1] / "adapter_model.safetensors").is_file()


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Mean loss over the batches that the run evaluates, as plain transformers computes it."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :96]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def test_plain_peft_loads_the_adapter(evaluated: Run, model_folder: Path, runs: Runs) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert evaluated.adapter_dir is not None
    weights = load_file(evaluated.adapter_dir / "adapter_model.safetensors")
    assert len(weights) == 2 * len(SHAPES)
    shapes = sorted(tuple(tensor.shape) for name, tensor in weights.items() if "lora_B" in name)
    assert shapes == sorted((rows, 4) for rows, _ in SHAPES)
    assert all(float(tensor.abs().max()) > 0 for tensor in weights.values())

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = _loss(base, tokenizer, runs.held_out_rows)
    after = _loss(PeftModel.from_pretrained(base, evaluated.adapter_dir), tokenizer, runs.held_out_rows)
    evaluations = evaluated.metrics().query("event == 'eval'")["eval_loss"]
    assert after < before - 0.15
    assert before == pytest.approx(evaluations.iloc[0], abs=0.05)
    assert after == pytest.approx(evaluations.iloc[-1], abs=0.05)


def test_the_adapter_names_its_base(evaluated: Run, model_folder: Path) -> None:
    assert evaluated.adapter_dir is not None
    content = json.loads((evaluated.adapter_dir / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(model_folder)
    assert sorted(path.name for path in evaluated.adapter_dir.iterdir() if path.suffix == ".bin") == []


def test_the_commands_read_it_back(plain: Run, evaluated: Run, runs: Runs, qz3: Qz3, tmp_path: Path) -> None:
    where = ("--runs-dir", runs.runs_dir)
    listed = qz3("runs", "--json", *where)
    assert listed.returncode == 0, listed.stderr
    assert {row["run_id"] for row in json.loads(listed.stdout)} == {run.run_id for run in list_runs(runs.runs_dir)}

    shown = json.loads(qz3("show", plain.run_id, "--json", *where).stdout)
    assert (shown["state"], shown["num_steps"], shown["world_size"]) == ("succeeded", 6, 2)
    assert [rank["rank"] for rank in shown["ranks"]] == [0, 1]
    assert {"load", "ready", "step", "eval", "save"} <= shown["ranks"][0]["phases"].keys()
    assert shown["last_loss"] < shown["first_loss"]
    assert shown["tokens_per_second"] > 0

    compared = json.loads(qz3("compare", "plain", evaluated.run_id, "--json", *where).stdout)
    assert set(compared) >= {"config_diff", "metrics", "directions"}
    assert "training.eval_on_start" in compared["config_diff"]
    assert compared["directions"]["eval_loss_after"] == "lower"

    report = tmp_path / "report.html"
    exported = qz3("export", plain.run_id, evaluated.run_id, report, *where)
    assert exported.returncode == 0, exported.stderr
    assert report.stat().st_size > 10_000
