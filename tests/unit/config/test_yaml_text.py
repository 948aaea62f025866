from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qz3_widgets.config.yaml_text import YamlError, dump, dump_field, parse

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_written_is_read_alike_by_us_and_by_pyyaml(value: Any) -> None:
    text = dump(value)
    assert parse(text)[0] == value
    assert yaml.safe_load(text) == value


@given(st.text() | st.lists(st.text(), max_size=3) | st.dictionaries(st.text(max_size=20), st.text(), max_size=2))
def test_a_field_takes_one_line(value: Any) -> None:
    text = dump_field("a", value)
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert parse(f"x:\n  {text}")[0] == {"x": {"a": value}}


@pytest.mark.parametrize(
    "text,value",
    [
        ("2e-4", 2e-4),
        ("1e3", 1000.0),
        ("+1.5E+3", 1500.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("-5", -5),
        ("yes", "yes"),
        ("off", "off"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("<<", "<<"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_plain_scalars(text: str, value: Any) -> None:
    found = parse(f"a: {text}")[0]["a"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse("a: .nan")[0]["a"])


def test_lines_of_keys() -> None:
    assert parse("a:\n  b: 1\n\n  c:\n    d: 2\n")[1] == {"a": 1, "a.b": 2, "a.c": 4, "a.c.d": 5}


def test_places_count_from_one() -> None:
    with pytest.raises(YamlError) as error:
        parse("a: 1\nb: [1, 2\n")
    assert (error.value.line, error.value.column) == (3, 1)
