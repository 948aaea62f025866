from __future__ import annotations

import pytest

from qz3_widgets.config import ConfigError, Problem, field_paths
from qz3_widgets.config.problems import _KNOWN_AS, allowed, nearest, show, wrong_value


@pytest.mark.parametrize("path", field_paths())
def test_every_field_can_say_what_it_takes(path: str) -> None:
    assert allowed(path)
    assert "{" not in allowed(path)
    # The words fit into a message.
    assert f"must be {allowed(path)}, not" in wrong_value(path, {"a": 1}).message


@pytest.mark.parametrize(
    "name,expected",
    [
        ("lora.learning_rate", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("lora.alpha", "lora.lora_alpha"),
        ("lora.rank", "lora.r"),
        ("training.lr", "training.learning_rate"),
        ("model.torch_dtype", "model.dtype"),
        ("training.gradient_checkpointing", "training.activation_checkpointing"),
        ("zero.stage", "zero.zero_stage"),
        ("quantisation.load_in_4bit", "quantization.load_in_4bit"),
        ("dataa", "data"),
        ("nme", "name"),
        ("qqqqqq", None),
        ("lora.qqqqqq", None),
    ],
)
def test_the_nearest_name(name: str, expected: str | None) -> None:
    assert nearest(name) == expected


def test_other_names_lead_to_fields_that_exist() -> None:
    assert set(_KNOWN_AS.values()) <= set(field_paths())


def test_values_are_shown_in_one_short_line() -> None:
    assert show(None) == "null"
    assert show(True) == "true"
    assert show({"a": [1, "b"]}) == "{a: [1, 'b']}"
    assert show("a\nb") == r"'a\nb'"
    assert len(show("x" * 500)) == 60


def test_an_error_carries_its_problems() -> None:
    error = ConfigError([Problem("lora.r", "bad", 3), Problem("", "worse")], "my.yaml")
    assert isinstance(error, ValueError)
    assert str(error) == "my.yaml: 2 problems\n  lora.r: bad (line 3)\n  worse"
    assert str(ConfigError([Problem("a", "b")])) == "a: b"
