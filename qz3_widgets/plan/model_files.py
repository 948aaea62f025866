"""Whether the base model can be loaded: a folder is whole, a ``random:`` shape is known, a hub id is well-formed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.data_layout import looks_like_path
from ..config.paths import default_cache_dir
from ..config.schema import RunConfig
from ..config.shapes import read_shape, shape_file
from .issue import Issue

FIELD = "model.name_or_path"
RANDOM_PREFIX = "random:"
BYTE_TOKENS = 259
"""Tokens of the byte tokenizer that random models without a tokenizer of their own get."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def local_folder(name_or_path: str) -> Path | None:
    """The folder that a model or tokenizer name means, or ``None`` for a hub id."""
    path = Path(name_or_path).expanduser()
    return path if path.is_dir() else None


def check_model(config: RunConfig) -> Iterator[Issue]:
    """Issues of ``model.name_or_path``. The hub is never asked."""
    name = config.model.name_or_path
    if name.startswith(RANDOM_PREFIX):
        yield from _check_random(config)
    elif (folder := local_folder(name)) is not None:
        yield from _check_folder(folder, config)
    elif Path(name).expanduser().is_file():
        yield _error("model-not-a-folder", f"{name} is a file; name the folder that holds the model's config.json")
    elif looks_like_path(name):
        yield _error(
            "model-not-found", f"there is no folder {name}{_neighbours(Path(name).expanduser())}{demo_hint(name)}"
        )
    elif not _HUB_ID.match(name):
        yield _error(
            "model-name", f"{name!r} is neither a folder nor a hub id such as meta-llama/Llama-3.1-8B, nor random:..."
        )


def _error(rule: str, message: str) -> Issue:
    return Issue(rule, "error", FIELD, message)


def _check_random(config: RunConfig) -> Iterator[Issue]:
    try:
        file = shape_file(config.model.name_or_path.removeprefix(RANDOM_PREFIX))
    except ValueError as error:
        yield _error("model-shape-unknown", str(error).removeprefix(f"{FIELD}: "))
        return
    shape = read_json(file)
    if isinstance(shape, str):
        yield _error("model-config", f"{file} {shape}")
        return
    if "model_type" not in shape:
        yield _error("model-config", f"{file} names no model_type")
    else:
        try:
            read_shape(config.model.name_or_path.removeprefix(RANDOM_PREFIX))
        except ValueError as error:  # more layers wanted than the shape has
            yield _error("model-depth", str(error).removeprefix(f"{FIELD}: "))
    text_part = shape.get("text_config")
    size = (text_part if isinstance(text_part, dict) else shape).get("vocab_size")
    if config.model.tokenizer_name_or_path is None and isinstance(size, int) and size < BYTE_TOKENS:
        yield _error(
            "model-vocabulary",
            f"vocab_size of {file.name} is {size}; the byte tokenizer of random models needs {BYTE_TOKENS} or more",
        )


def _check_folder(folder: Path, config: RunConfig) -> Iterator[Issue]:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            hint = "it holds a LoRA adapter; name the base model that it was trained on"
        elif any(folder.glob("*.gguf")):
            hint = "it holds a GGUF file; convert it to a transformers checkpoint first"
        else:
            hint = "name the folder that a model was saved or downloaded to"
        yield _error("model-config", f"{folder} has no config.json: {hint}")
        return
    shape = read_json(folder / "config.json")
    if isinstance(shape, str):
        yield _error("model-config", f"{folder / 'config.json'} {shape}")
        return
    if "model_type" not in shape:
        yield _error("model-config", f"{folder / 'config.json'} names no model_type")
    yield from _check_weights(folder)
    yield from _check_quantized(shape, config)
    if config.model.revision is not None:
        yield Issue(
            "revision-without-hub",
            "warning",
            "model.revision",
            f"has no effect: {folder} is a local folder",
            {"model.revision": None},
        )


def _check_weights(folder: Path) -> Iterator[Issue]:
    for index in _INDEXES:
        if (folder / index).is_file():
            content = read_json(folder / index)
            names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(names, dict):
                yield _error(
                    "model-weights", f"{folder / index} {content if isinstance(content, str) else 'has no weight_map'}"
                )
                return
            shards = sorted(set(names.values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
                yield _error(
                    "model-weights",
                    f"{len(missing)} of {len(shards)} weight files that {index} names are not in {folder} ({some}); "
                    "finish the download",
                )
            files = [folder / shard for shard in shards if shard not in missing]
            break
    else:
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
        if not files:
            yield _error("model-weights", f"{folder} has no weights (*.safetensors or pytorch_model*.bin)")
    for file in files:
        if fault := _weight_fault(file):
            yield _error("model-weights", f"{file} {fault}")
            return


def _weight_fault(file: Path) -> str:
    """What is wrong with a weight file, as far as its size and header tell, or an empty text."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        begin = stream.read(8)
        if begin == b"version ":
            return "is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
        if file.suffix != ".safetensors":
            return "is empty" if size == 0 else ""
        length = int.from_bytes(begin, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            return f"is cut off or no safetensors file ({size} bytes); finish the download"
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is no safetensors file: its header can't be read"
    if 8 + length + end > size:
        return f"is cut off: it should have {8 + length + end} bytes and has {size}; finish the download"
    return ""


def _check_quantized(shape: dict[str, Any], config: RunConfig) -> Iterator[Issue]:
    given = shape.get("quantization_config")
    if not isinstance(given, dict):
        return
    method = str(given.get("quant_method", "an unknown method"))
    if method == "bitsandbytes" and given.get("load_in_4bit", False):
        yield Issue(
            "model-quantized",
            "warning",
            FIELD,
            "the checkpoint is quantized to 4 bit already, and its own settings win over quantization.*",
        )
    elif config.quantization.load_in_4bit:
        yield _error(
            "model-quantized", f"the checkpoint is quantized by {method}; 4-bit QLoRA needs the original weights"
        )


def demo_hint(path: str) -> str:
    """What to do about a missing file of the demo; empty for any other path."""
    in_cache = default_cache_dir() in Path(path).expanduser().parents
    return "; 'qz3 demo' unpacks it" if in_cache else ""


def read_json(file: Path) -> dict[str, Any] | str:
    """A JSON object from a file, or what is wrong with the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return f"can't be read: {error.strerror or error}"
    except ValueError as error:  # JSON's and UTF-8's errors alike
        return f"is not valid JSON: {error}"
    return value if isinstance(value, dict) else "is not a JSON object"


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    others = sorted(entry.name for entry in path.parent.iterdir() if (entry / "config.json").is_file())
    return f"; {path.parent} has {', '.join(others[:4])}" if others else ""
