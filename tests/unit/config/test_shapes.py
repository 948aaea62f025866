from __future__ import annotations

import json
from pathlib import Path

import pytest

from qz3_widgets.config import PRESETS, preset
from qz3_widgets.config.shapes import local_shape, read_shape, shape_file, shape_names, shape_of_hub_id

FAMILIES = ("llama-3.1", "llama-3.2", "llama-3.3", "qwen3", "mistral", "gemma-3", "mixtral")


def test_well_known_models_come_with_the_package() -> None:
    for family in FAMILIES:
        assert any(name.startswith(family) for name in shape_names()), family


@pytest.mark.parametrize("name", shape_names())
def test_a_shape_is_a_configuration_that_transformers_knows(name: str) -> None:
    from transformers import AutoConfig

    values = read_shape(name)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    assert config.get_text_config().num_hidden_layers >= 2
    assert config.architectures


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_presets_name_hub_models_whose_shape_is_known(name: str) -> None:
    assert shape_of_hub_id(preset(name).model.name_or_path) == name


@pytest.mark.parametrize(
    "hub_id, name",
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-405B-Instruct", "llama-3.1-405b"),
        ("unsloth/Meta-Llama-3.1-70B-bnb-4bit", "llama-3.1-70b"),
        ("mistralai/Mistral-7B-v0.3", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("llama-3.2-1b", "llama-3.2-1b"),
        ("meta-llama/Llama-2-7b", None),
        ("someone/llama-3.1-8b-with-eyes", None),
        ("gpt2", None),
    ],
)
def test_the_shape_of_a_hub_model(hub_id: str, name: str | None) -> None:
    assert shape_of_hub_id(hub_id) == name


def test_fewer_layers() -> None:
    assert read_shape("llama-3.1-405b")["num_hidden_layers"] == 126
    cut = read_shape("llama-3.1-405b@2")
    assert cut == read_shape("llama-3.1-405b") | {"num_hidden_layers": 2}
    assert shape_file("llama-3.1-405b@2") == shape_file("llama-3.1-405b")


@pytest.mark.parametrize("number", [0, 127])
def test_a_depth_that_the_model_does_not_have(number: int) -> None:
    with pytest.raises(ValueError, match=rf"llama-3.1-405b has 126 layers, and @{number} asks for {number}"):
        read_shape(f"llama-3.1-405b@{number}")


def test_other_names_for_the_depth_and_kinds_of_attention(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_layer": 6}))
    assert read_shape(f"{file}@3")["n_layer"] == 3
    assert read_shape(f"{tmp_path}@3")["n_layer"] == 3
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    file.write_text(json.dumps({"model_type": "gemma3_text", "num_hidden_layers": 3, "layer_types": kinds}))
    assert read_shape(f"{file}@2")["layer_types"] == kinds[:2]
    file.write_text(json.dumps({"model_type": "odd"}))
    assert read_shape(str(file)) == {"model_type": "odd"}
    with pytest.raises(ValueError, match=r"has an unknown number of layers, and @2 asks for 2"):
        read_shape(f"{file}@2")


def test_a_name_that_is_not_known_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"random:llama-3.1-8 is no known shape.*did you mean random:llama-3.1-"):
        read_shape("llama-3.1-8")
    with pytest.raises(ValueError, match=r"random:/nowhere is no known shape and no config.json\. Known shapes: "):
        read_shape("/nowhere")


@pytest.mark.parametrize(
    "content, problem",
    [("{", "can't be read as a model's configuration"), ("[1]", "no model_type"), ("{}", "no model_type")],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"^model.name_or_path: .*{problem}"):
        read_shape(str(file))


def test_a_local_model_is_its_own_shape(tmp_path: Path) -> None:
    assert local_shape(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert local_shape(str(tmp_path)) == str(tmp_path)
