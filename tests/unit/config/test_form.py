from __future__ import annotations

import pytest

from qz3_widgets.config.form import form_fields, form_sections, summary
from qz3_widgets.config.presets import PRESETS
from qz3_widgets.config.problems import ConfigError
from qz3_widgets.config.schema import RunConfig, field_paths


def test_every_field_of_the_schema_is_in_the_form_once() -> None:
    assert tuple(form_fields()) == field_paths()
    assert [field.path for section in form_sections() for field in section.fields] == list(field_paths()[1:])
    assert all(field.help for field in form_fields().values())


@pytest.mark.parametrize(
    "path, kind",
    [
        ("model.name_or_path", "text"),
        ("quantization.load_in_4bit", "switch"),
        ("zero.zero_stage", "choice"),
        ("training.activation_offload", "choice"),
        ("zero.reduce_bucket_size", "number"),
        ("training.max_steps", "number"),
        ("lora.target_modules", "names"),
        ("launch.environment", "mapping"),
    ],
)
def test_each_field_has_the_control_of_its_type(path: str, kind: str) -> None:
    assert form_fields()[path].kind == kind


def test_choices_keep_their_types() -> None:
    assert form_fields()["zero.zero_stage"].choices == (0, 1, 2, 3)
    assert form_fields()["training.activation_offload"].choices == ("auto", True, False)


@pytest.mark.parametrize("name", PRESETS)
def test_values_come_back_from_their_text(name: str) -> None:
    plain = PRESETS[name]().model_dump(mode="json")
    for path, field in form_fields().items():
        value = plain[field.section][field.label] if field.section else plain[path]
        assert field.read(field.show(value)) == value, path


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.max_steps", " ", None),
        ("zero.sub_group_size", "1_000_000", 1_000_000),
        ("lora.target_modules", "q_proj, v_proj,", ["q_proj", "v_proj"]),
        ("lora.target_modules", "[q_proj]", ["q_proj"]),
        ("lora.target_modules", "all-linear", "all-linear"),
        ("launch.environment", "A=1\n\n B = x=y ", {"A": "1", "B": "x=y"}),
        ("model.revision", "1e5", "1e5"),
        ("lora.r", "sixteen", "sixteen"),  # for the schema to refuse
    ],
)
def test_texts_are_read(path: str, text: str, value: object) -> None:
    assert form_fields()[path].read(text) == value


@pytest.mark.parametrize(
    "path, text",
    [("lora.r", "[1"), ("launch.environment", "no equals sign"), ("lora.r", "!!python/object:os.system 1")],
)
def test_what_is_no_value_names_its_field(path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        form_fields()[path].read(text)
    assert caught.value.problems[0].field == path


def test_a_search_looks_at_names_help_units_and_choices() -> None:
    def found(words: str) -> set[str]:
        return {path for path, field in form_fields().items() if field.matches(words)}

    assert "lora.r" in found("rank update")
    assert "training.optim" in found("PAGED")
    assert "data.max_length" in found("tokens longest")
    assert found("no such word anywhere") == set()


def test_sections_are_summed_up() -> None:
    config = RunConfig()
    assert summary(config, "quantization") == "nf4, double, bfloat16"
    assert summary(config, "lora") == "r 16, all-linear"
    assert all(summary(config, section.name) for section in form_sections())
