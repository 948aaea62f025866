"""DeepSpeed compiles its shared-memory operator for the CPU at first use: say so, instead of a silent minute."""

from __future__ import annotations

import fcntl
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from ..config.paths import default_cache_dir


def prepare_cpu_operators(*, announce: bool) -> float:
    """Build (once for each machine and torch version) and load the operator that DeepSpeed's CPU backend uses.

    All ranks call this; the first builds, the others wait for it. Returns the seconds it took.
    Source: ``deepspeed/comm/torch.py`` (``build_shm_op``) loads the same operator when the backend starts.
    """
    # torch puts this folder into its linker command as it is: a space in the environment's path would end the word.
    if Path(cpp_extension.TORCH_LIB_PATH).exists():  # quoted, it names nothing: once is enough
        cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)
    builder = _builder()
    if builder is None:
        return 0.0
    begin = time.monotonic()
    if announce and not _is_built(builder.name):
        print("building DeepSpeed's shared-memory operator for the CPU: once on this machine, about a minute")
    with alone(Path(cpp_extension._get_build_directory(builder.name, verbose=False))):
        builder.load(verbose=False)
    seconds = time.monotonic() - begin
    if announce and seconds > 2:
        print(f"operator ready after {seconds:.0f} s")
    return seconds


def are_missing() -> bool:
    """Whether :func:`prepare_cpu_operators` will have to build."""
    builder = _builder()
    return builder is not None and not _is_built(builder.name)


def _builder() -> Any:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return builder if builder is not None and builder.is_compatible(verbose=False) else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only one that builds in ``folder``, and take away what a build that was cut short has left.

    torch's own lock is a file, and whoever finds it waits until it is gone: after a run that was ended while it built,
    every later one would wait for ever (``torch/utils/file_baton.py``). This lock goes with the process that holds it.
    """
    with open(folder.parent / f"{folder.name}.build-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # In a folder that is the user's own somebody else may be building.
        if folder.is_relative_to(default_cache_dir()):
            (folder / "lock").unlink(missing_ok=True)
        yield


def _is_built(name: str) -> bool:
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    return any(folder.glob(f"{name}*.so"))
