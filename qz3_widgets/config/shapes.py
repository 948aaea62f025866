"""Shapes of well-known models, as the ``config.json`` of each: for ``random:`` models, without a download."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

_FOLDER = Path(__file__).with_name("shape_files")


def shape_names() -> tuple[str, ...]:
    """Names of the shapes that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def shape_file(name_or_path: str) -> Path:
    """The ``config.json`` behind what stands after ``random:``: a known shape's name, a file, or a folder with one.

    Raises:
        ValueError: neither; the message names the nearest shape.
    """
    known = _FOLDER / f"{name_or_path}.json"
    if name_or_path in shape_names():
        return known
    path = Path(name_or_path).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    near = get_close_matches(name_or_path, shape_names(), n=1, cutoff=0.4)
    hint = f"; did you mean random:{near[0]}?" if near else ""
    raise ValueError(
        f"model.name_or_path: random:{name_or_path} is no known shape and no config.json{hint} "
        f"Known shapes: {', '.join(shape_names())}"
    )
