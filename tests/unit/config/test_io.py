from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from qz3_widgets.config import (
    PRESETS,
    SECTIONS,
    ConfigError,
    RunConfig,
    apply_overrides,
    dump_config,
    field_paths,
    load_config,
    loads_config,
    preset,
    save_config,
)

from .strategies import CONFIGS

_SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def problems_of(text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        loads_config(text)
    fields = [problem.field for problem in error.value.problems]
    assert len(fields) == len(set(fields)), "one problem for each field"
    return {problem.field: problem.message for problem in error.value.problems}


# Round trips


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    config = preset(name)
    assert loads_config(dump_config(config)) == config
    assert loads_config(dump_config(config, only_changed=True)) == config


@_SLOW
@given(CONFIGS)
def test_any_configuration_survives_a_round_trip(config: RunConfig) -> None:
    text = dump_config(config)
    assert loads_config(text) == config
    assert loads_config(dump_config(config, only_changed=True)) == config
    # PyYAML reads the same: the ranks and other tools use it.
    assert yaml.safe_load(text) == config.model_dump(mode="json")


def test_the_defaults_survive_where_nothing_is_written() -> None:
    text = dump_config(RunConfig(), only_changed=True)
    assert loads_config(text) == RunConfig()


def test_a_dump_holds_every_field_in_schema_order_under_a_comment() -> None:
    lines = dump_config(RunConfig()).splitlines()
    fields = [line.strip().partition(":")[0] for line in lines if line.startswith("  ") and "#" not in line.split()[0]]
    assert fields == [path.partition(".")[2] for path in field_paths()[1:]]
    for number, line in enumerate(lines):
        if line.strip() and not line.strip().startswith("#"):
            assert lines[number - 1].strip().startswith("# "), line
    assert [line[:-1] for line in lines if line[:1].isalpha() and line.endswith(":")] == list(SECTIONS)


def test_a_dump_of_changes_holds_nothing_else() -> None:
    config = apply_overrides(RunConfig(), ["lora.r=4"])
    text = dump_config(config, only_changed=True)
    assert yaml.safe_load(text) == {"lora": {"r": 4}}
    assert yaml.safe_load(dump_config(config, only_changed=True, base=config)) == {}


def test_a_file_can_be_saved_and_loaded(tmp_path: Path) -> None:
    file = tmp_path / "my run.yaml"
    save_config(preset("demo"), file)
    assert load_config(file) == load_config(str(file)) == preset("demo")
    assert [entry.name for entry in tmp_path.iterdir()] == ["my run.yaml"]


def test_a_run_yaml_is_a_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    resolved = preset("demo").model_dump(mode="json")
    file.write_text(yaml.safe_dump({"preset": "demo", "given": {}, "resolved": resolved}), encoding="utf-8")
    assert load_config(file) == preset("demo")


# Values


@pytest.mark.parametrize("text,value", [("2e-4", 2e-4), ("1E-3", 1e-3), ("1", 1.0), (".5", 0.5), ("1.", 1.0)])
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert loads_config(f"training: {{learning_rate: {text}}}").training.learning_rate == value


def test_a_list_becomes_a_tuple_and_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbflora:\n  target_modules: [q_proj, v_proj]\n")
    assert load_config(file).lora.target_modules == ("q_proj", "v_proj")


# Problems of the content


def test_every_problem_at_once_each_at_its_field() -> None:
    text = """\
name: a b
model: {dtype: bf16, name_or_path: 17}
lora:
  r: 0
  lora_alpha: 1.5
  target_modules: q_proj
  learning_rate: 1
quantisation: {}
zero: {zero_stage: 7, reduce_bucket_size: small}
data:
training: {learning_rate: 3, max_steps: "20", packing: true, adam_beta1: .nan}
launch: {environment: {A: 1}, num_processes: yes}
"""
    found = problems_of(text)
    assert set(found) == {
        "name",
        "model.dtype",
        "model.name_or_path",
        "lora.r",
        "lora.lora_alpha",
        "lora.target_modules",
        "lora.learning_rate",
        "quantisation",
        "zero.zero_stage",
        "zero.reduce_bucket_size",
        "data",
        "training.learning_rate",
        "training.max_steps",
        "training.packing",
        "training.adam_beta1",
        "launch.environment",
        "launch.num_processes",
    }
    assert found["model.dtype"] == "must be one of bfloat16, float16, float32, not 'bf16'; did you mean bfloat16?"
    assert found["model.name_or_path"].endswith("put it in quotes to make it text")
    assert found["lora.r"] == "must be a whole number from 1 to 1024, not 0"
    assert found["lora.lora_alpha"] == "must be a whole number of at least 1, not 1.5"
    assert "[q_proj]" in found["lora.target_modules"]
    assert found["lora.learning_rate"] == "no such field; did you mean training.learning_rate?"
    assert found["quantisation"] == "no such field; did you mean quantization?"
    assert found["zero.zero_stage"] == "must be one of 0, 1, 2, 3, not 7"
    assert found["zero.reduce_bucket_size"] == "must be a whole number of at least 1, or auto, not the text 'small'"
    assert found["training.learning_rate"] == "must be a number above 0 and at most 1, not 3"
    assert found["training.max_steps"] == "must be a whole number of at least 1, or null, not the text '20'"
    assert found["training.packing"] == "no such field; did you mean data.packing?"
    assert found["training.adam_beta1"] == "must be a number of at least 0 and below 1, not nan"
    assert "A must be text" in found["launch.environment"]


def test_messages_hold_no_jargon_and_no_addresses() -> None:
    with pytest.raises(ConfigError) as error:
        loads_config("lora: {r: a, x: 1, use_dora: 1}\nzero: 3", source="my.yaml")
    text = str(error.value)
    assert text.startswith("my.yaml: 4 problems\n  lora.")
    for jargon in ("Input", "input", "pydantic", "http", "type=", "literal", "Extra"):
        assert jargon not in text


def test_problems_name_their_lines_in_the_order_of_the_text() -> None:
    with pytest.raises(ConfigError) as error:
        loads_config("lora:\n  r: 0\n\ndata:\n  max_length: 1\nmodel:\n  dtyp: a\n", source="my.yaml")
    assert [(problem.field, problem.line) for problem in error.value.problems] == [
        ("lora.r", 2),
        ("data.max_length", 5),
        ("model.dtyp", 7),
    ]
    assert "(line 5)" in str(error.value)


def test_one_problem_is_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        loads_config("lora: {r: 0}", source="my.yaml")
    assert str(error.value) == "my.yaml: lora.r: must be a whole number from 1 to 1024, not 0 (line 1)"


# Problems of the text


@pytest.mark.parametrize(
    "text,words",
    [
        ("lora:\n  r: 1\n  r: 2\n", "line 3, column 3: lora.r stands twice, first in line 2"),
        ("lora: {r: 1}\nlora: {r: 2}\n", "line 2, column 1: lora stands twice, first in line 1"),
        ("launch: {environment: {A: b, A: c}}", "launch.environment.A stands twice"),
        ("lora:\n\tr: 1\n", "line 2, column 1: a tab"),
        ("lora: {r: 1", "is a ']' or '}' missing?"),
        ("lora:\n  r: 4\n lora_alpha: 4", "line 3, column 2: wrong indentation"),
        ("data:\n  source: a: b", "line 2, column 12: a second ':'"),
        ('name: "abc', "a quotation mark is missing"),
        ("- a\n- b", "is a mapping of sections"),
        ("just text", "is a mapping of sections"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("lora: {r: &a 1, lora_alpha: *a}", "aliases"),
        ("name: !!python/object:os.system x", "tag"),
        ("name: !!binary aGk=", "tag"),
        ("? [a]\n: b", "a key must be a plain name"),
        ("name: a\0b", "U+0000"),
        ("name: a\n---\nname: b", "line 2, column 1"),
        (f"lora: {{r: {'9' * 5000}}}", "no number that can be read"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_text_that_is_no_configuration(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loads_config(text, source="my.yaml")
    assert words in str(error.value)
    assert str(error.value).startswith("my.yaml: ")


# Problems of the file


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="no such file; the folder has other.yaml"):
        load_config(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="the folder .* does not exist either"):
        load_config(tmp_path / "sub" / "mine.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name a YAML file"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="name its run.yaml"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="is a folder"):
        save_config(RunConfig(), tmp_path)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"lora:\n  r: 1\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 0xe9\); save it as UTF-8 \(line 3\)"):
        load_config(file)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{}", encoding="utf-8")
    file.chmod(0)
    with pytest.raises(ConfigError, match="can't be read: Permission denied"):
        load_config(file)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config("a\0b")


def test_saving_into_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written: No such file"):
        save_config(RunConfig(), tmp_path / "nowhere" / "run.yaml")
    assert list(tmp_path.iterdir()) == []
