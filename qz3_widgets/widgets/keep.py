"""Where panels write what is kept of runs: the folder ``exports`` beside them, never over something else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..plotting.view import FigureView

_KINDS = (".svg", ".png", ".csv")


def free_path(runs_dir: Path, stem: str, suffix: str) -> Path:
    """A file in the folder of exports that does not exist yet: a number is added if need be.

    Raises:
        ValueError: the folder can't be made.
    """
    folder = runs_dir.expanduser() / "exports"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} can't be made: {error.strerror or error}") from error
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "runs"
    for number in range(1, 10_000):
        path = folder / f"{safe[:100]}{f'-{number}' if number > 1 else ''}{suffix}"
        if not path.exists():
            return path
    raise ValueError(f"{folder} holds 10,000 files of this name; remove some")


def keep_figures(runs_dir: Path, stem: str, figures: Mapping[str, FigureView]) -> list[Path]:
    """Write each figure as SVG, PNG and CSV; returns the files.

    Raises:
        ValueError: a file can't be written.
    """
    return [view.save(free_path(runs_dir, f"{stem}-{name}", kind)) for name, view in figures.items() for kind in _KINDS]
