from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import RunConfig, shape_names, with_changes
from qz3_widgets.plan import Issue
from qz3_widgets.plan.model_files import check_model

from .conftest import MakeModel, write_safetensors


def issues_of(name: str | Path, **changes: Any) -> list[Issue]:
    values = {"model.name_or_path": str(name)} | {path.replace("__", "."): value for path, value in changes.items()}
    return list(check_model(with_changes(RunConfig(), values)))


def only(issues: list[Issue], rule: str) -> str:
    assert [issue.rule for issue in issues] == [rule]
    return issues[0].message


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.1-8B", "gpt2", "Qwen/Qwen3-0.6B", *(f"random:{name}" for name in shape_names())]
)
def test_names_that_are_fine(name: str) -> None:
    assert issues_of(name) == []


def test_a_whole_folder_is_fine(make_model: MakeModel) -> None:
    assert issues_of(make_model()) == []


def test_a_home_folder_is_found(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make_model().parent))
    assert issues_of("~/model") == []


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_paths_that_do_not_exist(name: str) -> None:
    assert f"there is no folder {name}" in only(issues_of(name), "model-not-found")


def test_a_name_in_a_folder_that_exists_is_a_path(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama")
    monkeypatch.chdir(folder.parent.parent)
    message = only(issues_of(f"{folder.parent.name}/lama"), "model-not-found")
    assert message.endswith(f"{folder.parent.name} has llama")


def test_the_demos_folder_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path))
    assert "'qz3 demo' unpacks it" in only(issues_of(tmp_path / "SmolLM2-135M-Instruct"), "model-not-found")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors")
    assert "is a file" in only(issues_of(tmp_path / "model.safetensors"), "model-not-a-folder")


@pytest.mark.parametrize("name", ["meta llama", "-x", "a/-b"])
def test_names_that_are_nothing(name: str) -> None:
    assert "neither a folder nor a hub id" in only(issues_of(name), "model-name")


def test_an_unknown_shape_names_the_nearest() -> None:
    message = only(issues_of("random:llama-3.1-9b"), "model-shape-unknown")
    assert "did you mean random:llama-3.1-8b" in message
    assert not message.startswith("model.name_or_path")
    assert "no known shape" in only(issues_of("random:/nowhere/config.json"), "model-shape-unknown")


def test_a_shape_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "vocab_size": 512}), encoding="utf-8")
    assert issues_of(f"random:{file}") == issues_of(f"random:{tmp_path}") == []
    file.write_text(json.dumps({"vocab_size": 100}), encoding="utf-8")
    assert [issue.rule for issue in issues_of(f"random:{file}")] == ["model-config", "model-vocabulary"]
    assert "needs 259" in issues_of(f"random:{file}")[1].message
    assert [issue.rule for issue in issues_of(f"random:{file}", model__tokenizer_name_or_path="gpt2")] == [
        "model-config"
    ]
    file.write_text("{", encoding="utf-8")
    assert "is not valid JSON" in only(issues_of(f"random:{file}"), "model-config")


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json: name the folder" in only(issues_of(tmp_path), "model-config")
    (tmp_path / "x.gguf").write_bytes(b"")
    assert "GGUF" in only(issues_of(tmp_path), "model-config")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "LoRA adapter" in only(issues_of(tmp_path), "model-config")


@pytest.mark.parametrize(
    "text,words", [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ("{}", "no model_type")]
)
def test_a_bad_config(make_model: MakeModel, text: str, words: str) -> None:
    folder = make_model()
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert words in only(issues_of(folder), "model-config")
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "is not valid JSON" in only(issues_of(folder), "model-config")


def test_no_weights(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    assert "has no weights" in only(issues_of(folder), "model-weights")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 20)
    assert issues_of(folder) == []
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "is empty" in only(issues_of(folder), "model-weights")


def test_shards_that_the_index_names(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    names = [f"model-{number}.safetensors" for number in range(6)]
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in names:
        write_safetensors(folder / name)
    assert issues_of(folder) == []
    for name in names[1:]:
        (folder / name).unlink()
    message = only(issues_of(folder), "model-weights")
    assert message.startswith("5 of 6 weight files")
    assert "(model-1.safetensors, model-2.safetensors, model-3.safetensors, ...)" in message
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "has no weight_map" in only(issues_of(folder), "model-weights")
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    assert "is not valid JSON" in only(issues_of(folder), "model-weights")


def test_a_weight_file_that_is_cut_off(make_model: MakeModel) -> None:
    folder = make_model()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"should have {len(whole)} bytes and has {len(whole) - 1}" in only(issues_of(folder), "model-weights")
    for length in (0, 5, 8, 20):
        file.write_bytes(whole[:length])
        assert "cut off" in only(issues_of(folder), "model-weights")


def test_a_weight_file_that_is_something_else(make_model: MakeModel) -> None:
    folder = make_model()
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    assert "git lfs pull" in only(issues_of(folder), "model-weights")
    file.write_bytes((4).to_bytes(8, "little") + b"[1]x")
    assert "header can't be read" in only(issues_of(folder), "model-weights")
    rng = random.Random(0)
    for _ in range(200):
        file.write_bytes(rng.randbytes(rng.randrange(100)))
        assert len(issues_of(folder)) <= 1


def test_a_checkpoint_that_is_quantized(make_model: MakeModel) -> None:
    folder = make_model("gptq", quantization_config={"quant_method": "gptq"})
    assert "is quantized by gptq" in only(issues_of(folder), "model-quantized")
    assert issues_of(folder, quantization__load_in_4bit=False) == []
    ours = make_model("bnb", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    issue = issues_of(ours)[0]
    assert (issue.severity, issue.rule) == ("warning", "model-quantized")


def test_a_revision_without_hub(make_model: MakeModel) -> None:
    issue = issues_of(make_model(), model__revision="main")[0]
    assert (issue.rule, issue.severity, issue.fix) == ("revision-without-hub", "warning", {"model.revision": None})
    assert issues_of("gpt2", model__revision="main") == []
