from __future__ import annotations

import re
import typing
from typing import Any

import pytest

from qz3_widgets.config import RunConfig, with_changes
from qz3_widgets.config.schema import ModelSection
from qz3_widgets.config.strategy import MEANINGS, resolve_load_strategy, strategy_faults


def config(**changes: Any) -> RunConfig:
    return with_changes(RunConfig(), {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize(
    "stage, load_in_4bit, strategy",
    [
        (3, True, "sharded"),
        (3, False, "stock"),
        (2, True, "stock"),
        (1, False, "stock"),
        (0, True, "replicated"),
        (0, False, "replicated"),
    ],
)
def test_auto(stage: int, load_in_4bit: bool, strategy: str) -> None:
    chosen = config(zero__zero_stage=stage, quantization__load_in_4bit=load_in_4bit)
    assert resolve_load_strategy(chosen) == strategy
    assert strategy_faults(chosen) == []


@pytest.mark.parametrize("strategy", MEANINGS)
def test_what_is_chosen_is_taken(strategy: str) -> None:
    assert resolve_load_strategy(config(model__load_strategy=strategy)) == strategy


def test_every_strategy_has_its_meaning() -> None:
    choices = typing.get_args(ModelSection.model_fields["load_strategy"].annotation)
    assert set(choices) == {"auto", *MEANINGS}


FAULTS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"model__load_strategy": "sharded"}, []),
    ({"model__load_strategy": "stock"}, []),
    ({"model__load_strategy": "stock", "zero__zero_stage": 0}, []),
    (
        {"model__load_strategy": "sharded", "zero__zero_stage": 2},
        [("model.load_strategy", "sharded needs zero.zero_stage 3, not 2")],
    ),
    (
        {"model__load_strategy": "sharded", "quantization__load_in_4bit": False},
        [("model.load_strategy", "load_in_4bit is off")],
    ),
    (
        {"model__load_strategy": "sharded", "zero__zero_stage": 1, "quantization__load_in_4bit": False},
        [("model.load_strategy", "not 1"), ("model.load_strategy", "load_in_4bit is off")],
    ),
    ({"model__load_strategy": "replicated"}, [("zero.zero_stage", "replicated works without ZeRO")]),
    ({"model__load_strategy": "replicated", "zero__zero_stage": 0}, []),
    (
        {"model__load_strategy": "device_map"},
        [("zero.zero_stage", "device_map works without ZeRO"), ("launch.num_processes", "one process.* not 2")],
    ),
    ({"model__load_strategy": "device_map", "zero__zero_stage": 0, "launch__num_processes": 1}, []),
]


@pytest.mark.parametrize("changes, expected", FAULTS)
def test_faults_and_their_mending(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    wrong = config(**changes)
    faults = strategy_faults(wrong)
    assert [field for field, _, _ in faults] == [field for field, _ in expected]
    for (_, message, _), (_, words) in zip(faults, expected, strict=True):
        assert re.search(words, message), message
    mended = with_changes(wrong, {name: value for _, _, fix in faults for name, value in fix.items()})
    assert strategy_faults(mended) == []
