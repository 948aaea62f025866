"""Laps of a step, on a clock that goes when it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qz3_widgets.training import step_clock
from qz3_widgets.training.step_clock import StepClock, WaitClock


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


class Coordinator:
    """Fetches in two seconds."""

    def __init__(self, time: Time) -> None:
        self.time = time

    def fetch_sub_module(self, module: str, forward: bool) -> str:
        self.time.passes(2)
        return f"{module} {forward}"


def engine_of(coordinator: Any) -> Any:
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    return SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=offload))


def test_waiting_is_sampled_in_few_steps(time: Time) -> None:
    waits = WaitClock("cpu")
    found = {}
    for step in range(1, 18):
        waits.begin_step(step)
        for seconds in (0.5, 0.25):
            with waits.waiting():
                time.passes(seconds)
        found[step] = waits.end_step()
    assert {step for step, seconds in found.items() if seconds is not None} == {3, 8, 16}
    assert found[3] == found[16] == 0.75


def test_where_nothing_is_gathered_there_is_no_figure(time: Time) -> None:
    waits = WaitClock("cpu")
    waits.begin_step(3)
    assert waits.end_step() is None


def test_what_deepspeed_fetches_by_itself_counts_and_is_left_as_it_was(time: Time) -> None:
    waits, coordinator = WaitClock("cpu"), Coordinator(time)
    waits.watch(engine_of(coordinator))
    waits.watch(SimpleNamespace(optimizer=None))  # another engine, without ZeRO-3, changes nothing
    waits.begin_step(3)
    assert coordinator.fetch_sub_module("layer", forward=True) == "layer True"
    with waits.waiting():
        time.passes(1)
    assert waits.end_step() == 3
    assert "fetch_sub_module" not in vars(coordinator)
    waits.begin_step(4)
    coordinator.fetch_sub_module("layer", forward=False)
    assert waits.end_step() is None
