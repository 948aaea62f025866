"""Shapes of well-known models, as the ``config.json`` of each: for ``random:`` models, without a download.

What stands after ``random:`` is a shape's name, a ``config.json`` or a folder with one; ``@K`` behind it keeps only
K of the model's layers.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

RANDOM_PREFIX = "random:"
_FOLDER = Path(__file__).with_name("shape_files")
_DEPTH = re.compile(r"^(?P<name>.+)@(?P<layers>\d+)$")
# What hub ids add to a model's name: tuning, format and version, which do not change the shape.
_SUFFIXES = re.compile(r"-(instruct|it|pt|base|chat|hf|bnb-4bit|unsloth|v\d+(\.\d+)*|\d{4})\b")


def shape_names() -> tuple[str, ...]:
    """Names of the shapes that come with the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def shape_file(name_or_path: str) -> Path:
    """The ``config.json`` behind what stands after ``random:``, without its ``@K``.

    Raises:
        ValueError: no shape and no such file; the message names the nearest shape.
    """
    name, _ = split_depth(name_or_path)
    if name in shape_names():
        return _FOLDER / f"{name}.json"
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path / "config.json"
    if path.is_file():
        return path
    near = get_close_matches(name, shape_names(), n=1, cutoff=0.4)
    hint = f"; did you mean random:{near[0]}?" if near else "."
    raise ValueError(
        f"model.name_or_path: random:{name} is no known shape and no config.json{hint} "
        f"Known shapes: {', '.join(shape_names())}"
    )


def read_shape(name_or_path: str) -> dict[str, Any]:
    """The values of the ``config.json`` behind what stands after ``random:``, cut to ``@K`` layers.

    Raises:
        ValueError: no such shape, a file that is no configuration, or fewer layers than ``@K`` asks for.
    """
    file = shape_file(name_or_path)
    _, num_layers = split_depth(name_or_path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.name_or_path: {file} can't be read as a model's configuration: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"model.name_or_path: {file} is no model's configuration: it has no model_type")
    if num_layers is not None:
        _cut(values, num_layers, file)
    return values


def split_depth(name: str) -> tuple[str, int | None]:
    """What stands after ``random:`` without its ``@K``, and K; ``None`` if all layers are meant."""
    match = _DEPTH.match(name)
    return (match["name"], int(match["layers"])) if match else (name, None)


def shape_of_hub_id(hub_id: str) -> str | None:
    """The package's shape of a hub model: ``meta-llama/Llama-3.1-8B-Instruct`` is ``llama-3.1-8b``."""
    name = hub_id.rpartition("/")[2].lower().removeprefix("meta-")
    while True:
        if name in shape_names():
            return name
        shorter = _SUFFIXES.sub("", name)
        if shorter == name:
            return None
        name = shorter


def local_shape(name_or_path: str) -> str | None:
    """The folder of a local model, as ``random:`` takes it; ``None`` if it is none."""
    folder = Path(name_or_path).expanduser()
    return str(folder) if (folder / "config.json").is_file() else None


def _cut(values: dict[str, Any], num_layers: int, file: Path) -> None:
    field = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values), None)
    if field is None or not 1 <= num_layers <= int(values[field]):
        had = "an unknown number of" if field is None else values[field]
        raise ValueError(f"model.name_or_path: {file.stem} has {had} layers, and @{num_layers} asks for {num_layers}")
    values[field] = num_layers
    # One entry a layer, where a configuration spells the kinds of attention out.
    if isinstance(values.get("layer_types"), list):
        values["layer_types"] = values["layer_types"][:num_layers]
