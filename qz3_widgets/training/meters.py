"""What a rank's device is asked for its memory: one reading, whatever the device."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from ..trace.records import AllocatorSource
from .cpu_allocator import CountingAllocator, install


@dataclass(frozen=True)
class Reading:
    """Bytes at one moment; ``peak_allocated_bytes`` is the largest ``allocated_bytes`` since the last reading."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    device_used_bytes: int


class Meter(Protocol):
    """A source of readings."""

    source: AllocatorSource
    device: str
    device_name: str
    capacity_bytes: int

    def read(self) -> Reading:
        """Read now, and start a new interval for the peak."""
        ...

    def adopt(self, model: torch.nn.Module) -> None:
        """See that the tensors of a model just loaded are counted."""
        ...


class CudaMeter:
    """Figures of torch's caching allocator on one GPU; all processes on it share ``device_used_bytes``."""

    source: AllocatorSource = "cuda"

    def __init__(self, index: int) -> None:
        """Ask GPU ``index`` for its name and size."""
        properties = torch.cuda.get_device_properties(index)
        self._index = index
        self.device = f"cuda:{index}"
        self.device_name = properties.name
        self.capacity_bytes = int(properties.total_memory)

    def read(self) -> Reading:
        """Read the allocator's counters; nothing is synchronized, they are the host's own."""
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)
        peak = int(stats["allocated_bytes"]["all"]["peak"]) if stats else 0
        torch.cuda.reset_peak_memory_stats(self._index)
        free, total = torch.cuda.mem_get_info(self._index)
        return Reading(
            allocated_bytes=int(stats["allocated_bytes"]["all"]["current"]) if stats else 0,
            reserved_bytes=int(stats["reserved_bytes"]["all"]["current"]) if stats else 0,
            peak_allocated_bytes=peak,
            device_used_bytes=int(total - free),
        )

    def adopt(self, model: torch.nn.Module) -> None:
        """Nothing to do: the weights were copied to the device."""


class CpuMeter:
    """Figures of the counting allocator; reserved equals allocated, since the CPU caches nothing."""

    source: AllocatorSource = "cpu-counting"

    def __init__(self, allocator: CountingAllocator) -> None:
        """Read from ``allocator``."""
        self._allocator = allocator
        self.device, self.device_name, self.capacity_bytes = "cpu", _cpu_name(), host_memory_bytes()

    def read(self) -> Reading:
        """Read the counters."""
        allocated = self._allocator.allocated_bytes()
        return Reading(allocated, allocated, self._allocator.take_peak_bytes(), psutil.virtual_memory().used)

    def adopt(self, model: torch.nn.Module) -> None:
        """Copy weights that are views of a mapped file."""
        self._allocator.adopt(model)


class WalkMeter:
    """Without a compiler: the storages of the tensors that Python can see, each once.

    It misses what only autograd holds, and knows no peak between readings; the header's ``source`` says so.
    """

    source: AllocatorSource = "cpu-walk"

    def __init__(self) -> None:
        """Nothing to set up."""
        self.device, self.device_name, self.capacity_bytes = "cpu", _cpu_name(), host_memory_bytes()

    def read(self) -> Reading:
        """Walk over all tensors: tens of milliseconds."""
        storages: dict[int, int] = {}
        for thing in gc.get_objects():
            # isinstance() would wake lazy proxies that happen to be alive; type() asks nobody.
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        total = sum(storages.values())
        return Reading(total, total, total, psutil.virtual_memory().used)

    def adopt(self, model: torch.nn.Module) -> None:
        """Nothing to do: the walk counts mapped storages too."""


def make_meter(device: str, local_gpu: int, cache_dir: Path) -> Meter:
    """The best meter for ``device`` (``"cpu"`` or ``"cuda"``)."""
    if device == "cuda":
        return CudaMeter(local_gpu)
    allocator = install(cache_dir)
    return CpuMeter(allocator) if allocator is not None else WalkMeter()


def host_memory_bytes() -> int:
    """Memory this process may use: the host's, or its control group's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no control group, or "max"
            continue
    return total


def _cpu_name() -> str:
    return f"CPU, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
