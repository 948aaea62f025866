"""DeepSpeed compiles its shared-memory operator for the CPU at first use: say so, instead of a silent minute."""

from __future__ import annotations

import time
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory


def prepare_cpu_operators(*, announce: bool) -> float:
    """Build (once for each machine and torch version) and load the operator that DeepSpeed's CPU backend uses.

    All ranks call this; the first builds, the others wait for its file lock. Returns the seconds it took.
    Source: ``deepspeed/comm/torch.py`` (``build_shm_op``) loads the same operator when the backend starts.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return 0.0
    begin = time.monotonic()
    if announce and not _is_built(builder.name):
        print("building DeepSpeed's shared-memory operator for the CPU: once on this machine, about a minute")
    builder.load(verbose=False)
    seconds = time.monotonic() - begin
    if announce and seconds > 2:
        print(f"operator ready after {seconds:.0f} s")
    return seconds


def _is_built(name: str) -> bool:
    folder = Path(_get_build_directory(name, verbose=False))
    return any(folder.glob(f"{name}*.so"))
