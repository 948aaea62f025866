"""Start small, scale up: the same model with few layers, rehearsed and measured, and extrapolated to its full depth.

So a new architecture is held against the memory model in minutes, before a large machine is rented.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .analysis.memory import peaks
from .config.schema import RunConfig
from .launch.process import start
from .plan.capabilities import Capabilities
from .plan.memory import PHASES, STATED_ERROR, Forecast, forecast
from .plan.plan import Plan
from .plan.rehearsal import make_rehearsal
from .plan.shapes import ModelShape, model_shape
from .runs.store import Run

DEFAULT_RUNGS = (2, 4)
# The pool of random weights is made in fp32 first: nothing for a model that is worth a ladder, much for a tiny one.
_SLACK_BYTES = 4 * 2**20
_POLL_SECONDS = 0.5
_FIGURES = ("settled_bytes", "peak_bytes")


@dataclass(frozen=True)
class Height:
    """One figure of one phase."""

    phase: str
    figure: str  # "settled_bytes" or "peak_bytes"
    predicted_bytes: int
    measured_bytes: int  # of a rung; of the full depth it is extrapolated

    @property
    def relative(self) -> float:
        """How far it is from the prediction, as a part of it."""
        return (self.measured_bytes - self.predicted_bytes) / max(1, self.predicted_bytes)

    @property
    def ok(self) -> bool:
        """Whether that is within the stated error."""
        allowed = STATED_ERROR[self.figure.partition("_")[0]] * self.predicted_bytes + _SLACK_BYTES
        return abs(self.measured_bytes - self.predicted_bytes) <= allowed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "phase": self.phase,
            "figure": self.figure,
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "relative": self.relative,
            "ok": self.ok,
        }


@dataclass(frozen=True)
class Rung:
    """The model with so many layers."""

    num_layers: int
    heights: tuple[Height, ...]
    run_id: str | None  # None: extrapolated
    problem: str | None = None  # why nothing was measured

    @property
    def ok(self) -> bool:
        """Whether all of it is as predicted."""
        return self.problem is None and all(height.ok for height in self.heights)

    @property
    def worst(self) -> Height | None:
        """The figure that is farthest from its prediction."""
        return max(self.heights, key=lambda height: abs(height.relative), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "num_layers": self.num_layers,
            "ok": self.ok,
            "run_id": self.run_id,
            "extrapolated": self.run_id is None and self.problem is None,
            "problem": self.problem,
            "figures": [height.to_json() for height in self.heights],
        }


def climb(
    config: RunConfig,
    world_size: int,
    *,
    runs_dir: Path,
    rungs: Sequence[int] = DEFAULT_RUNGS,
    capabilities: Capabilities | None = None,
    measure: Callable[[Plan, Path], Run] | None = None,
) -> Iterator[Rung]:
    """Rung by rung: rehearse, compare, go on if it is as predicted; the last one, of full depth, is extrapolated.

    Args:
        config: the run; its model's shape must be known.
        world_size: ranks to pretend.
        runs_dir: where the rehearsals lie.
        rungs: numbers of layers, two at least, each more than the one before.
        capabilities: this machine, if it is known already.
        measure: runs a plan to its end; a test puts something else here.

    Raises:
        ValueError: the shape is not known, ZeRO-3 is off, or ``rungs`` are no ladder for this model.
    """
    whole = model_shape(config)
    depth = whole.num_layers
    ordered = [number for number in rungs if number < depth]
    if len(rungs) < 2 or list(rungs) != sorted(set(rungs)) or rungs[0] < 1:
        raise ValueError(f"rungs must be two numbers of layers or more, each above the one before, not {list(rungs)}")
    if len(ordered) < 2:
        raise ValueError(f"model.name_or_path: it has {depth} layers, too few for the rungs {list(rungs)}")
    done: list[Rung] = []
    full: Forecast | None = None
    for number in ordered:
        plan = make_rehearsal(config, world_size, num_layers=number, capabilities=capabilities)
        plan.raise_if_blocked()
        full = _forecast(plan, whole) if full is None else full
        rung = _measure(plan, whole.with_layers(number), number, runs_dir, measure or _run)
        yield rung
        if not rung.ok:
            return
        done.append(rung)
    assert full is not None
    yield Rung(depth, _extrapolate(done, full, depth), None)


def _run(plan: Plan, runs_dir: Path) -> Run:
    run = start(plan, runs_dir=runs_dir)
    while not run.status.has_ended:
        time.sleep(_POLL_SECONDS)
    return run


def _forecast(plan: Plan, shape: ModelShape) -> Forecast:
    # The shape has the depth that is meant; the plan's own name may be of another.
    return forecast(
        plan.config, shape, device=plan.device, world_size=plan.world_size,
        capacity_bytes=plan.device_capacity_bytes,
    )  # fmt: skip


def _measure(plan: Plan, shape: ModelShape, number: int, runs_dir: Path, measure: Callable[[Plan, Path], Run]) -> Rung:
    predicted = _forecast(plan, shape)
    run = measure(plan, runs_dir)
    if run.state != "succeeded":
        return Rung(number, (), run.run_id, f"the rehearsal {run.state}: {run.status.error or run.status.message}")
    table = peaks(run.memory())
    heights = []
    for phase in PHASES:
        row = table[table["phase"] == phase]
        for figure in _FIGURES:
            if len(row):
                wanted = getattr(predicted.phases[phase], figure)
                heights.append(Height(phase, figure, wanted, int(row[figure].max())))
    return Rung(number, tuple(heights), run.run_id)


def _extrapolate(done: Sequence[Rung], full: Forecast, depth: int) -> tuple[Height, ...]:
    """What is left of the measured beside the predicted grows with the layers, on a line through the outer rungs."""
    first, last = done[0], done[-1]
    found = []
    for low, high in zip(first.heights, last.heights, strict=True):
        wanted = getattr(full.phases[low.phase], low.figure)
        begin, end = (each.measured_bytes - each.predicted_bytes for each in (low, high))
        slope = (end - begin) / (last.num_layers - first.num_layers)
        rest = round(end + slope * (depth - last.num_layers))
        found.append(replace(low, predicted_bytes=wanted, measured_bytes=wanted + rest))
    return tuple(found)
