"""Configurations as YAML: in with every problem at once, out with a comment above each field; an exact round trip."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .changes import apply_overrides, changed_fields, diff, from_plain, get_field, with_changes
from .problems import ConfigError, Problem, choices, is_choice
from .schema import SECTIONS, RunConfig
from .yaml_text import YamlError, dump_field, parse

__all__ = [
    "ConfigError",
    "Problem",
    "apply_overrides",
    "changed_fields",
    "diff",
    "dump_config",
    "from_plain",
    "get_field",
    "load_config",
    "loads_config",
    "save_config",
    "with_changes",
]


def load_config(path: str | Path) -> RunConfig:
    """Read a configuration from a YAML file: one of :func:`save_config`, or a run's ``run.yaml``.

    Raises:
        ConfigError: a file that can't be read, is no YAML, or does not fit the schema; it holds every problem.
    """
    file = Path(path).expanduser()
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError([Problem("", f"no such file{_beside(file)}")], str(path)) from error
    except IsADirectoryError as error:
        hint = "; it holds a run: name its run.yaml" if (file / "run.yaml").is_file() else "; name a YAML file"
        raise ConfigError([Problem("", f"is a folder{hint}")], str(path)) from error
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("", f"can't be read: {_reason(error)}")], str(path)) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem("", f"is not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8", line)
        raise ConfigError([problem], str(path)) from error
    return loads_config(text, source=str(path))


def loads_config(text: str, *, source: str = "<text>") -> RunConfig:
    """Read a configuration from YAML text; ``source`` heads the message of an error.

    Raises:
        ConfigError: no YAML, or it does not fit the schema; it holds every problem.
    """
    try:
        raw, lines = parse(text)
    except YamlError as error:
        raise ConfigError([Problem("", str(error))], source) from error
    if raw is None:
        raise ConfigError([Problem("", f"is empty; a configuration has the sections {', '.join(SECTIONS)}")], source)
    if isinstance(raw, Mapping) and isinstance(raw.get("resolved"), Mapping) and not raw.keys() & SECTIONS.keys():
        prefix = "resolved."
        lines = {key.removeprefix(prefix): line for key, line in lines.items() if key.startswith(prefix)}
        raw = raw["resolved"]
    return from_plain(raw, source=source, lines=lines)


def dump_config(config: RunConfig, *, only_changed: bool = False, base: RunConfig | None = None) -> str:
    """``config`` as YAML, in schema order, each field under a comment that says what it is.

    Args:
        config: what to write.
        only_changed: leave out what has the same value in ``base``.
        base: what to compare with; ``None`` means the defaults. Only those are filled in when the text is read again.
    """
    values = changed_fields(config, base) if only_changed else config.model_dump(mode="json")
    parts = [_field("name", RunConfig, values, "")] if "name" in values else []
    for section, model in SECTIONS.items():
        if section in values:
            head = f"# {(model.__doc__ or '').splitlines()[0]}\n{section}:\n"
            parts.append(
                head + "".join(_field(field, model, values[section], "  ", section) for field in values[section])
            )
    return "\n".join(parts) or "# every field has its default\n{}\n"


def save_config(
    config: RunConfig, path: str | Path, *, only_changed: bool = False, base: RunConfig | None = None
) -> None:
    """Write :func:`dump_config` to a file, whole or not at all.

    Raises:
        ConfigError: the file can't be written; the message says why.
    """
    file = Path(path).expanduser()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    text = dump_config(config, only_changed=only_changed, base=base)
    try:
        if file.is_dir():
            raise IsADirectoryError("is a folder; name a YAML file")
        try:
            partial.write_text(text, encoding="utf-8", newline="\n")
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError([Problem("", f"can't be written: {_reason(error)}")], str(path)) from error


def _field(field: str, model: Any, values: Mapping[str, Any], indent: str, section: str = "") -> str:
    info = model.model_fields[field]
    unit = info.json_schema_extra["unit"]
    comment = str(info.description)
    if unit:
        comment += f" Unit: {unit}."
    path = f"{section}.{field}" if section else field
    if is_choice(path):
        comment += f" Choices: {', '.join(map(str, choices(path)))}."
    return f"{indent}# {comment}\n{indent}{dump_field(field, values[field])}"


def _beside(file: Path) -> str:
    if not file.parent.is_dir():
        return f"; the folder {file.parent} does not exist either"
    others = sorted(entry.name for entry in file.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    return f"; the folder has {', '.join(others[:5])}" if others else ""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
