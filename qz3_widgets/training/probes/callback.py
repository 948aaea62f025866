"""Where the Trainer calls the probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .probe import RankProbe


class ProbeCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the probe that the engine stands, that a step is over, and that training is."""

    def __init__(self, probe: RankProbe, *, engine: Callable[[], Any]) -> None:
        """``engine`` gives what the Trainer has wrapped the model in, once it has."""
        self._probe = probe
        self._engine = engine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine stands; there was no forward yet."""
        self._probe.ready(kwargs["model"], self._engine())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is over."""
        self._probe.step_ended()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last step is over."""
        self._probe.ended(kwargs["model"])
