from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from qz3_widgets.config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    changed_fields,
    diff,
    from_plain,
    get_field,
    preset,
    with_changes,
)

from .strategies import CONFIGS


def test_equal_configurations_do_not_differ() -> None:
    assert diff(RunConfig(), RunConfig()) == {}
    assert changed_fields(RunConfig()) == {}


def test_differences_are_named_and_in_schema_order() -> None:
    other = with_changes(RunConfig(), {"training.learning_rate": 1e-3, "name": "b", "lora.target_modules": ["q_proj"]})
    assert list(diff(RunConfig(), other).items()) == [
        ("name", ("run", "b")),
        ("lora.target_modules", ("all-linear", ("q_proj",))),
        ("training.learning_rate", (2e-4, 1e-3)),
    ]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(CONFIGS)
def test_changed_fields_rebuild_the_configuration(config: RunConfig) -> None:
    assert from_plain(changed_fields(config)) == config
    changes = {path: new for path, (_, new) in diff(RunConfig(), config).items()}
    assert with_changes(RunConfig(), changes) == config


def test_changes_against_a_preset() -> None:
    config = with_changes(preset("demo"), {"lora.r": 4})
    assert changed_fields(config, preset("demo")) == {"lora": {"r": 4}}


def test_fields_by_name() -> None:
    assert get_field(RunConfig(), "lora.r") == 16
    assert get_field(RunConfig(), "name") == "run"
    with pytest.raises(ConfigError, match="did you mean lora.r"):
        get_field(RunConfig(), "lora.rank")


def test_changes_are_checked_all_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        with_changes(RunConfig(), {"lora.r": 0, "lora.rate": 1, "training.optim": "sgd"})
    assert {problem.field for problem in error.value.problems} == {"lora.r", "lora.rate", "training.optim"}


OVERRIDES: list[tuple[str, str, Any]] = [
    ("training.learning_rate=2e-5", "training.learning_rate", 2e-5),
    ("lora.target_modules=[q_proj,v_proj]", "lora.target_modules", ("q_proj", "v_proj")),
    ("lora.target_modules=all-linear", "lora.target_modules", "all-linear"),
    ("data.packing=true", "data.packing", True),
    ("data.eval_source=null", "data.eval_source", None),
    ("data.eval_source=", "data.eval_source", None),
    ("data.eval_source=~", "data.eval_source", None),
    ("data.eval_source='null'", "data.eval_source", "null"),
    ("training.max_steps=null", "training.max_steps", None),
    ("training.max_steps=1_000", "training.max_steps", 1000),
    ("zero.reduce_bucket_size=auto", "zero.reduce_bucket_size", "auto"),
    # Text is taken as it stands, whatever YAML would make of it.
    ("model.revision=1234567", "model.revision", "1234567"),
    ("model.revision=12e4567", "model.revision", "12e4567"),
    ("model.name_or_path=~/models/a: b #c", "model.name_or_path", "~/models/a: b #c"),
    ("model.name_or_path=a=b", "model.name_or_path", "a=b"),
    ('data.source="a b"', "data.source", "a b"),
    ("name=007", "name", "007"),
    (" lora.r =4", "lora.r", 4),
    ("launch.environment={A: b}", "launch.environment", {"A": "b"}),
    ("launch.environment.A=1=2", "launch.environment", {"A": "1=2"}),
]


@pytest.mark.parametrize("override,path,value", OVERRIDES)
def test_overrides(override: str, path: str, value: Any) -> None:
    assert get_field(apply_overrides(RunConfig(), [override]), path) == value


def test_overrides_apply_in_order() -> None:
    config = apply_overrides(
        RunConfig(), ["lora.r=4", "lora.r=8", "launch.environment.A=1", "launch.environment.B=2", "lora.lora_alpha=8"]
    )
    assert (config.lora.r, config.lora.lora_alpha, config.launch.environment) == (8, 8, {"A": "1", "B": "2"})


@pytest.mark.parametrize(
    "override,words",
    [
        ("lora.learning_rate=1", "lora.learning_rate: no such field; did you mean training.learning_rate?"),
        ("lr=1", "did you mean training.learning_rate?"),
        ("learning_rate=1", "did you mean training.learning_rate?"),
        ("max_seq_length=1", "did you mean data.max_length?"),
        ("train.learning_rte=1", "did you mean training.learning_rate?"),
        ("lora=4", "is a section"),
        ("lora.r", "is not of the form section.field=value"),
        ("=4", "is not of the form section.field=value"),
        ("lora.r=[", "is not a value"),
        ("lora.r=four", "must be a whole number from 1 to 1024, not the text 'four'"),
        ("lora.target_modules=q_proj,v_proj", "[q_proj, v_proj]"),
        ("data.source=", "must be text that is not empty"),
        ("zzz.qqq=1", "there are name, model"),
        ("lora.zzzzzz=1", "lora has r, lora_alpha"),
    ],
)
def test_overrides_that_can_not_be(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(RunConfig(), [override])
    assert str(error.value).startswith("--set: ")
    assert words in str(error.value)


def test_every_bad_override_is_reported() -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(RunConfig(), ["lr=1", "lora.r=0", "lora", "training.optim=sgd"])
    assert {problem.field for problem in error.value.problems} == {"lr", "lora.r", "lora", "training.optim"}


def test_a_configuration_is_no_list() -> None:
    with pytest.raises(ConfigError, match="is a mapping of sections"):
        from_plain([1])
    with pytest.raises(ConfigError, match="no configuration can hold"):
        from_plain({"name": {1, 2}})
