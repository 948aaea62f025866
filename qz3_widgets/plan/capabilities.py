"""The machine that a plan is checked against: this one, or one that is only imagined."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "peft",
    "trl",
    "datasets",
    "flash-attn",
    "flash-attn-3",
)
"""Distributions whose versions are looked up."""

# What transformers asks for: the module, and the distribution that provides it (others have a module of that name too).
_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU that the ranks may use."""

    index: int  # among the visible ones: the N of cuda:N
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None = None  # None: not known


@dataclass(frozen=True)
class Capabilities:
    """What a machine has. ``None`` means that it is not known, and then nothing is said about it."""

    host: str
    num_cpus: int  # cores that this process may use
    host_memory_bytes: int | None
    gpus: tuple[Gpu, ...] = ()
    flash_attention: tuple[str, ...] | None = None  # values of model.attn_implementation whose packages are installed
    torch_has_cuda: bool | None = None
    cpu_has_fast_bf16: bool | None = None  # instructions for it; without them bf16 is emulated, several times slower
    has_cpp_compiler: bool | None = None
    has_ninja: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)  # of installed distributions
    imagined: bool = False

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that the installed torch can use: none, if it was built for the CPU."""
        return () if self.torch_has_cuda is False else self.gpus

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Memory of the smallest GPU: what every rank can count on. ``None`` without GPUs."""
        return min((gpu.memory_bytes for gpu in self.usable_gpus), default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        return asdict(self)


def detect() -> Capabilities:
    """Look at this machine, without importing torch. What can't be found out is left unknown."""
    versions = _versions()
    return Capabilities(
        host=socket.gethostname(),
        num_cpus=_num_cpus(),
        host_memory_bytes=_host_memory(),
        gpus=visible_gpus(_all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        flash_attention=tuple(
            name
            for name, (module, package) in _FLASH.items()
            if package in versions and importlib.util.find_spec(module) is not None
        ),
        torch_has_cuda=_torch_has_cuda(),
        cpu_has_fast_bf16=cpu_has_fast_bf16(_cpu_flags()),
        has_cpp_compiler=_on_path(os.environ.get("CXX") or "c++"),
        has_ninja=_on_path("ninja"),
        versions=versions,
    )


def imagine(num_gpus: int, gpu_memory_bytes: int, *, num_cpus: int | None = None, name: str = "GPU") -> Capabilities:
    """A machine of ``num_gpus`` GPUs of ``gpu_memory_bytes`` each, of which nothing else is known.

    Args:
        num_gpus: 0 is a machine without GPUs.
        gpu_memory_bytes: of each GPU.
        num_cpus: cores; ``None`` takes this machine's number.
        name: what the GPUs are called.

    Raises:
        ValueError: a negative number of GPUs, or GPUs without memory.
    """
    if num_gpus < 0:
        raise ValueError(f"num_gpus must be 0 or more, not {num_gpus}")
    if num_gpus > 0 and gpu_memory_bytes <= 0:
        raise ValueError(f"gpu_memory_bytes must be more than 0, not {gpu_memory_bytes}")
    return Capabilities(
        host="imagined",
        num_cpus=num_cpus if num_cpus is not None else _num_cpus(),
        host_memory_bytes=None,
        gpus=tuple(Gpu(index, name, gpu_memory_bytes) for index in range(num_gpus)),
        imagined=True,
    )


@dataclass(frozen=True)
class Card:
    """A GPU as the driver lists it, before CUDA_VISIBLE_DEVICES."""

    uuid: str
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None = None


def visible_gpus(cards: tuple[Card, ...], chosen: str | None) -> tuple[Gpu, ...]:
    """The GPUs of ``cards`` that CUDA shows a process whose CUDA_VISIBLE_DEVICES is ``chosen``, in its order.

    As CUDA does it: unset means all; numbers or the beginnings of UUIDs choose; the first one that names no card, or
    one that was named before, ends the list.
    """
    picked: list[Card] = list(cards)
    if chosen is not None:
        picked = []
        for entry in chosen.split(","):
            name = entry.strip()
            if name.isdecimal():
                found = list(cards[int(name) : int(name) + 1])
            else:
                found = [card for card in cards if name and card.uuid.startswith(name)]
            if len(found) != 1 or found[0] in picked:
                break
            picked.append(found[0])
    return tuple(Gpu(index, card.name, card.memory_bytes, card.compute_capability) for index, card in enumerate(picked))


def _all_gpus() -> tuple[Card, ...]:
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # no driver, or none that answers: no GPU that a run could use
    try:
        return tuple(_card(pynvml, number) for number in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _card(pynvml: Any, number: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Card(
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=(int(major), int(minor)),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older bindings answer in bytes


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch_has_cuda() -> bool | None:
    """Whether the installed torch was built with CUDA; ``None`` without torch. It is not imported for that."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    libraries = Path(spec.submodule_search_locations[0]) / "lib"
    return any((libraries / name).exists() for name in ("libtorch_cuda.so", "torch_cuda.dll"))


def cpu_has_fast_bf16(flags: frozenset[str] | None) -> bool | None:
    """Whether a CPU with these flags (as Linux names them) multiplies in bf16; ``None`` if they are not known."""
    return None if flags is None else bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> frozenset[str] | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None  # no Linux
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86 and ARM
            return frozenset(value.split())
    return None


def _num_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory() -> int:
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        # A container's own limit, where there is one; "max" means none.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total
    return min(total, limit)


def _on_path(program: str) -> bool:
    """Whether a program is found on PATH or beside this Python, where the ranks look too."""
    return shutil.which(program) is not None or shutil.which(program, path=str(Path(sys.executable).parent)) is not None
