"""The schema as a form: for each field the kind of control it needs, and its value as text and back.

Nothing here is typed twice: kinds, choices, units, bounds and help all come from the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from .problems import ConfigError, Problem, accepts_null, allowed, choices, kinds
from .schema import SECTIONS, RunConfig
from .yaml_text import YamlError, parse

Kind = Literal["switch", "choice", "number", "names", "mapping", "text"]


@dataclass(frozen=True)
class FormField:
    """One field as a form shows it."""

    path: str
    """``section.field``, or ``name``."""
    kind: Kind
    choices: tuple[Any, ...]
    """All values of a ``choice``; of other kinds those that are no number, list or text, such as ``auto``."""
    optional: bool
    """Whether it may be empty (``None``)."""
    unit: str | None
    help: str
    allowed: str
    """What it takes, in words."""
    rare: bool
    """Whether a form folds it away."""
    default: Any

    @property
    def label(self) -> str:
        """The field's own name."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        """The section's name; empty for ``name``."""
        return self.path.rpartition(".")[0]

    def matches(self, words: str) -> bool:
        """Whether every word stands in its path, help, unit or choices."""
        text = f"{self.path} {self.help} {self.unit or ''} {' '.join(map(str, self.choices))}".lower()
        return all(word in text for word in words.lower().split())

    def show(self, value: Any) -> str:
        """A value as the text that :meth:`read` reads."""
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value))
        if isinstance(value, Mapping):
            return "\n".join(f"{name}={text}" for name, text in value.items())
        if isinstance(value, float):
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        return str(value)

    def read(self, text: str) -> Any:
        """The plain value that ``text`` stands for; whether the field takes it is for the schema to say.

        Raises:
            ConfigError: it stands for no value of this kind; names the field, and what it takes.
        """
        stripped = text.strip()
        if not stripped and self.optional:
            return None
        if self.kind == "text":
            return stripped
        if self.kind == "mapping":
            return self._read_mapping(text)
        for choice in self.choices:
            if stripped == self.show(choice):
                return choice
        if self.kind == "names" and not stripped.startswith("["):
            return [name for part in stripped.split(",") if (name := part.strip())]
        try:
            return parse(stripped)[0]
        except YamlError as error:
            raise self._refuse(f"must be {self.allowed}, not {stripped!r}") from error

    def _read_mapping(self, text: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in filter(None, map(str.strip, text.splitlines())):
            name, equals, value = line.partition("=")
            if not equals or not name.strip():
                raise self._refuse(f"needs one NAME=value on each line, not {line!r}")
            found[name.strip()] = value.strip()
        return found

    def _refuse(self, message: str) -> ConfigError:
        return ConfigError([Problem(self.path, message)], "form")


@dataclass(frozen=True)
class FormSection:
    """One section of the schema with its fields, in order."""

    name: str
    help: str
    fields: tuple[FormField, ...]


@cache
def form_sections() -> tuple[FormSection, ...]:
    """All sections, in the schema's order; ``name`` is not among them."""
    return tuple(
        FormSection(
            name=name,
            help=(model.__doc__ or "").splitlines()[0],
            fields=tuple(_field(f"{name}.{field}", model.model_fields[field]) for field in model.model_fields),
        )
        for name, model in SECTIONS.items()
    )


@cache
def form_fields() -> Mapping[str, FormField]:
    """Path to field, in schema order, ``name`` first."""
    found = {"name": _field("name", RunConfig.model_fields["name"])}
    return found | {field.path: field for section in form_sections() for field in section.fields}


def summary(config: RunConfig, section: str) -> str:
    """The values of a section that say most, in a few words: what a folded section shows."""
    values = config.model_dump(mode="json")
    return ", ".join(filter(None, _SUMMARIES[section](values[section])))


def _name(path: str) -> str:
    return str(path).rstrip("/").rsplit("/", 1)[-1]


_SUMMARIES: Mapping[str, Any] = {
    "model": lambda s: (_name(s["name_or_path"]), s["dtype"], f"{s['load_strategy']} load"),
    "quantization": lambda s: (
        (
            s["bnb_4bit_quant_type"],
            "double" if s["bnb_4bit_use_double_quant"] else "single",
            s["bnb_4bit_quant_storage"],
        )
        if s["load_in_4bit"]
        else ("off: 16-bit LoRA",)
    ),
    "lora": lambda s: (
        f"r {s['r']}",
        s["target_modules"] if isinstance(s["target_modules"], str) else f"{len(s['target_modules'])} modules",
    ),
    "zero": lambda s: (
        f"stage {s['zero_stage']}",
        "" if s["offload_param_device"] == "none" else "shards in host memory",
        "" if s["release_gathered"] or s["zero_stage"] != 3 else "gathered layers kept",
    ),
    "data": lambda s: (_name(s["source"]), f"{s['max_length']} tokens", "packed" if s["packing"] else ""),
    "training": lambda s: (
        f"batch {s['per_device_train_batch_size']} x {s['gradient_accumulation_steps']}",
        f"{s['max_steps']} steps" if s["max_steps"] else f"{s['num_train_epochs']:g} epochs",
        "" if s["activation_checkpointing"] != "none" else "no checkpointing",
    ),
    "launch": lambda s: (
        f"{s['num_processes']} rank{'s' if s['num_processes'] != 1 else ''}",
        "" if s["device"] == "auto" else s["device"],
        "" if s["num_machines"] == 1 else f"{s['num_machines']} machines",
    ),
}


def _field(path: str, info: Any) -> FormField:
    found = kinds(path)
    special = choices(path)
    kind: Kind
    if found <= {"choice", "boolean", "null"} and "choice" in found:
        kind, special = "choice", special + ((True, False) if "boolean" in found else ())
    elif found == {"boolean"}:
        kind = "switch"
    elif found & {"integer", "number"}:
        kind = "number"
    else:
        named: dict[str, Kind] = {"array": "names", "object": "mapping"}
        kind = next((control for name, control in named.items() if name in found), "text")
    extra = info.json_schema_extra
    return FormField(
        path=path,
        kind=kind,
        choices=special,
        optional=accepts_null(path),
        unit=extra["unit"],
        help=str(info.description),
        allowed=allowed(path),
        rare=bool(extra["rare"]),
        default=json.loads(json.dumps(info.default)),
    )
