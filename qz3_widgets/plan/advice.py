"""The smallest changes that make a run fit, and what there is room for in one that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ..config.changes import get_field, with_changes
from ..config.schema import RunConfig
from ..units import format_bytes
from .fit import Fit, Machine, fit
from .shapes import ModelShape

MOST = 4
_HOST_COPIES = 2.2


@dataclass(frozen=True)
class Advice:
    """A change that can be applied, and what comes of it."""

    change: Mapping[str, Any]
    fit: Fit
    why: str

    def to_json(self) -> dict[str, Any]:
        """As ``qz3 plan --json`` tells it."""
        return {
            "change": dict(self.change),
            "fits": self.fit.fits,
            "peak_bytes": self.fit.forecast.peak_bytes,
            "why": self.why,
        }


def advise(config: RunConfig, shape: ModelShape, machine: Machine, found: Fit) -> list[Advice]:
    """For a run that does not fit: changes that make it fit, the least painful first; else what there is room for.

    A change that costs nothing but switches leaks off comes before one that costs time, and that before one that
    changes what is learned. Where no single change will do, two or three together are tried; if nothing does, the one
    that comes closest is given.
    """
    if found.fits:
        return list(_room(config, shape, machine))
    single = [
        Advice(change, fit(with_changes(config, change), shape, machine), why) for change, why in _savers(config, found)
    ]
    fitting = [each for each in single if each.fit.fits]
    if fitting:
        return fitting[:MOST]
    helpful = [each for each in single if each.fit.forecast.peak_bytes < found.forecast.peak_bytes]
    for size in (2, 3):
        together = []
        for group in combinations(helpful, size):
            change: dict[str, Any] = {}
            for each in group:
                change.update(each.change)
            result = fit(with_changes(config, change), shape, machine)
            if result.fits:
                together.append(Advice(change, result, "; ".join(each.why for each in group)))
            if len(together) == MOST:
                break
        if together:
            return together
    return sorted(helpful, key=lambda each: each.fit.forecast.peak_bytes)[:1]


def host_bytes_of_shards(config: RunConfig, found: Fit) -> int:
    """Host memory of all ranks' shards that are offloaded: pinned, and once more while DeepSpeed takes them over.

    Measured on an H100's host: the ranks' share of the model times 2.2 (70B, rank 0 of 2: 42 GiB for 18).
    """
    ready = found.forecast.phases["ready"].settled
    shard = sum(ready.get(name, 0) for name in ("weights_4bit", "statistics", "weights_16bit"))
    return int(_HOST_COPIES * shard * config.launch.num_processes)


def _savers(config: RunConfig, found: Fit) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes that save memory, in the order of what they cost."""
    zero, training, data = config.zero, config.training, config.data
    leaks: dict[str, Any] = {}
    if zero.zero_stage == 3 and config.quantization.load_in_4bit:
        if config.model.load_strategy not in ("auto", "sharded"):
            leaks["model.load_strategy"] = "sharded"
        leaks |= {f"zero.{name}": True for name in ("release_gathered", "shard_statistics") if not getattr(zero, name)}
        if leaks:
            yield leaks, "4-bit weights are sharded as they load, and let go within the step"
    if training.per_device_eval_batch_size > 1 and "eval" in found.forecast.phases:
        yield {"training.per_device_eval_batch_size": 1}, "fewer sequences at once in an evaluation, which takes longer"
    if zero.zero_stage < 3 and config.quantization.load_in_4bit and config.launch.num_processes > 1:
        yield (
            {"zero.zero_stage": 3, "model.load_strategy": "auto"},
            "each rank holds its part of the weights, not all of them",
        )
    if not config.quantization.load_in_4bit:
        yield {"quantization.load_in_4bit": True}, "the frozen weights take a quarter of the memory"
    if training.activation_checkpointing == "none":
        yield {"training.activation_checkpointing": "non_reentrant"}, "layers are computed again in the backward"
    if not config.quantization.bnb_4bit_use_double_quant and config.quantization.load_in_4bit:
        yield {"quantization.bnb_4bit_use_double_quant": True}, "statistics take a quarter"
    if training.activation_offload is not True and training.activation_checkpointing != "none":
        yield {"training.activation_offload": True}, "inputs of layers wait in host memory"
    batch, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if batch > 1:
        smaller = max(1, batch // 2)
        while smaller > 1 and batch % smaller:
            smaller -= 1
        for size in dict.fromkeys((smaller, 1)):
            change = {
                "training.per_device_train_batch_size": size,
                "training.gradient_accumulation_steps": steps * batch // size,
            }
            if batch % size == 0:
                yield change, "the same batch in more passes"
    if zero.zero_stage > 0 and zero.offload_optimizer_device == "none":
        yield {"zero.offload_optimizer_device": "cpu"}, "the optimizer's state lives in host memory"
    if zero.zero_stage == 3 and zero.offload_param_device == "none":
        host = format_bytes(host_bytes_of_shards(config, found))
        why = f"shards live in host memory, some {host} for all ranks; each step brings them over PCIe"
        yield {"zero.offload_param_device": "cpu"}, why
    for length in (data.max_length // 2, data.max_length // 4, data.max_length // 8):
        if length >= 128:
            yield {"data.max_length": length}, "shorter examples; what is longer is cut"
    if config.lora.r > 8:
        yield {"lora.r": 8, "lora.lora_alpha": max(1, config.lora.lora_alpha * 8 // config.lora.r)}, "a smaller adapter"


def _room(config: RunConfig, shape: ModelShape, machine: Machine) -> Iterator[Advice]:
    """Larger batches and longer examples that still fit, by doubling."""
    for field, why in (
        ("training.per_device_train_batch_size", "more sequences at once: fewer gathers for each"),
        ("data.max_length", "longer examples"),
    ):
        number, best = int(get_field(config, field)), None
        for _ in range(6):
            number *= 2
            candidate = fit(with_changes(config, {field: number}), shape, machine)
            if not candidate.fits or candidate.is_narrow:
                break
            best = Advice({field: number}, candidate, why)
            if field == "data.max_length" and number >= 32768:
                break
        if best is not None:
            yield best
