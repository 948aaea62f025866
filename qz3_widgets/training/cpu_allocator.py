"""Exact memory figures for the CPU: build, cache and install the counting allocator of ``cpu_allocator.cpp``.

It needs a C++ compiler, which DeepSpeed needs on the CPU anyway. Where there is none, :func:`install` returns ``None``
and the caller falls back to a walk over live tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("cpu_allocator.cpp")


class CountingAllocator:
    """Handle on the installed allocator of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the library's functions and install its allocator for all CPU tensors from now on."""
        self._allocated = library.qz3_allocated_bytes
        self._take_peak = library.qz3_take_peak_bytes
        self._owns = library.qz3_owns
        self._owns.argtypes = [ctypes.c_void_p]
        self._allocated.restype = ctypes.c_int64
        self._take_peak.restype = ctypes.c_int64
        library.qz3_install()

    def allocated_bytes(self) -> int:
        """Bytes in live CPU storages that torch allocated since the installation."""
        return int(self._allocated())

    def take_peak_bytes(self) -> int:
        """Largest :meth:`allocated_bytes` since the last call."""
        return int(self._take_peak())

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is one that this allocator counts."""
        return bool(self._owns(tensor.untyped_storage().data_ptr()))

    def adopt(self, model: torch.nn.Module) -> int:
        """Copy the model's tensors that live in foreign memory into counted memory; returns their bytes.

        safetensors hands out views of the memory-mapped file where no conversion is needed. A GPU run would copy them
        to its device: so does this, and the figures of a CPU run mean the same as a GPU's.
        """
        adopted = 0
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.numel() > 0 and not self.owns(tensor):
                tensor.data = tensor.data.clone()
                adopted += tensor.untyped_storage().nbytes()
        return adopted


def install(cache_dir: Path) -> CountingAllocator | None:
    """Build (once for each torch version) and install the allocator; ``None`` where it can't be built or loaded."""
    library = _library_path(cache_dir)
    if not library.exists() and not _build(library):
        return None
    try:
        return CountingAllocator(ctypes.CDLL(str(library)))
    except (OSError, AttributeError):
        return None


def _library_path(cache_dir: Path) -> Path:
    identity = f"{torch.__version__}|{torch.compiled_with_cxx11_abi()}|{_SOURCE.read_text(encoding='utf-8')}"
    return cache_dir / "native" / f"cpu_allocator-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _build(library: Path) -> bool:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return False
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Several ranks may build at once: each writes a file of its own, the last rename wins, all are the same.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [
                compiler, "-std=c++20", "-O2", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
                f"-I{root / 'include'}", str(_SOURCE), "-o", str(built), f"-L{root / 'lib'}", "-lc10",
                f"-Wl,-rpath,{root / 'lib'}",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            built.replace(library)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
