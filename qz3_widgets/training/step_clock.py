"""Where a step's seconds go: data, forward, backward, optimizer; on a GPU by its own clock, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch

Part = Literal["forward", "backward", "optimizer", "other"]

FIRST_SAMPLE, SAMPLE_EVERY = 3, 8
"""Steps in which :class:`WaitClock` measures."""


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
            seconds[name] = seconds.get(name, 0.0) + seconds_between(before, after, on_gpu=self._on_gpu)
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
        return moment(on_gpu=self._on_gpu)


class WaitClock:
    """Seconds in which the computing waits for gathered weights, in a few steps of many: sampled, and so cheap.

    The first sample is taken in step 3: the probes are at work in the first two.
    """

    def __init__(self, device: str) -> None:
        """``device``: ``"cuda"`` or ``"cpu"``."""
        self._on_gpu = device == "cuda"
        self._is_on = False
        self._laps: list[tuple[Any, Any]] = []
        self._coordinator: Any = None

    def begin_step(self, step: int) -> None:
        """Step number ``step`` begins, counted from 1."""
        self._laps = []
        self._is_on = step == FIRST_SAMPLE or step % SAMPLE_EVERY == 0
        if self._is_on and self._coordinator is not None:
            fetch = self._coordinator.fetch_sub_module

            @wraps(fetch)
            def timed_fetch(*args: Any, **kwargs: Any) -> Any:
                with self.waiting():
                    return fetch(*args, **kwargs)

            self._coordinator.fetch_sub_module = timed_fetch

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a place where what was gathered is waited for."""
        if not self._is_on:
            yield
            return
        begin = self._now()
        yield
        self._laps.append((begin, self._now()))

    def end_step(self) -> float | None:
        """Seconds of this step; ``None`` if it was no sample, or nothing is ever gathered."""
        if not self._is_on:
            return None
        self._is_on = False
        if self._coordinator is not None:
            self._coordinator.__dict__.pop("fetch_sub_module", None)
        laps, self._laps = self._laps, []
        return sum(seconds_between(*lap, on_gpu=self._on_gpu) for lap in laps) if laps else None

    def watch(self, engine: Any) -> None:
        """See what a ZeRO-3 engine of DeepSpeed fetches by itself: what is left to its own hooks."""
        offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
        coordinator = None if offload is None else offload.get_param_coordinator()
        if hasattr(coordinator, "fetch_sub_module"):
            self._coordinator = coordinator

    def _now(self) -> Any:
        return moment(on_gpu=self._on_gpu)


def moment(*, on_gpu: bool) -> Any:
    """Now: on a GPU in the order of its queue, as an event that nobody waits for."""
    if not on_gpu:
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Any, after: Any, *, on_gpu: bool) -> float:
    """Between two results of :func:`moment`; waits until the GPU has come to the second."""
    if not on_gpu:
        return float(after - before)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000
