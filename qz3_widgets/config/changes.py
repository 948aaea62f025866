"""One configuration from another: differences, changed fields, and ``section.field=value`` from a command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from .problems import ConfigError, Problem, accepts_null, accepts_text, show, translate, unknown_field
from .schema import SECTIONS, RunConfig, field_paths
from .yaml_text import YamlError, parse


def get_field(config: RunConfig, path: str) -> Any:
    """The value of ``section.field`` (or of ``name``).

    Raises:
        ConfigError: no such field; the message names the nearest.
    """
    if path not in field_paths():
        raise ConfigError([unknown_field(path)])
    section, _, field = path.partition(".")
    return getattr(getattr(config, section), field) if field else getattr(config, section)


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, in schema order: ``{"section.field": (value in a, value in b)}``."""
    pairs = {path: (get_field(a, path), get_field(b, path)) for path in field_paths()}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def changed_fields(config: RunConfig, base: RunConfig | None = None) -> dict[str, Any]:
    """What differs from ``base`` (``None``: from the defaults) as nested plain values, ready for YAML or JSON."""
    whole = config.model_dump(mode="json")
    result: dict[str, Any] = {}
    for path in diff(base if base is not None else RunConfig(), config):
        section, _, field = path.partition(".")
        if field:
            result.setdefault(section, {})[field] = whole[section][field]
        else:
            result[section] = whole[section]
    return result


def from_plain(
    raw: Any, *, source: str = "<values>", lines: Mapping[str, int] | None = None, problems: Iterable[Problem] = ()
) -> RunConfig:
    """A configuration from nested plain values, as YAML and JSON give them; fields left out have their defaults.

    Args:
        raw: ``{section: {field: value}}``.
        source: where it came from; heads the message of an error.
        lines: ``section.field`` to the line on which it stands.
        problems: found before; reported together with what is found here.

    Raises:
        ConfigError: holds every problem, each with its field.
    """
    found = list(problems)
    if not isinstance(raw, Mapping):
        sections = ", ".join(SECTIONS)
        found.append(Problem("", f"a configuration is a mapping of sections ({sections}), not {show(raw)}"))
        raise ConfigError(found, source)
    try:
        # JSON mode: the schema is strict about types, and a list is what a tuple looks like outside of Python.
        config = RunConfig.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        found.extend(translate(error, raw, lines or {}))
    except (TypeError, ValueError, RecursionError) as error:
        found.append(Problem("", f"a value that no configuration can hold ({error})"))
    if found:
        raise ConfigError(found, source)
    return config


def with_changes(config: RunConfig, changes: Mapping[str, Any], *, source: str = "changes") -> RunConfig:
    """``config`` with ``{"section.field": value}`` set, and checked as a whole.

    This is how a fix or advice of a plan is applied. Values may be plain (lists) or the schema's own (tuples).

    Raises:
        ConfigError: an unknown field (the nearest is named), or a value that does not fit.
    """
    raw = config.model_dump(mode="json")
    problems = []
    for path, value in changes.items():
        if path not in field_paths():
            problems.append(unknown_field(path))
            continue
        section, _, field = path.partition(".")
        if field:
            raw[section][field] = value
        else:
            raw[section] = value
    return from_plain(raw, source=source, problems=problems)


def apply_overrides(config: RunConfig, overrides: Iterable[str], *, source: str = "--set") -> RunConfig:
    """``config`` with ``section.field=value`` texts applied in order; the last one wins.

    Values are YAML: ``training.learning_rate=2e-4``, ``lora.target_modules=[q_proj,v_proj]``,
    ``data.eval_source=null``. A field that takes text takes it as it stands, with or without quotes.
    ``launch.environment.NAME=text`` sets one variable.

    Raises:
        ConfigError: holds every problem with all of them.
    """
    changes: dict[str, Any] = {}
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path:
            problems.append(Problem(override, "is not of the form section.field=value"))
        elif path in SECTIONS:
            problems.append(Problem(path, f"is a section; set one of its fields, such as {_example(path)}=value"))
        elif path.startswith("launch.environment."):
            given = changes.get("launch.environment", config.launch.environment)
            if isinstance(given, Mapping):
                changes["launch.environment"] = {**given, path.removeprefix("launch.environment."): text}
        elif path not in field_paths():
            problems.append(unknown_field(path))
        else:
            try:
                changes[path] = _read_value(path, text)
            except YamlError as error:
                problems.append(Problem(path, f"{show(text)} is not a value: {error}"))
    if problems:
        # The others are checked as well, so that one try shows everything.
        try:
            with_changes(config, changes, source=source)
        except ConfigError as error:
            problems.extend(error.problems)
        raise ConfigError(problems, source)
    return with_changes(config, changes, source=source)


def _example(section: str) -> str:
    return f"{section}.{next(iter(SECTIONS[section].model_fields))}"


def _read_value(path: str, text: str) -> Any:
    stripped = text.strip()
    if accepts_text(path):
        if stripped in ("null", "~") or (not stripped and accepts_null(path)):
            return None
        if stripped[:1] not in ("'", '"'):
            return stripped
    return parse(text)[0]
