"""What a run was made from: versions, hardware, command, git state. Secrets are taken out of everything written."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .alive import this_host
from .secrets import redact, redact_argv, redact_tree
from .status import utc_now

if TYPE_CHECKING:
    from ..plan.plan import Plan

__all__ = ["PACKAGES", "git_state", "manifest", "package_versions", "redact", "redact_argv", "redact_tree"]

PACKAGES = (
    "qz3-widgets", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "trl", "datasets",
    "tokenizers", "safetensors", "numpy", "pandas", "pydantic", "flash-attn", "triton", "nvidia-nccl-cu12",
)  # fmt: skip
"""Distributions whose versions a manifest names; those that are not installed are left out."""


def manifest(plan: Plan, argv: Sequence[str], *, cwd: Path | None = None) -> dict[str, Any]:
    """The content of ``manifest.json`` for a run of ``plan`` that is started with ``argv``, without secrets."""
    folder = Path.cwd() if cwd is None else cwd
    return {
        "schema_version": 1,
        "created": utc_now(),
        "argv": redact_argv(argv),
        "started_from": redact_argv(sys.argv),
        "cwd": redact(str(folder)),
        "git": git_state(folder),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": this_host(),
        "packages": package_versions(),
        "hardware": redact_tree(
            {key: value for key, value in plan.capabilities.to_json().items() if key != "versions"}
        ),
    }


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the installed ones among ``names``, without importing any."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and whether there are changes; ``None`` outside a repository, without commits or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
