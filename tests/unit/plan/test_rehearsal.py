from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import PRESETS, RunConfig, preset
from qz3_widgets.plan import Capabilities
from qz3_widgets.plan.plan import Rehearsal
from qz3_widgets.plan.rehearsal import make_rehearsal, random_name

from .conftest import MakeConfig


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_every_preset_is_rehearsed_on_one_gpu(gpus: Capabilities, name: str) -> None:
    plan = make_rehearsal(preset(name), 8, capabilities=gpus)
    assert plan.errors == ()
    assert plan.config.model.name_or_path == f"random:{name}"
    assert plan.rehearsal == Rehearsal(0, 8)
    assert (plan.world_size, plan.local_ranks, plan.deepspeed) == (8, 1, True)


def test_only_what_cant_be_rehearsed_changes(make_config: MakeConfig, cpu: Capabilities) -> None:
    config = make_config(training__eval_steps=2, training__save_steps=2, data__max_length=64, lora__r=32, name="big")
    plan = make_rehearsal(config, 4, rank=1, steps=2, capabilities=cpu)
    rehearsed = plan.config
    assert plan.rehearsal == Rehearsal(1, 4, arithmetic=False)  # on a CPU
    assert rehearsed.name == "rehearsal-big"
    assert (rehearsed.training.max_steps, rehearsed.training.eval_steps, rehearsed.training.save_steps) == (
        2,
        None,
        None,
    )
    assert rehearsed.launch.num_processes == 1
    assert rehearsed.lora == config.lora
    assert rehearsed.quantization == config.quantization
    assert rehearsed.zero == config.zero
    assert rehearsed.data.max_length == 64


def test_it_is_marked_in_the_plan(make_config: MakeConfig, cpu: Capabilities) -> None:
    plan = make_rehearsal(make_config(), 4, rank=3, capabilities=cpu)
    assert plan.to_json()["rehearsal"] == {"rank": 3, "world_size": 4, "arithmetic": False}
    assert plan.to_json()["world_size"] == 4
    assert plan.describe_machine().startswith("rehearsal: rank 3 of 4, without arithmetic on the CPU")


def test_arithmetic_is_done_if_asked_for(make_config: MakeConfig, cpu: Capabilities) -> None:
    plan = make_rehearsal(make_config(), 4, arithmetic=True, capabilities=cpu)
    assert plan.rehearsal == Rehearsal(0, 4)
    assert str(plan.rehearsal) == "rank 0 of 4"


def test_the_data_need_not_be_there(make_config: MakeConfig, cpu: Capabilities) -> None:
    plan = make_rehearsal(make_config(data__source="/nowhere.jsonl"), 2, capabilities=cpu)
    assert plan.ok
    assert not [issue for issue in plan.issues if issue.field.startswith("data.")]


def test_other_problems_still_block(make_config: MakeConfig, cpu: Capabilities) -> None:
    plan = make_rehearsal(make_config(launch__device="cuda"), 2, capabilities=cpu)
    assert not plan.ok
    with pytest.raises(ValueError, match="launch.device"):
        plan.raise_if_blocked()


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"world_size": 0}, "world_size must be 1 or more, not 0"),
    ({}, {"rank": 4}, "rank must be from 0 to 3, not 4"),
    ({}, {"rank": -1}, "rank must be from 0 to 3, not -1"),
    ({}, {"steps": 0}, "steps must be 1 or more, not 0"),
    ({"zero__zero_stage": 2}, {}, "zero.zero_stage: only ZeRO-3 is rehearsed, not stage 2"),
    ({"model__load_strategy": "stock"}, {}, "model.load_strategy: stock is not rehearsed"),
    ({"model__name_or_path": "someone/unknown"}, {}, "the shape of someone/unknown is not known here, and nothing is"),
]


@pytest.mark.parametrize("changes, options, message", WRONG)
def test_what_is_refused(
    make_config: MakeConfig, cpu: Capabilities, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_rehearsal(make_config(**changes), **({"world_size": 4} | options), capabilities=cpu)


@pytest.mark.parametrize("num_layers", [0, 3, 1000])
def test_a_depth_that_the_model_does_not_have(cpu: Capabilities, make_config: MakeConfig, num_layers: int) -> None:
    """Said at once, not by a rank that has started."""
    try:
        plan = make_rehearsal(make_config(), 4, num_layers=num_layers, capabilities=cpu)
    except ValueError as error:
        message = str(error)
    else:
        message = "\n".join(issue.message for issue in plan.errors)
    assert f"has 2 layers, and @{num_layers} asks for {num_layers}" in message


def test_where_the_shape_comes_from(tmp_path: Path) -> None:
    assert random_name("meta-llama/Llama-3.1-8B-Instruct", None) == "random:llama-3.1-8b"
    assert random_name("meta-llama/Llama-3.1-8B-Instruct", 1) == "random:llama-3.1-8b@1"
    assert random_name("random:llama-3.1-405b@9", 2) == "random:llama-3.1-405b@2"
    assert random_name("random:llama-3.1-405b@9", None) == "random:llama-3.1-405b@9"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert random_name(str(tmp_path), 3) == f"random:{tmp_path}@3"


def test_a_path_with_an_at_sign_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert random_name(str(folder), 3) == f"random:{folder}@3"
    assert random_name(f"random:{folder}@9", 3) == f"random:{folder}@3"


def test_the_defaults_are_rehearsed_too(cpu: Capabilities) -> None:
    assert make_rehearsal(RunConfig(), 2, num_layers=1, capabilities=cpu).ok
