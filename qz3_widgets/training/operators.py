"""DeepSpeed compiles its shared-memory operator for the CPU at first use: say so, instead of a silent minute."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from torch.utils import cpp_extension


def prepare_cpu_operators(*, announce: bool) -> float:
    """Build (once for each machine and torch version) and load the operator that DeepSpeed's CPU backend uses.

    All ranks call this; the first builds, the others wait for its file lock. Returns the seconds it took.
    Source: ``deepspeed/comm/torch.py`` (``build_shm_op``) loads the same operator when the backend starts.
    """
    from deepspeed.accelerator import get_accelerator

    # torch puts this folder into its linker command as it is: a space in the environment's path would end the word.
    if " " in cpp_extension.TORCH_LIB_PATH:
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
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
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    return any(folder.glob(f"{name}*.so"))
