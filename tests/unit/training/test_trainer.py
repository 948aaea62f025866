"""What the recording callback writes down of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from qz3_widgets.trace.records import TraceWriter
from qz3_widgets.training.step_clock import StepClock, WaitClock
from qz3_widgets.training.trainer import RecordingCallback


def _num_tokens(folder: Path, history: list[dict[str, Any]], *counts: int) -> tuple[list[int], list[float]]:
    """Log steps with TRL's ``counts`` behind a checkpoint's ``history``: what is recorded, and kept for the next."""
    path = folder / "metrics.jsonl"
    writer = TraceWriter(path, {})
    callback = RecordingCallback(None, writer, StepClock("cpu"), WaitClock("cpu"), logging_steps=1)  # type: ignore[arg-type]
    args, control = TrainingArguments(output_dir=str(folder), use_cpu=True), TrainerControl()
    state = TrainerState(log_history=[dict(entry) for entry in history], max_steps=10)
    callback.on_train_begin(args, state, control)
    for count in counts:
        logs = {"loss": 1.0, "num_tokens": float(count)}
        state.global_step += 1
        state.log_history.append(dict(logs))
        callback.on_log(args, state, control, logs=logs)
    writer.close()
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [record["num_tokens"] for record in records], [entry["num_tokens"] for entry in state.log_history[-2:]]


def test_tokens_are_counted_from_the_start(tmp_path: Path) -> None:
    assert _num_tokens(tmp_path, [], 100, 210) == ([100, 210], [100.0, 210.0])


def test_a_resumed_run_goes_on_counting_tokens(tmp_path: Path) -> None:
    history = [{"loss": 2.0, "num_tokens": 300.0}, {"eval_loss": 2.0}]
    assert _num_tokens(tmp_path, history, 100, 210) == ([400, 510], [400.0, 510.0])
