"""Which steps are profiled, and that the file is a trace of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from qz3_widgets.training.profiler import ProfileCallback


def train(path: Path, num_steps: int, max_steps: int, done: int = 0, *, ends_at: int | None = None) -> list[str]:
    """Go through the steps of a training; step K multiplies matrices of K+1 rows. Returns what was said."""
    said: list[str] = []
    callback = ProfileCallback(path, num_steps, "cpu", said.append)
    args, control = TrainingArguments(output_dir=str(path.parent), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=max_steps, global_step=done)
    callback.on_train_begin(args, state, control)
    for step in range(done + 1, (ends_at or max_steps) + 1):
        callback.on_step_begin(args, state, control)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(step + 1, 2) @ torch.ones(2, 2)
        state.global_step = step
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    return said


def steps_in(path: Path) -> list[int]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {str(event.get("name")) for event in events}
    return sorted(int(name.removeprefix("step ")) for name in names if name.startswith("step "))


@pytest.mark.parametrize(
    "num_steps, max_steps, done, expected",
    [(2, 10, 0, [4, 5]), (3, 4, 0, [2, 3, 4]), (1, 1, 0, [1]), (9, 2, 0, [1, 2]), (2, 10, 5, [9, 10])],
)
def test_the_steps_after_the_warm_up_or_the_last(
    tmp_path: Path, num_steps: int, max_steps: int, done: int, expected: list[int]
) -> None:
    path = tmp_path / "profile.json.gz"
    said = train(path, num_steps, max_steps, done)
    assert steps_in(path) == expected
    assert [str(path) in line for line in said] == [True]


def test_an_early_end_leaves_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "profile.json.gz"
    train(path, 5, 20, ends_at=6)
    assert steps_in(path) == [4, 5, 6]


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    (said,) = train(tmp_path / "nowhere" / "profile.json.gz", 1, 2)
    assert "can't be written" in said
