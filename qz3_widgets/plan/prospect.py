"""A plan's prospect: its memory against the GPUs, the ways there are, and what to change. ``qz3 plan`` tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..units import format_bytes
from .advice import Advice, advise
from .fit import Fit, Machine, fit, limits
from .issue import Issue
from .memory import LABELS, tokens_of
from .overhead import Overhead
from .plan import Plan, PlanError
from .shapes import ModelShape, known_shape, model_shape
from .strategies import StrategyFit, compare_strategies, current_strategy

_WHERE = {
    "load": "loading", "ready": "getting ready", "step": "a step", "eval": "an evaluation", "save": "saving",
}  # fmt: skip


@dataclass(frozen=True)
class Prospect:
    """What is to be expected of a plan. Advice, strategies and limits are worked out when they are asked for."""

    plan: Plan
    shape: ModelShape
    machine: Machine

    @cached_property
    def fit(self) -> Fit:
        """The plan as it is."""
        return fit(self.plan.config, self.shape, self.machine, self.plan.world_size)

    @cached_property
    def advice(self) -> tuple[Advice, ...]:
        """What to change, or what there is room for; for as many ranks as the configuration has."""
        if self.plan.rehearsal is not None:
            return ()
        return tuple(advise(self.plan.config, self.shape, self.machine, self.fit))

    @cached_property
    def strategies(self) -> tuple[StrategyFit, ...]:
        """The ways to run it on these devices."""
        if self.plan.rehearsal is not None:
            return ()
        config = self.plan.config
        return tuple(compare_strategies(config, self.shape, self.machine, current_strategy(config)))

    @cached_property
    def limits(self) -> Mapping[str, Any]:
        """The longest sequence, the largest batch, the fewest GPUs."""
        return limits(self.plan.config, self.shape, self.machine)

    @property
    def title(self) -> str:
        """The plan in one line."""
        config = self.plan.config
        length, batch = config.data.max_length, config.training.per_device_train_batch_size
        gib = format_bytes(self.machine.capacity_bytes)
        where = (
            f"{self.plan.world_size} x {gib}" if self.machine.device == "cuda" else f"{self.plan.describe_machine()}"
        )
        label = next((each.strategy.label for each in self.strategies if each.is_current), self.plan.strategy)
        return f"{config.name} on {where}, {label}, {length:,} tokens x {batch}"

    @property
    def verdict(self) -> str:
        """Whether it fits, in one or two sentences."""
        found = self.fit
        worst = found.first_failing or found.forecast.fullest
        peak = format_bytes(found.forecast.phases[worst].peak_bytes)
        capacity = format_bytes(self.machine.capacity_bytes)
        ranks = "every rank" if self.plan.world_size > 1 else "the rank"
        if self.machine.capacity_bytes is None:
            return f"Needs {peak} on {ranks}, in {_WHERE[worst]}; nothing is known of the device."
        if not found.fits:
            why = self.why_not()
            return f"Does not fit: {_WHERE[worst]} needs {peak} on {ranks}, of {capacity}.{f' {why}' if why else ''}"
        free = format_bytes(found.free_bytes)
        band = f"band {self.machine.overhead.band:.0%}"
        tail = f"{free} free ({band})"
        if found.is_narrow:
            return f"Fits narrowly: {_WHERE[worst]} needs {peak} of {capacity} on {ranks}, {tail}; less than the band."
        return f"Fits. The fullest moment is {_WHERE[worst]}: {peak} of {capacity} on {ranks}, {tail}."

    def why_not(self) -> str:
        """The cause, where it is one that has a name."""
        config, phase = self.plan.config, self.fit.first_failing
        strategy = current_strategy(config)
        if phase in ("load", "ready") and strategy == "stock" and config.quantization.load_in_4bit:
            return "ZeRO-3 does not shard a 4-bit model while it loads, so every rank holds all of it first."
        if phase == "load" and strategy == "replicated" and self.plan.world_size > 1:
            return "Every rank keeps a whole copy of the model."
        if phase == "step" and not config.zero.release_gathered and config.zero.zero_stage == 3:
            return "Gathered layers are not let go, so the whole model is on every rank by the end of the forward."
        if phase == "step":
            components = self.fit.forecast.phases["step"].peak
            largest = max(components, key=lambda name: components[name])
            return f"Most of it: {LABELS.get(largest, largest)}, {format_bytes(components[largest])}."
        if phase == "eval":
            return f"It evaluates {config.training.per_device_eval_batch_size:,} sequences at once."
        return ""

    def issues(self) -> tuple[Issue, ...]:
        """What of this stands in the way, tied to a field."""
        if self.fit.fits:
            return ()
        first = next(iter(self.advice), None)
        field = next(iter(first.change), "model.load_strategy") if first is not None else "launch.num_processes"
        fix = dict(first.change) if first is not None and first.fit.fits else None
        return (Issue("does-not-fit", "error", field, self.verdict, fix),)

    def to_json(self) -> dict[str, Any]:
        """What ``qz3 plan --json`` prints."""
        phases = self.fit.forecast.to_json()
        ranks = [self.plan.rehearsal.rank] if self.plan.rehearsal is not None else range(self.plan.world_size)
        return {
            "fits": self.fit.fits,
            "narrow": self.fit.is_narrow,
            "verdict": self.verdict,
            "world_size": self.plan.world_size,
            "device_capacity_bytes": self.machine.capacity_bytes,
            "strategy": self.plan.strategy,
            "load_strategy": current_strategy(self.plan.config),
            "tokens": tokens_of(self.plan.config),
            "num_parameters": self.shape.num_parameters,
            "num_parameters_4bit": self.shape.num_quantized,
            "overhead": self.machine.overhead.to_json(),
            "ranks": [{"rank": rank, "phases": phases} for rank in ranks],
            "strategies": [each.to_json() for each in self.strategies],
            "limits": dict(self.limits),
            "issues": [issue.to_json() for issue in (*self.plan.issues, *self.issues())],
            "advice": [each.to_json() for each in self.advice],
        }


def prospect(plan: Plan, *, overhead: Overhead | None = None) -> Prospect:
    """The prospect of ``plan``; a shape that is not at hand is read from the model's class, some ten seconds once.

    Args:
        plan: what was checked.
        overhead: what was learned of the machine; left out, it is assumed.

    Raises:
        ValueError: the model's shape can't be told without a download.
    """
    return _prospect(plan, model_shape(plan.config), overhead)


def prospect_at_hand(plan: Plan, *, overhead: Overhead | None = None) -> Prospect | None:
    """As :func:`prospect`, in milliseconds; ``None`` where the model's shape is not at hand."""
    shape = known_shape(plan.config)
    return None if shape is None else _prospect(plan, shape, overhead)


def _prospect(plan: Plan, shape: ModelShape, overhead: Overhead | None) -> Prospect:
    machine = Machine.of(plan.device, capacity_for_a_rank(plan), plan.world_size, overhead)
    return Prospect(plan, shape, machine)


def capacity_for_a_rank(plan: Plan) -> int | None:
    """Memory of the device, or a rank's share of it where several are on one: on a CPU, or with ``ranks_per_gpu``."""
    whole = plan.device_capacity_bytes
    if whole is None or plan.rehearsal is not None:
        return whole
    sharing = plan.config.launch.ranks_per_gpu if plan.device == "cuda" else plan.local_ranks
    return whole // max(1, sharing)


def refuse_if_too_large(plan: Plan, *, overhead: Overhead | None = None) -> None:
    """Do nothing if the plan fits, or its model's shape is not at hand.

    Raises:
        PlanError: it does not fit; the message says where, and what would.
    """
    found = prospect_at_hand(plan, overhead=overhead)
    if found is not None and not found.fit.fits:
        raise PlanError(found.issues())
