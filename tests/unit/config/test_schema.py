from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qz3_widgets.config import SECTIONS, RunConfig, field_paths, from_plain
from qz3_widgets.config.problems import ConfigError


def test_every_field_has_a_description_and_says_whether_it_is_rare() -> None:
    for name, section in SECTIONS.items():
        assert section.__doc__, name
        for field, info in section.model_fields.items():
            assert info.description, f"{name}.{field}"
            assert isinstance(info.json_schema_extra, dict)
            assert set(info.json_schema_extra) == {"unit", "rare"}, f"{name}.{field}"


def test_field_paths_are_the_name_and_every_field_of_every_section() -> None:
    paths = field_paths()
    assert paths[0] == "name"
    assert len(paths) == len(set(paths)) == 1 + sum(len(section.model_fields) for section in SECTIONS.values())


def test_field_names_are_unique_over_the_sections() -> None:
    # The search for the nearest name, and a command line that forgets the section, rely on it.
    leaves = [path.partition(".")[2] for path in field_paths() if "." in path]
    assert len(leaves) == len(set(leaves))


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError):
        RunConfig().lora.r = 4  # type: ignore[misc]


CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"lora": {"target_modules": []}}, ["lora.target_modules"]),
    ({"zero": {"zero_stage": 2, "offload_param_device": "cpu"}}, ["zero.offload_param_device"]),
    ({"zero": {"zero_stage": 0, "offload_optimizer_device": "cpu"}}, ["zero.offload_optimizer_device"]),
    ({"zero": {"zero_stage": 1, "leaf_modules": ["Layer"]}}, ["zero.leaf_modules"]),
    ({"zero": {"leaf_modules": []}}, ["zero.leaf_modules"]),
    ({"training": {"early_stopping_patience": 3}}, ["training.eval_steps"]),
    ({"launch": {"num_processes": 3, "num_machines": 2}}, ["launch.num_machines"]),
    ({"launch": {"machine_rank": 1}}, ["launch.machine_rank"]),
    ({"launch": {"num_machines": 2}}, ["launch.main_process_ip", "launch.main_process_port"]),
    ({"launch": {"environment": {"1X": "a"}}}, ["launch.environment"]),
    ({"launch": {"environment": {"HF_TOKEN": "a"}}}, ["launch.environment"]),
    ({"launch": {"environment": {"MY_API_KEY": "a"}}}, ["launch.environment"]),
    ({"launch": {"environment": {"X": "a\0b"}}}, ["launch.environment"]),
    (
        {
            "zero": {
                "zero_stage": 0,
                "offload_param_device": "cpu",
                "offload_optimizer_device": "cpu",
                "leaf_modules": ["A"],
            }
        },
        ["zero.offload_param_device", "zero.offload_optimizer_device", "zero.leaf_modules"],
    ),
]


@pytest.mark.parametrize("raw,fields", CONTRADICTIONS)
def test_contradictions_within_a_section_are_all_reported_at_their_fields(
    raw: dict[str, Any], fields: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        from_plain(raw)
    assert [problem.field for problem in error.value.problems] == fields


@pytest.mark.parametrize(
    "raw",
    [
        {"zero": {"zero_stage": 2, "offload_optimizer_device": "cpu"}},
        {"training": {"early_stopping_patience": 3, "eval_steps": 10}},
        {"launch": {"environment": {"TOKENIZERS_PARALLELISM": "true", "NCCL_DEBUG": "INFO"}}},
        {
            "launch": {
                "num_processes": 4,
                "num_machines": 2,
                "machine_rank": 1,
                "main_process_ip": "10.0.0.1",
                "main_process_port": 29500,
            }
        },
    ],
)
def test_what_looks_alike_and_is_fine(raw: dict[str, Any]) -> None:
    assert isinstance(from_plain(raw), RunConfig)
