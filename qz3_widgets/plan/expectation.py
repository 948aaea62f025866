"""What a run is expected to hold, written down when it starts; and how it would look if a known thing went wrong.

The suspects are the same memory model with one thing changed. Where a run is not as expected, the suspect that it
resembles is the likely cause (:mod:`qz3_widgets.analysis.truth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config.changes import with_changes
from ..config.schema import RunConfig
from .memory import STATED_ERROR, Forecast, forecast
from .shapes import ModelShape, known_shape

if TYPE_CHECKING:
    from .plan import Plan

ON_A_CPU = 10.0

_SUSPECTS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    (
        "not-sharded-at-load",
        {"model.load_strategy": "stock"},
        "every rank holds the whole model: ZeRO-3 was not active at load",
    ),
    (
        "never-sharded",
        {"zero.zero_stage": 0, "model.load_strategy": "replicated"},
        "every rank holds the whole model from first to last: ZeRO-3 was never active",
    ),
    (
        "not-quantized",
        {"quantization.load_in_4bit": False},
        "the weights are in 16 bit: the quantization did not take effect",
    ),
    (
        "not-let-go",
        {"zero.release_gathered": False, "zero.shard_statistics": False},
        "gathered layers are not let go within the step: something keeps the 4-bit weights from forward to backward",
    ),
    (
        "not-checkpointed",
        {"training.activation_checkpointing": "none"},
        "every layer keeps its activations: activation checkpointing is not active",
    ),
)


def expect(plan: Plan) -> dict[str, Any] | None:
    """The expected phases of each rank, and the suspects'; ``None`` where the model's shape is not at hand."""
    shape = known_shape(plan.config)
    if shape is None:
        return None
    own = _forecast(plan, plan.config, shape)
    suspects = []
    for name, changes, sentence in _SUSPECTS:
        try:
            other = with_changes(plan.config, changes)
        except ValueError:  # contradicts another field of this configuration
            continue
        if other != plan.config:
            found = _forecast(plan, other, _other_shape(other, shape))
            sizes = {phase: _sizes(found, phase) for phase in found.phases}
            suspects.append({"name": name, "sentence": sentence, "phases": sizes})
    return {"phases": own.to_json(), "error": _stated_error(plan), "suspects": suspects}


def _stated_error(plan: Plan) -> dict[str, float]:
    """The kernels of a CPU take memory of their own, which is not in the model: there, peaks are told, not judged."""
    on_cpu = plan.device == "cpu" and (plan.rehearsal is None or plan.rehearsal.arithmetic)
    return {**STATED_ERROR, **({"peak": ON_A_CPU} if on_cpu else {})}


def _other_shape(config: RunConfig, shape: ModelShape) -> ModelShape:
    if config.quantization.load_in_4bit:
        return shape
    return shape.without_quantization()


def _sizes(found: Forecast, phase: str) -> dict[str, int]:
    return {
        "settled_bytes": found.phases[phase].settled_bytes,
        "peak_bytes": found.phases[phase].peak_bytes,
    }


def _forecast(plan: Plan, config: RunConfig, shape: ModelShape) -> Forecast:
    return forecast(
        config,
        shape,
        device=plan.device,
        world_size=plan.world_size,
        capacity_bytes=plan.device_capacity_bytes,
    )
