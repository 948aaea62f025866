"""SmolLM2-135M on real dialogues: what the demo does, in a few steps. A minute on two idle cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qz3_widgets.config.changes import with_changes
from qz3_widgets.demo import HELD_OUT, demo_configs, prepare_demo
from qz3_widgets.launch.process import start
from qz3_widgets.plan.plan import make_plan
from qz3_widgets.runs.store import Run

from .real_runs import Runs, losses, succeed

STEPS = 6


@pytest.fixture(scope="module")
def assets() -> Path:
    """The model's and the dialogues' folder, unpacked once on a machine."""
    return prepare_demo()


@pytest.fixture(scope="module")
def run(runs: Runs, assets: Path) -> Run:
    """The demo's second run, shortened."""
    config = with_changes(
        demo_configs(folder=assets)[1],
        {"training.max_steps": STEPS, "training.per_device_eval_batch_size": 8, "launch.device": "cpu"},
    )
    return succeed(start(make_plan(config), runs_dir=runs.runs_dir))


def test_it_learns(run: Run) -> None:
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1] - 0.3
    evaluations = run.metrics().query("event == 'eval'")
    assert evaluations["step"].tolist() == [0, STEPS]
    assert evaluations["eval_loss"].iloc[-1] < evaluations["eval_loss"].iloc[0] - 0.3


def test_plain_peft_makes_use_of_it(run: Run, assets: Path) -> None:
    """The adapter lowers the loss on dialogues that it has not seen, on the base in full precision."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (assets / HELD_OUT).read_text(encoding="utf-8").splitlines()][:12]
    folder = run.config.model.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = _loss(base, tokenizer, rows)
    assert run.adapter_dir is not None
    after = _loss(PeftModel.from_pretrained(base, run.adapter_dir), tokenizer, rows)
    assert after < before - 0.3


def _loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    found = []
    with torch.no_grad():
        for row in rows:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :128]
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(found) / len(found)
