"""Configurations that were saved under a name, beside the runs: ``<runs folder>/configs/<name>.yaml``."""

from __future__ import annotations

import re
from pathlib import Path

from .io import save_config
from .schema import RunConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def saved_dir(runs_dir: str | Path) -> Path:
    """The folder of saved configurations."""
    return Path(runs_dir).expanduser() / "configs"


def list_saved(runs_dir: str | Path) -> list[Path]:
    """The saved configurations, by name; none, if the folder is not there or can't be read."""
    try:
        return sorted(path for path in saved_dir(runs_dir).iterdir() if path.suffix == ".yaml" and path.is_file())
    except OSError:
        return []


def save_named(config: RunConfig, runs_dir: str | Path, name: str, *, replace: bool = False) -> Path:
    """Save ``config`` as ``name``; returns the file.

    Raises:
        ValueError: no name for a file in this folder, or one that is taken and ``replace`` was not asked for.
        ConfigError: the file can't be written.
    """
    stem = name.strip().removesuffix(".yaml")
    if not _NAME.fullmatch(stem):
        raise ValueError(
            f"{name!r} is no name: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    path = saved_dir(runs_dir) / f"{stem}.yaml"
    if path.exists() and not replace:
        raise ValueError(f"{path} exists; choose another name, or tick replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path.parent} can't be made: {error.strerror or error}") from error
    save_config(config, path)
    return path
