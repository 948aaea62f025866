"""What is wrong with a configuration, in plain words: every problem at once, each tied to its field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ValidationError

from .schema import SECTIONS, RunConfig, field_paths

# Names from the libraries' own arguments and from other tools, where spelling alone would not lead to our field.
_KNOWN_AS: dict[str, str] = {
    "alpha": "lora.lora_alpha",
    "attention": "model.attn_implementation",
    "batch_size": "training.per_device_train_batch_size",
    "bf16": "training.precision",
    "dataset": "data.source",
    "dropout": "lora.lora_dropout",
    "epochs": "training.num_train_epochs",
    "flash_attention": "model.attn_implementation",
    "fp16": "training.precision",
    "gradient_checkpointing": "training.activation_checkpointing",
    "lora_r": "lora.r",
    "lr": "training.learning_rate",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "mixed_precision": "training.precision",
    "model_name_or_path": "model.name_or_path",
    "num_gpus": "launch.num_processes",
    "optimizer": "training.optim",
    "rank": "lora.r",
    "steps": "training.max_steps",
    "torch_dtype": "model.dtype",
    "use_flash_attention_2": "model.attn_implementation",
    "world_size": "launch.num_processes",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. ``field`` is ``section.field``; empty if it concerns the whole text or file."""

    field: str
    message: str
    line: int | None = None  # of the text that it came from, counted from 1

    def __str__(self) -> str:
        place = f" (line {self.line})" if self.line is not None else ""
        return f"{self.field}: {self.message}{place}" if self.field else f"{self.message}{place}"


class ConfigError(ValueError):
    """A configuration that can't be used. :attr:`problems` holds all that is wrong with it."""

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        """``source`` is the file, or whatever the configuration came from; it heads the message."""
        self.problems = list(problems)
        self.source = source
        head = f"{source}: " if source else ""
        if len(self.problems) == 1:
            text = f"{head}{self.problems[0]}"
        else:
            lines = [f"{head}{len(self.problems)} problems", *(str(problem) for problem in self.problems)]
            text = "\n  ".join(lines)
        super().__init__(text)


def unknown_field(path: str, line: int | None = None) -> Problem:
    """The problem of a name that the schema lacks, with the nearest one that it has."""
    near = nearest(path)
    if near is not None:
        return Problem(path, f"no such field; did you mean {near}?", line)
    section = path.partition(".")[0]
    names = SECTIONS[section].model_fields if section in SECTIONS else ("name", *SECTIONS)
    where = f"{section} has" if section in SECTIONS else "there are"
    return Problem(path, f"no such field; {where} {', '.join(names)}", line)


def nearest(path: str) -> str | None:
    """The real field (or section) that ``path`` probably means, or ``None``.

    A field of the same name in another section comes first, then a similar name in its own, then anywhere.
    """
    section, dot, name = path.partition(".")
    if not dot:
        section, name = "", path
    names = [known for known in field_paths() if "." in known]
    leaves = {known.partition(".")[2]: known for known in names}  # unique over the sections, a test sees to it
    if name in leaves:
        return leaves[name]
    if section in SECTIONS:
        own = get_close_matches(name, SECTIONS[section].model_fields, n=1, cutoff=0.7)
        if own:
            return f"{section}.{own[0]}"
    if not dot and (similar := get_close_matches(name, ("name", *SECTIONS), n=1, cutoff=0.7)):
        return similar[0]
    if dot and section not in SECTIONS and (similar := get_close_matches(section, SECTIONS, n=1, cutoff=0.6)):
        fields = get_close_matches(name, SECTIONS[similar[0]].model_fields, n=1, cutoff=0.6)
        if fields:
            return f"{similar[0]}.{fields[0]}"
    if name in _KNOWN_AS:
        return _KNOWN_AS[name]
    anywhere = get_close_matches(name, leaves, n=1, cutoff=0.7)
    if anywhere:
        return leaves[anywhere[0]]
    if section in SECTIONS:
        own = get_close_matches(name, SECTIONS[section].model_fields, n=1, cutoff=0.5)
        return f"{section}.{own[0]}" if own else None
    return None


@cache
def _fragments(path: str) -> tuple[dict[str, Any], ...]:
    section, _, field = path.partition(".")
    model = SECTIONS[section] if field else RunConfig
    fragment = model.model_json_schema()["properties"][field or section]
    return tuple(fragment.get("anyOf", [fragment]))


def accepts_text(path: str) -> bool:
    """Whether the field takes free text: neither a choice nor a number."""
    return any(part.get("type") == "string" and not {"enum", "const"} & part.keys() for part in _fragments(path))


def accepts_null(path: str) -> bool:
    """Whether the field may be empty."""
    return any(part.get("type") == "null" for part in _fragments(path))


def choices(path: str) -> tuple[Any, ...]:
    """The fixed values that the field takes: all there are if it is a field of choices, else special ones like auto."""
    return tuple(
        value for part in _fragments(path) for value in part.get("enum", [part["const"]] if "const" in part else [])
    )


def is_choice(path: str) -> bool:
    """Whether the field takes nothing but :func:`choices`."""
    return all({"enum", "const"} & part.keys() for part in _fragments(path))


def kinds(path: str) -> frozenset[str]:
    """What the field takes, as JSON types; ``"choice"`` stands for fixed values."""
    return frozenset(
        "choice" if {"enum", "const"} & part.keys() else str(part.get("type", "string")) for part in _fragments(path)
    )


def allowed(path: str) -> str:
    """What the field takes, in words: ``"a whole number from 1 to 1024"``, ``"one of nf4, fp4"``."""
    return ", or ".join(_describe(part) for part in _fragments(path))


def _describe(part: Mapping[str, Any]) -> str:
    if "enum" in part:
        return f"one of {', '.join(map(str, part['enum']))}"
    if "const" in part:
        return str(part["const"])
    if "pattern" in part:
        return "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    kind = part["type"]
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(part)
    return {
        "string": "text" if not part.get("minLength") else "text that is not empty",
        "boolean": "true or false",
        "array": "a list of names",
        "object": "a mapping of names to texts",
        "null": "null",
    }[str(kind)]


def _bounds(part: Mapping[str, Any]) -> str:
    low, high = part.get("minimum"), part.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = [
        f"of at least {low:g}" if low is not None else "",
        f"above {part['exclusiveMinimum']:g}" if "exclusiveMinimum" in part else "",
        f"at most {high:g}" if high is not None else "",
        f"below {part['exclusiveMaximum']:g}" if "exclusiveMaximum" in part else "",
    ]
    found = [word for word in words if word]
    return f" {' and '.join(found)}" if found else ""


def show(value: Any) -> str:
    """A value as a message shows it: as YAML would spell it, cut to one short line."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_value(path: str, value: Any, line: int | None = None) -> Problem:
    """The problem of a value that the field does not take: what was given, and what is allowed."""
    given = f"the text {show(value)}" if isinstance(value, str) and not is_choice(path) else show(value)
    hint = ""
    listed = any(part.get("type") == "array" for part in _fragments(path))
    if isinstance(value, str) and (near := get_close_matches(value, [str(c) for c in choices(path)], n=1, cutoff=0.6)):
        hint = f"; did you mean {near[0]}?"
    elif isinstance(value, str) and listed:
        hint = f"; a list is written [{', '.join(part.strip() for part in value.split(','))}]"
    elif accepts_text(path) and isinstance(value, int | float):
        hint = "; put it in quotes to make it text"
    return Problem(path, f"must be {allowed(path)}, not {given}{hint}", line)


def translate(error: ValidationError, raw: Mapping[str, Any], lines: Mapping[str, int]) -> list[Problem]:
    """Pydantic's complaints about ``raw`` as problems in our words, one for each field.

    Args:
        error: what validating ``raw`` raised.
        raw: the configuration as given, sections of fields.
        lines: ``section.field`` to the line on which it stands, where known.
    """
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        where = [str(part) for part in detail["loc"]]
        # Below a section's field come parts of unions and positions in lists: the field is what the user sees.
        path = ".".join(where[:2]) if where[:1] and where[0] in SECTIONS else ".".join(where[:1])
        if path in problems:
            continue
        line = lines.get(path)
        kind = detail["type"]
        if kind == "extra_forbidden":
            problems[path] = unknown_field(path, line)
        elif path in SECTIONS:
            problems[path] = Problem(path, f"must hold fields, one 'field: value' a line, not {show(raw[path])}", line)
        elif kind == "value_error":
            problems[path] = Problem(path, str(detail["ctx"]["error"]), line)
        elif path == "launch.environment" and len(where) > 2:
            problems[path] = Problem(
                path, f"{where[2]} must be text, not {show(detail['input'])}; put it in quotes to make it text", line
            )
        else:
            problems[path] = wrong_value(path, _at(raw, path), line)
    # In the order of the text; what has no line (a value that is left out) comes last.
    return sorted(problems.values(), key=lambda problem: problem.line or math.inf)


def _at(raw: Mapping[str, Any], path: str) -> Any:
    section, _, field = path.partition(".")
    return raw[section][field] if field else raw[section]
