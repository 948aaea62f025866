"""The ways to put a model on the GPUs at hand: which fit, and in what order of expected speed.

Speed is estimated from what a step computes and what it moves, with nominal rates: good for an order, not for a figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config.changes import with_changes
from ..config.schema import RunConfig
from .fit import Fit, Machine, fit
from .gathering import whole_layer
from .memory import PhaseForecast, tokens_of
from .shapes import ModelShape
from .sizes import Sizes
from .state import Setting

FLOPS_PER_SECOND = 4e14
"""What a GPU of the present kind (H100) comes to in bf16 products of this size."""

LINK_BYTES_PER_SECOND = 2e11
"""Between GPUs of a host with NVLink, each way."""

HOST_BYTES_PER_SECOND = 2.5e10
"""Between a GPU and its host (PCIe 4 x16)."""


@dataclass(frozen=True)
class Strategy:
    """One way, as changes of the configuration."""

    name: str
    label: str
    changes: Mapping[str, Any]
    note: str = ""


STRATEGIES = (
    Strategy("replicated", "data parallel", {"zero.zero_stage": 0, "model.load_strategy": "replicated"}),
    Strategy("sharded", "ZeRO-3, sharded load", {}),
    Strategy(
        "sharded_offload",
        "ZeRO-3, shards in host memory",
        {"zero.offload_param_device": "cpu", "zero.offload_optimizer_device": "cpu"},
        "weights come over PCIe",
    ),
    Strategy(
        "device_map",
        'device_map="auto"',
        {"zero.zero_stage": 0, "model.load_strategy": "device_map", "launch.num_processes": 1},
        "one GPU works at a time",
    ),
    Strategy(
        "stock",
        "ZeRO-3 as released",
        {"model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False},
    ),
)
_CLEAN = {
    "zero.zero_stage": 3,
    "model.load_strategy": "auto",
    "zero.release_gathered": True,
    "zero.shard_statistics": True,
    "zero.offload_param_device": "none",
    "zero.offload_optimizer_device": "none",
}


@dataclass(frozen=True)
class StrategyFit:
    """A strategy on a machine."""

    strategy: Strategy
    fit: Fit
    wire_bytes: int  # between devices, of one rank in a step
    host_bytes: int  # between a device and its host, of one rank in a step
    seconds: float  # estimated, for an order
    is_current: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if self.fit.fits:
            narrow = ", narrowly" if self.fit.is_narrow else ""
            return f"fits{narrow}{f'; {self.strategy.note}' if self.strategy.note else ''}"
        where = {
            "load": "at load", "ready": "before the first step", "step": "in a step", "eval": "in an evaluation",
            "save": "when it is saved",
        }  # fmt: skip
        return f"out of memory {where[self.fit.first_failing or 'step']}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.strategy.name,
            "label": self.strategy.label,
            "fits": self.fit.fits,
            "verdict": self.verdict,
            "peak_bytes": {name: phase.peak_bytes for name, phase in self.fit.forecast.phases.items()},
            "wire_bytes": self.wire_bytes,
            "host_bytes": self.host_bytes,
            "seconds": self.seconds,
            "current": self.is_current,
            "change": dict(self.strategy.changes),
        }


def compare_strategies(config: RunConfig, shape: ModelShape, machine: Machine, current: str) -> list[StrategyFit]:
    """All strategies; those that fit first, the fastest of them first."""
    found = [_judge(strategy, config, shape, machine, current) for strategy in STRATEGIES if _applies(strategy, config)]
    return sorted(found, key=lambda each: (not each.fit.fits, each.seconds))


def current_strategy(config: RunConfig) -> str:
    """The name of the strategy that a configuration has."""
    from ..config.strategy import resolve_load_strategy

    resolved = resolve_load_strategy(config)
    offloaded = config.zero.offload_param_device == "cpu"
    return "sharded_offload" if resolved == "sharded" and offloaded else str(resolved)


def _applies(strategy: Strategy, config: RunConfig) -> bool:
    return config.quantization.load_in_4bit or strategy.name not in ("sharded", "sharded_offload")


def _judge(strategy: Strategy, config: RunConfig, shape: ModelShape, machine: Machine, current: str) -> StrategyFit:
    ranks = config.launch.num_processes
    as_it_is = strategy.name == current
    changed = config if as_it_is else with_changes(config, {**_CLEAN, **_alone(strategy), **strategy.changes})
    spread = strategy.name == "device_map"
    found = _spread(changed, shape, machine, ranks) if spread else fit(changed, shape, machine)
    setting = Setting(changed, shape, Sizes.of(changed, machine.device, ranks))
    wire, host = _moved(setting, strategy.name, ranks)
    work = _flops(setting) / FLOPS_PER_SECOND * (ranks if strategy.name == "device_map" else 1)
    # Collectives overlap with the arithmetic as far as there is any; what comes from the host does not quite.
    seconds = max(work, wire / LINK_BYTES_PER_SECOND) + host / HOST_BYTES_PER_SECOND
    return StrategyFit(strategy, found, wire, host, seconds, as_it_is)


def _alone(strategy: Strategy) -> Mapping[str, Any]:
    """Without ZeRO, what only ZeRO-3 has is off."""
    return {"zero.leaf_modules": "auto"} if strategy.changes.get("zero.zero_stage") == 0 else {}


def _spread(config: RunConfig, shape: ModelShape, machine: Machine, num_devices: int) -> Fit:
    """Layers in turn over the devices: each holds its share of the model, and all that a step of its layers takes."""
    whole = fit(config, shape, machine, 1)
    shared = ("weights_4bit", "statistics", "weights_16bit", "adapter", "optimizer", "gradients", "activations")
    phases = {}
    for name, phase in whole.forecast.phases.items():
        settled, peak = (
            {key: -(-size // num_devices) if key in shared else size for key, size in components.items()}
            for components in (phase.settled, phase.peak)
        )
        phases[name] = PhaseForecast(settled, peak, phase.moment)
    return replace(whole, forecast=replace(whole.forecast, phases=phases))


def _moved(setting: Setting, name: str, num_ranks: int) -> tuple[int, int]:
    """(bytes from other devices, bytes from the host) for one rank in a step of all its micro-batches."""
    passes = setting.config.training.gradient_accumulation_steps
    width = setting.compute_bytes
    away = (num_ranks - 1) / max(1, num_ranks)
    adapter = int(2 * away * setting.num_trained * width)
    if name in ("replicated", "device_map"):
        hops = tokens_of(setting.config) * setting.shape.fact("hidden_size") * width * 2
        return (adapter, 0) if name == "replicated" else (passes * hops * max(0, num_ranks - 1), 0)
    layers = sum(whole_layer(setting, block) * block.count for block in setting.shape.blocks)
    outside = sum(each.numel * setting.sizes.dtype_bytes for each in setting.shape.outside)
    # Gathered for the forward, and again for the backward.
    wire = int(passes * away * (2 * layers + outside)) + adapter
    host = int(passes * (2 * layers + outside) / num_ranks) if setting.offloads_parameters else 0
    return wire, host


def _flops(setting: Setting) -> float:
    """Products of a step on one rank: forward, its recomputation, and the gradient of the inputs."""
    per_token = 2 * sum(weight.numel * count for weight, count in setting.shape.weights() if weight.linear)
    times = 3 if setting.config.training.activation_checkpointing != "none" else 2
    return times * per_token * tokens_of(setting.config) * setting.config.training.gradient_accumulation_steps
