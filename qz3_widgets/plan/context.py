"""What every rule is given: the configuration, the machine, and what follows from the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..config.changes import get_field
from ..config.schema import RunConfig
from .capabilities import Capabilities
from .inputs import Inputs

Device = Literal["cpu", "cuda"]

BNB_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
"""Values of ``training.optim`` that are bitsandbytes' own."""

_DEFAULTS = RunConfig()


@dataclass(frozen=True)
class Context:
    """Input of a rule."""

    config: RunConfig
    machine: Capabilities
    inputs: Inputs

    @property
    def device(self) -> Device:
        """Where the ranks run."""
        return resolve_device(self.config, self.machine)

    @property
    def local_ranks(self) -> int:
        """Ranks on this machine."""
        return self.config.launch.num_processes // self.config.launch.num_machines

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed takes part at all."""
        return self.config.zero.zero_stage > 0

    @property
    def threads_per_rank(self) -> int:
        """CPU threads of each rank."""
        return self.config.launch.threads_per_rank or max(1, self.machine.num_cpus // self.local_ranks)

    def changed(self, path: str) -> bool:
        """Whether a field differs from its default: only then can it be said to have no effect."""
        return bool(get_field(self.config, path) != get_field(_DEFAULTS, path))

    def default(self, path: str) -> Any:
        """The default of a field."""
        return get_field(_DEFAULTS, path)


def resolve_device(config: RunConfig, machine: Capabilities) -> Device:
    """What ``launch.device`` stands for on a machine: ``auto`` takes the GPUs if there are any."""
    if config.launch.device != "auto":
        return config.launch.device
    return "cuda" if machine.usable_gpus else "cpu"
