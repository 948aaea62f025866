"""How the model gets onto the ranks: what ``model.load_strategy: auto`` stands for, and what each strategy asks for."""

from __future__ import annotations

from typing import Literal

from .schema import RunConfig

LoadStrategy = Literal["sharded", "stock", "replicated", "device_map"]

MEANINGS: dict[LoadStrategy, str] = {
    "sharded": "each parameter is quantized and partitioned as it comes; no rank ever holds the model",
    "stock": "as released: every rank holds the whole model until the engine partitions it",
    "replicated": "data parallel: every rank keeps a whole copy, and no weight travels",
    "device_map": "one process, its layers spread over the devices, without ZeRO",
}


def resolve_load_strategy(config: RunConfig) -> LoadStrategy:
    """The strategy that a run uses.

    ``auto`` is sharded for ZeRO-3 with 4-bit weights, replicated without ZeRO, and stock for the rest: a 16-bit
    model under ZeRO-3 is partitioned by transformers itself, and ZeRO-1 and -2 partition no weights.
    """
    chosen = config.model.load_strategy
    if chosen != "auto":
        return chosen
    if config.zero.zero_stage == 3 and config.quantization.load_in_4bit:
        return "sharded"
    return "replicated" if config.zero.zero_stage == 0 else "stock"


def strategy_faults(config: RunConfig) -> list[tuple[str, str, dict[str, object]]]:
    """What keeps the chosen strategy from working: field, message, and the changes that mend it."""
    strategy, stage = resolve_load_strategy(config), config.zero.zero_stage
    faults: list[tuple[str, str, dict[str, object]]] = []
    if strategy == "sharded":
        if stage != 3:
            message = f"sharded needs zero.zero_stage 3, not {stage}"
            faults.append(("model.load_strategy", message, {"model.load_strategy": "auto"}))
        if not config.quantization.load_in_4bit:
            message = "sharded is for 4-bit weights, and quantization.load_in_4bit is off: 16-bit ones need no help"
            faults.append(("model.load_strategy", message, {"model.load_strategy": "auto"}))
    if strategy in ("replicated", "device_map") and stage != 0:
        message = f"{strategy} works without ZeRO, and zero.zero_stage is {stage}"
        faults.append(("zero.zero_stage", message, {"zero.zero_stage": 0}))
    if strategy == "device_map" and config.launch.num_processes != 1:
        message = f"device_map is one process for all devices, not {config.launch.num_processes}"
        faults.append(("launch.num_processes", message, {"launch.num_processes": 1}))
    return faults
