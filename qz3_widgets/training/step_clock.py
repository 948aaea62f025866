"""Where a step's seconds go: data, forward, backward, optimizer; on a GPU by its own clock, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch

Part = Literal["forward", "backward", "optimizer", "other"]


class StepClock:
    """Laps of one optimizer step after another.

    A part's seconds go from the lap before it to its own, over all micro-batches. On a GPU the laps are events in its
    queue, which are read when the step's loss has been waited for anyway.
    """

    def __init__(self, device: str) -> None:
        """``device``: ``"cuda"`` or ``"cpu"``."""
        self._on_gpu = device == "cuda"
        self._laps: list[tuple[Part | None, Any]] = []
        self._data_seconds = 0.0

    def begin_step(self) -> None:
        """The first micro-batch is there."""
        self._laps = [(None, self._now())]

    def lap(self, part: Part) -> None:
        """What was done since the last lap was ``part``."""
        if self._laps:
            self._laps.append((part, self._now()))

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Around the fetching of a step's data, which comes before the step begins."""
        begin = time.monotonic()
        yield
        self._data_seconds += time.monotonic() - begin

    def end_step(self) -> dict[str, float]:
        """Seconds of each part that had a lap, under ``<part>_seconds``; ``data_seconds`` among them."""
        seconds = {"data_seconds": self._data_seconds}
        for (_, before), (part, after) in zip(self._laps, self._laps[1:], strict=False):
            name = f"{part}_seconds"
            seconds[name] = seconds.get(name, 0.0) + self._between(before, after)
        self._laps, self._data_seconds = [], 0.0
        return seconds

    def watch(self, engine: Any) -> None:
        """See the optimizer's turn of a DeepSpeed engine, which the Trainer takes for a part of the backward."""
        step = engine.step

        @wraps(step)
        def timed_step(*args: Any, **kwargs: Any) -> Any:
            self.lap("backward")
            result = step(*args, **kwargs)
            self.lap("optimizer")
            return result

        engine.step = timed_step

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before: Any, after: Any) -> float:
        if not self._on_gpu:
            return float(after - before)
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000
