"""Laps of a step, on a clock that goes when it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qz3_widgets.training import step_clock
from qz3_widgets.training.step_clock import StepClock


class Time:
    """Seconds that pass by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(step_clock.time, "monotonic", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_parts_add_up_over_micro_batches(time: Time) -> None:
    clock = StepClock("cpu")
    with clock.fetching():
        time.passes(0.5)
    clock.begin_step()
    for _ in range(2):
        time.passes(1)
        clock.lap("forward")
        time.passes(2)
        clock.lap("backward")
    time.passes(0.25)
    clock.lap("other")
    time.passes(0.75)
    clock.lap("optimizer")
    assert clock.end_step() == pytest.approx(
        {
            "data_seconds": 0.5,
            "forward_seconds": 2,
            "backward_seconds": 4,
            "other_seconds": 0.25,
            "optimizer_seconds": 0.75,
        }
    )


def test_steps_do_not_mix(time: Time) -> None:
    clock = StepClock("cpu")
    clock.begin_step()
    time.passes(1)
    clock.lap("forward")
    clock.end_step()
    clock.lap("forward")  # of an evaluation in between
    clock.begin_step()
    time.passes(3)
    clock.lap("forward")
    assert clock.end_step() == {"data_seconds": 0.0, "forward_seconds": 3}


def test_the_engines_own_step_is_the_optimizers(time: Time) -> None:
    """DeepSpeed takes its step inside what the Trainer calls the backward."""
    clock = StepClock("cpu")
    calls: list[Any] = []

    def step(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        time.passes(5)
        return "done"

    engine = SimpleNamespace(step=step)
    clock.watch(engine)
    clock.begin_step()
    time.passes(1)
    clock.lap("forward")
    time.passes(2)
    assert engine.step(1, lr=2) == "done"
    clock.lap("backward")
    clock.lap("optimizer")
    found = clock.end_step()
    assert (found["forward_seconds"], found["backward_seconds"], found["optimizer_seconds"]) == (1, 2, 5)
    assert calls == [((1,), {"lr": 2})]


def test_a_step_without_laps_has_only_its_data() -> None:
    assert StepClock("cpu").end_step() == {"data_seconds": 0.0}
