"""Shapes of models: every parameter's size, what of it will be in 4 bit, and which layers are gathered together.

Those of the package's own shapes come with it, as tables. Others are read by a process of its own
(:mod:`.shape_reader`) from the model's class, once, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ..config.paths import default_cache_dir
from ..config.schema import RunConfig
from ..config.shapes import (
    RANDOM_PREFIX,
    local_shape,
    read_shape,
    shape_names,
    shape_of_hub_id,
    split_depth,
)

_TABLES = Path(__file__).with_name("shape_tables")
_FORMAT = 2  # of the tables and of what the cache holds
_READER_SECONDS = 300.0

Role = Literal["input", "output", "tied"]


@dataclass(frozen=True)
class Weight:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    linear: bool  # of a linear layer: an adapter can be attached to it
    quantized: bool
    role: Role | None = None  # an embedding: input, output (the head), or one for both

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that it belongs to."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Block:
    """Layers of a stack that are alike, one after the other."""

    stack: str
    kind: str  # name of the class
    count: int
    weights: tuple[Weight, ...]

    @cached_property
    def numel(self) -> int:
        """Elements of one layer."""
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True)
class ModelShape:
    """What of a model its memory depends on."""

    model_type: str
    kind: str  # name of the class
    facts: Mapping[str, Any]  # of the text part's configuration: hidden_size, num_attention_heads, ...
    buffer_bytes: int
    blocks: tuple[Block, ...]
    outside: tuple[Weight, ...]

    @cached_property
    def num_parameters(self) -> int:
        """All of them, a tied one once."""
        return sum(block.count * block.numel for block in self.blocks) + sum(each.numel for each in self.outside)

    @cached_property
    def num_quantized(self) -> int:
        """Those in 4 bit."""
        return sum(count * each.numel for each, count in self.weights() if each.quantized)

    @cached_property
    def main(self) -> tuple[Block, ...]:
        """The decoder: the stack with as many layers as the configuration says, or the largest."""
        sizes: dict[str, int] = {}
        for block in self.blocks:
            sizes[block.stack] = sizes.get(block.stack, 0) + block.count * block.numel
        largest = max(sizes, key=lambda stack: sizes[stack], default="")
        return tuple(block for block in self.blocks if block.stack == largest)

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return sum(block.count for block in self.main)

    @cached_property
    def embedding(self) -> Weight | None:
        """The input embedding."""
        return next((each for each in self.outside if each.role in ("input", "tied")), None)

    @cached_property
    def head(self) -> Weight | None:
        """The output embedding, which may be the input's."""
        return next((each for each in self.outside if each.role in ("output", "tied")), None)

    def weights(self) -> Iterable[tuple[Weight, int]]:
        """Every parameter with how often it is there."""
        for block in self.blocks:
            for weight in block.weights:
                yield weight, block.count
        for weight in self.outside:
            yield weight, 1

    def fact(self, name: str) -> int:
        """A number of the model's configuration; 0 where there is none."""
        return int(self.facts.get(name) or 0)

    def with_layers(self, num_layers: int) -> ModelShape:
        """Only the first ``num_layers`` of the decoder."""
        left, blocks = num_layers, []
        for block in self.blocks:
            if block not in self.main:
                blocks.append(block)
            elif left > 0:
                blocks.append(replace(block, count=min(left, block.count)))
                left -= block.count
        facts = {**self.facts, "num_hidden_layers": num_layers}
        return replace(self, blocks=tuple(blocks), facts=facts)

    def without_quantization(self) -> ModelShape:
        """The same model, all of it in 16 bit."""
        plain = tuple(
            replace(block, weights=tuple(replace(weight, quantized=False) for weight in block.weights))
            for block in self.blocks
        )
        return replace(self, blocks=plain, outside=tuple(replace(weight, quantized=False) for weight in self.outside))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ModelShape:
        """Back from the reader's answer."""
        return cls(
            model_type=content["model_type"],
            kind=content["class"],
            facts=content["facts"],
            buffer_bytes=content["buffer_bytes"],
            blocks=tuple(
                Block(each["stack"], each["class"], each["count"], _weights(each["weights"]))
                for each in content["blocks"]
            ),
            outside=_weights(content["outside"]),
        )


def known_shape(config: RunConfig) -> ModelShape | None:
    """The shape of a run's model if it is at hand: a table of the package, or read before. Takes milliseconds."""
    request = _request(config)
    if request is None:
        return None
    found = _kept(request)
    return found if found is None else _cut(found, request)


def model_shape(config: RunConfig) -> ModelShape:
    """The shape of a run's model; what is not at hand is read from its class, which takes some ten seconds once.

    Raises:
        ValueError: it can't be told without a download, or transformers has no such model.
    """
    request = _request(config)
    if request is None:
        raise ValueError(
            f"model.name_or_path: the shape of {config.model.name_or_path} is not known here, and nothing is "
            "downloaded; name a folder with its config.json, or random:<path of a config.json>"
        )
    found = _kept(request)
    if found is None:
        (content,) = _ask([request])
        _keep(request, content)
        found = ModelShape.from_json(content)
    return _cut(found, request)


def can_be_known(config: RunConfig) -> bool:
    """Whether :func:`model_shape` has something to read: a table, a local folder, or a ``config.json``."""
    return _request(config) is not None


def write_tables(folder: Path = _TABLES) -> list[Path]:
    """Read the package's own shapes from their classes and write them as tables; for its developers."""
    requests = [_Request(name, read_shape(name), None, True, None) for name in shape_names()]
    folder.mkdir(exist_ok=True)
    written = []
    for request, content in zip(requests, _ask(requests), strict=True):
        path = folder / f"{request.name}.json"
        path.write_text(json.dumps({"format": _FORMAT, **content}, separators=(",", ":")) + "\n", encoding="utf-8")
        written.append(path)
    return written


@dataclass(frozen=True)
class _Request:
    """A model's configuration, and what decides which of its layers are quantized."""

    name: str | None  # of a shape of the package
    values: dict[str, Any]  # of the whole model's config.json
    skip_modules: tuple[str, ...] | None
    quantize: bool
    num_layers: int | None

    @property
    def has_table(self) -> bool:
        return self.name is not None and (self.skip_modules is None or not self.quantize)

    @property
    def key(self) -> str:
        try:
            libraries = [version("transformers"), version("bitsandbytes")]
        except PackageNotFoundError:
            libraries = []
        parts = [_FORMAT, self.values, self.skip_modules, self.quantize, libraries]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _request(config: RunConfig) -> _Request | None:
    name, quantization = config.model.name_or_path, config.quantization
    if name.startswith(RANDOM_PREFIX):
        given = name.removeprefix(RANDOM_PREFIX)
    else:
        found = local_shape(name) or shape_of_hub_id(name)
        if found is None:
            return None
        given = found
    whole, num_layers = split_depth(given)
    try:
        values = read_shape(whole)
        known = whole if whole in shape_names() else None
    except ValueError:
        return None
    return _Request(known, values, quantization.llm_int8_skip_modules, quantization.load_in_4bit, num_layers)


def _cut(shape: ModelShape, request: _Request) -> ModelShape:
    return shape if request.num_layers is None else shape.with_layers(request.num_layers)


def _kept(request: _Request) -> ModelShape | None:
    path = _TABLES / f"{request.name}.json" if request.has_table else _cache_path(request)
    try:
        found = _read(path, path.stat().st_mtime_ns)
        return found if request.quantize else found.without_quantization()
    except (OSError, ValueError, KeyError, TypeError):  # not there, torn, or of another version: it is read anew
        return None


@lru_cache(maxsize=64)
def _read(path: Path, _modified: int) -> ModelShape:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path}: another format")
    return ModelShape.from_json(content)


def _keep(request: _Request, content: Mapping[str, Any]) -> None:
    path = _cache_path(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"format": _FORMAT, **content}), encoding="utf-8")
        partial.replace(path)
    except OSError:  # a cache that can't be written costs time, and nothing else
        return


def _cache_path(request: _Request) -> Path:
    return default_cache_dir() / "shapes" / f"{request.key}.json"


def _ask(requests: Sequence[_Request]) -> list[dict[str, Any]]:
    asked = [{"values": each.values, "skip_modules": each.skip_modules, "quantize": each.quantize} for each in requests]
    # -P: what happens to lie in the working directory is not imported; the package is found where this one is.
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from {__package__}.shape_reader import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_READER_SECONDS,
        check=False,
    )
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ValueError(f"model.name_or_path: the model's shape can't be read: {last}") from None
    for answer in answers:
        if "error" in answer:
            raise ValueError(f"model.name_or_path: the model's shape can't be read: {answer['error']}")
    return answers


def _weights(entries: Iterable[Mapping[str, Any]]) -> tuple[Weight, ...]:
    return tuple(
        Weight(each["name"], tuple(each["shape"]), each["linear"], each["quantized"], each["role"]) for each in entries
    )
