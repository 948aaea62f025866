"""Does it fit? A forecast against a device's capacity, and the largest sequence, batch and fewest GPUs that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config.changes import with_changes
from ..config.schema import RunConfig
from .memory import Forecast, forecast
from .overhead import ASSUMED_NCCL_ALONE_BYTES, Overhead, assumed
from .shapes import ModelShape

MOST_TOKENS = 2**20
MOST_SEQUENCES = 4096
MOST_RANKS = 1024


@dataclass(frozen=True)
class Machine:
    """Where ranks run, as far as memory is concerned."""

    device: Literal["cpu", "cuda"]
    capacity_bytes: int | None  # for one rank; None: not known
    overhead: Overhead

    @classmethod
    def of(
        cls,
        device: Literal["cpu", "cuda"],
        capacity_bytes: int | None,
        num_ranks: int,
        overhead: Overhead | None = None,
    ) -> Machine:
        """With the given overhead, or what is assumed of one."""
        return cls(device, capacity_bytes, overhead if overhead is not None else assumed(device, num_ranks))


@dataclass(frozen=True)
class Fit:
    """A forecast, and whether it fits."""

    forecast: Forecast
    machine: Machine

    @property
    def needed_bytes(self) -> int:
        """The fullest moment, with what comes on top of the allocator."""
        return self.forecast.peak_bytes + self.machine.overhead.fixed_bytes

    @property
    def free_bytes(self) -> int | None:
        """What is left at the fullest moment; negative if it does not fit."""
        return None if self.machine.capacity_bytes is None else self.machine.capacity_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the fullest moment fits; what is not known is no obstacle."""
        return self.free_bytes is None or self.free_bytes >= 0

    @property
    def is_narrow(self) -> bool:
        """Whether it fits, but not with the band of the prediction and a cache that is fragmented."""
        if self.free_bytes is None or not self.fits:
            return False
        overhead, fullest = self.machine.overhead, self.forecast.phases[self.forecast.fullest]
        comes_and_goes = fullest.peak_bytes - fullest.settled_bytes
        return self.free_bytes < max(fullest.peak_bytes * overhead.band, comes_and_goes * overhead.fragmentation)

    def phase_fits(self, phase: str) -> bool:
        """Whether the peak of one phase fits."""
        if self.machine.capacity_bytes is None:
            return True
        return self.forecast.phases[phase].peak_bytes + self.machine.overhead.fixed_bytes <= self.machine.capacity_bytes

    @property
    def first_failing(self) -> str | None:
        """The first phase that does not fit."""
        return next((phase for phase in self.forecast.phases if not self.phase_fits(phase)), None)


def fit(config: RunConfig, shape: ModelShape, machine: Machine, num_ranks: int | None = None) -> Fit:
    """Predict a run on a machine."""
    ranks = config.launch.num_processes if num_ranks is None else num_ranks
    predicted = forecast(config, shape, device=machine.device, world_size=ranks, capacity_bytes=machine.capacity_bytes)
    return Fit(predicted, machine)


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number up to ``most`` that fits, of those that fit from 1 on; ``None`` if 1 does not."""
    if not fits(1):
        return None
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def limits(config: RunConfig, shape: ModelShape, machine: Machine) -> Mapping[str, Any]:
    """The longest sequence (a multiple of 64), the largest micro-batch and the fewest GPUs with which it fits."""

    def changed(field: str) -> Callable[[int], bool]:
        return lambda number: fit(with_changes(config, {field: number}), shape, machine).fits

    unit = 64
    tokens = largest(lambda number: changed("data.max_length")(number * unit), MOST_TOKENS // unit)
    return {
        "max_length": None if tokens is None else tokens * unit,
        "per_device_train_batch_size": largest(changed("training.per_device_train_batch_size"), MOST_SEQUENCES),
        "num_ranks": fewest_ranks(config, shape, machine),
    }


def fewest_ranks(config: RunConfig, shape: ModelShape, machine: Machine) -> int | None:
    """The fewest ranks, each on a device of its own like this one, among which it fits; ``None`` if there are none."""
    if config.zero.zero_stage != 3:
        return 1 if fit(config, shape, machine, 1).fits else None

    def fits(number: int) -> bool:
        alone = min(machine.overhead.nccl_bytes, ASSUMED_NCCL_ALONE_BYTES)
        overhead = machine.overhead if number > 1 else replace(machine.overhead, nccl_bytes=alone)
        return fit(config, shape, replace(machine, overhead=overhead), number).fits

    if not fits(MOST_RANKS):
        return None
    low, high = 0, 1
    while not fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
