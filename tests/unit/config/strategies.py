"""Random configurations that fit the schema, made from the schema itself."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qz3_widgets.config import SECTIONS, ConfigError, RunConfig, from_plain

# No surrogates: they are no text. Everything else, line breaks and odd spaces included, must survive.
TEXT = st.text(max_size=12)
_TRICKY = st.sampled_from(
    [
        "2e-4",
        "no",
        "null",
        "~",
        "1_000",
        "012",
        "12:30",
        "- a",
        "a: b",
        "#x",
        "'",
        '"',
        "{a}",
        " x ",
        "\n",
        "é",
        "1.",
        "=",
    ]
)
_TRICKY_TEXT = _TRICKY | TEXT


def _value(part: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in part:
        return st.sampled_from(part["enum"])
    if "const" in part:
        return st.just(part["const"])
    kind = part["type"]
    if kind == "integer":
        low = part.get("minimum", 0)
        return st.integers(low, part.get("maximum", low + 2**40))
    if kind == "number":
        low, high = (
            part.get("minimum", part.get("exclusiveMinimum", 0.0)),
            part.get("maximum", part.get("exclusiveMaximum", 1e6)),
        )
        return st.floats(
            low, high, exclude_min="exclusiveMinimum" in part, exclude_max="exclusiveMaximum" in part, allow_nan=False
        )
    if kind == "string":
        return _TRICKY_TEXT.filter(bool) if part.get("minLength") else _TRICKY_TEXT
    if kind == "array":
        return st.lists(_TRICKY_TEXT, max_size=3)
    if kind == "object":
        return st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), _TRICKY_TEXT, max_size=3)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


def _section(name: str) -> st.SearchStrategy[dict[str, Any]]:
    fields = SECTIONS[name].model_json_schema()["properties"]
    return st.fixed_dictionaries(
        {},
        optional={
            field: st.one_of([_value(part) for part in info.get("anyOf", [info])]) for field, info in fields.items()
        },
    )


def _repaired(raw: dict[str, Any]) -> RunConfig:
    # Fields that contradict each other go back to their defaults, instead of throwing the example away.
    for _ in range(5):
        try:
            return from_plain(raw)
        except ConfigError as error:
            for problem in error.problems:
                section, _, field = problem.field.partition(".")
                raw[section].pop(field, None)
                if field in ("eval_steps", "main_process_ip", "main_process_port", "num_machines"):
                    raw[section].pop("early_stopping_patience", None)
                    raw[section].pop("num_machines", None)
    raise AssertionError(f"can't repair {raw}")


CONFIGS: st.SearchStrategy[RunConfig] = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        **{name: _section(name) for name in SECTIONS},
    }
).map(_repaired)
