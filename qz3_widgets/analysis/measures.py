"""The figures by which runs are compared: names, units, which direction is better, and who may be judged by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..units import format_bytes, format_duration

Kind = Literal["bytes", "seconds", "loss", "rate", "count", "share"]
Direction = Literal["lower", "higher"]

# Below these relative differences two values count as the same: allocators and clocks are no finer.
_TOLERANCE: dict[Kind, float] = {
    "bytes": 0.005,
    "seconds": 0.02,
    "rate": 0.02,
    "loss": 0.001,
    "count": 0.0,
    "share": 0.02,
}


@dataclass(frozen=True)
class Measure:
    """One row of the table of metrics."""

    name: str
    label: str
    kind: Kind
    direction: Direction | None = None
    phase: str | None = None
    """Counts only for runs that went through this phase."""

    def format(self, value: float | None) -> str:
        """``value`` as text with its unit; ``"none"`` where there is none."""
        if value is None:
            return "none"
        if self.kind == "bytes":
            return format_bytes(value)
        if self.kind == "seconds":
            return f"{value:.2f} s" if self.name in ("step_seconds", "gather_wait_seconds") else format_duration(value)
        if self.kind == "loss":
            return f"{value:.3f}"
        if self.kind == "share":
            return f"{value:.1%}"
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.3g}"

    def same(self, a: float, b: float) -> bool:
        """Whether the two don't differ by more than measuring does."""
        return abs(a - b) <= _TOLERANCE[self.kind] * max(abs(a), abs(b))


MEASURES: tuple[Measure, ...] = (
    Measure("load_peak_bytes", "load, peak", "bytes", "lower", "load"),
    Measure("load_settled_bytes", "load, settled", "bytes", "lower", "load"),
    Measure("ready_settled_bytes", "ready, settled", "bytes", "lower", "ready"),
    Measure("step_peak_bytes", "step, peak", "bytes", "lower", "step"),
    Measure("step_settled_bytes", "step, settled", "bytes", "lower", "step"),
    Measure("reserved_peak_bytes", "reserved, peak", "bytes", "lower", "step"),
    Measure("host_peak_bytes", "host memory of a rank, peak", "bytes", "lower", "step"),
    Measure("eval_loss_before", "evaluation loss, before", "loss"),
    Measure("eval_loss_after", "evaluation loss, after", "loss", "lower"),
    Measure("first_loss", "first loss", "loss"),
    Measure("last_loss", "last loss", "loss", "lower"),
    Measure("last_loss_smoothed", "last loss, smoothed", "loss", "lower"),
    Measure("tokens_per_second", "tokens per second", "rate", "higher", "step"),
    Measure("tokens_per_second_per_device", "tokens per second and device", "rate", "higher", "step"),
    Measure("model_flops_utilization", "model FLOPs utilization", "share", "higher", "step"),
    Measure("step_seconds", "seconds a step", "seconds", "lower", "step"),
    Measure("gather_wait_seconds", "of it waiting for weights", "seconds", "lower", "step"),
    Measure("launch_to_first_step_seconds", "launch to first step", "seconds", "lower", "step"),
    Measure("total_seconds", "total time", "seconds", "lower"),
    Measure("num_steps", "steps", "count"),
    Measure("num_tokens", "tokens", "count"),
)


def metrics_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every measure of one run, by name, from its summary; bytes are the fullest rank's."""
    ranks = summary["ranks"]

    def most(phase: str | None, name: str) -> int | None:
        sizes = [
            size
            for rank in ranks
            for own, figures in rank["phases"].items()
            if (phase is None or own == phase) and (size := figures[name]) is not None
        ]
        return max(sizes, default=None)

    found: dict[str, Any] = {
        "load_peak_bytes": most("load", "peak_bytes"),
        "load_settled_bytes": most("load", "settled_bytes"),
        "ready_settled_bytes": most("ready", "settled_bytes"),
        "step_peak_bytes": most("step", "peak_bytes"),
        "step_settled_bytes": most("step", "settled_bytes"),
        # On the CPU nothing is reserved beyond what is allocated, and the peak between records is not in it.
        "reserved_peak_bytes": None if summary["device"] == "cpu" else most(None, "reserved_peak_bytes"),
        "host_peak_bytes": most(None, "host_peak_bytes"),
        "launch_to_first_step_seconds": summary["times"]["launch_to_first_step_seconds"],
        "total_seconds": summary["times"]["total_seconds"],
    }
    return {
        measure.name: found[measure.name] if measure.name in found else summary[measure.name] for measure in MEASURES
    }


def may_judge(measure: Measure, summary: Mapping[str, Any]) -> bool:
    """Whether the run went far enough for this figure to be its last word: a run that died early is not "better"."""
    if measure.phase is None:
        return bool(summary["state"] == "succeeded")
    reached = [rank["phases"].get(measure.phase) for rank in summary["ranks"]]
    return any(figures is not None and figures["settled_bytes"] is not None for figures in reached)
