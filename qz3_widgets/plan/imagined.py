"""Plans for GPUs that are only imagined: as many ranks as GPUs, checked on a laptop."""

from __future__ import annotations

from dataclasses import replace

from ..config.changes import with_changes
from ..config.presets import PRESET_GPUS
from ..config.schema import RunConfig
from ..units import GIB
from .capabilities import imagine
from .plan import Plan, make_plan

DEFAULT_GIB = 80.0
"""Of a GPU whose memory nobody has named: the common size of an A100 and an H100."""


def on_imagined(config: RunConfig, num_gpus: int | None, gpu_memory_gib: float | None) -> Plan:
    """The plan of ``config`` on ``num_gpus`` GPUs, one for each rank.

    Args:
        config: what to run.
        num_gpus: left out, as many as the configuration has ranks.
        gpu_memory_gib: of each; left out, what the preset of this name is meant for, or 80.
    """
    ranks = config.launch.num_processes if num_gpus is None else num_gpus
    gib = gpu_memory_gib if gpu_memory_gib is not None else meant_gib(config)
    machines = config.launch.num_machines if ranks % config.launch.num_machines == 0 else 1
    changes = {"launch.num_processes": ranks, "launch.num_machines": machines, "launch.device": "cuda"}
    fitted = with_changes(config, {**changes, "launch.ranks_per_gpu": 1})
    plan = make_plan(fitted, imagine(ranks // machines, int(gib * GIB)))
    # On a laptop the data of the real machine need not lie.
    return replace(plan, issues=tuple(issue for issue in plan.issues if not issue.field.startswith("data.")))


def meant_gib(config: RunConfig) -> float:
    """The memory of the GPUs that the preset of this configuration's name is meant for."""
    for name, meant in PRESET_GPUS.items():
        if config.name.startswith(name) and meant.num_gpus:
            return float(meant.gpu_memory_gib)
    return DEFAULT_GIB
