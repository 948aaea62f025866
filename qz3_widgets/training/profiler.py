"""A torch profiler trace of a few steps, on request: what ran when, on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARM_UP = 3
"""Steps that are left out, if the run has more: the first ones allocate, compile and learn the order of the layers."""


class ProfileCallback(TrainerCallback):  # type: ignore[misc]
    """Profiles ``num_steps`` steps and writes them to ``path``, gzipped: Perfetto and chrome://tracing open it."""

    def __init__(self, path: Path, num_steps: int, device: str, say: Callable[[str], None]) -> None:
        """``say`` prints on one rank."""
        self._path, self._num_steps, self._say = path, num_steps, say
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profile: Any = None
        self._left = 0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the steps: after the warm-up, or the last ones of a short run."""
        done = int(state.global_step)
        self._first = done + max(1, min(WARM_UP + 1, state.max_steps - done - self._num_steps + 1))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the first of them."""
        if self._profile is None and state.global_step + 1 == self._first:
            self._left = self._num_steps
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write after the last of them."""
        if self._profile is not None:
            self._left -= 1
            if self._left <= 0 or state.global_step >= state.max_steps:
                self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The training was ended early: write what there is."""
        if self._profile is not None:
            self._write()

    def _write(self) -> None:
        profiled, self._profile, self._first = self._profile, None, 0
        profiled.stop()
        try:
            profiled.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # a full disk must not end the training
            self._say(f"the profile can't be written: {error}")
            return
        self._say(f"a profile of {self._num_steps} steps is in {self._path}: ui.perfetto.dev shows it")
