"""Shapes of models: the package's tables are what the classes say, and other models are read and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.presets import PRESETS, preset
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.config.shapes import read_shape, shape_names
from qz3_widgets.plan import shapes
from qz3_widgets.plan.shapes import known_shape, model_shape, write_tables


def config_of(name: str, **changes: object) -> RunConfig:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return with_changes(RunConfig(), {"model.name_or_path": name, **fields})


def test_the_tables_are_what_the_classes_say(tmp_path: Path) -> None:
    written = write_tables(tmp_path)
    assert [path.stem for path in written] == list(shape_names())
    for path in written:
        kept = Path(shapes.__file__).with_name("shape_tables") / path.name
        assert json.loads(path.read_text()) == json.loads(kept.read_text()), path.stem


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_every_presets_shape_is_at_hand(name: str) -> None:
    shape = known_shape(preset(name))
    assert shape is not None
    assert shape.num_layers == shape.fact("num_hidden_layers")
    assert shape.num_quantized > 0.8 * shape.num_parameters


def test_llama_405b() -> None:
    shape = known_shape(preset("llama-3.1-405b"))
    assert shape is not None
    assert shape.num_parameters == 405_853_388_800
    assert shape.num_layers == 126
    assert shape.head is not shape.embedding
    assert {weight.name for weight in shape.main[0].weights if not weight.quantized} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


def test_fewer_layers() -> None:
    whole, cut = known_shape(config_of("random:llama-3.1-8b")), known_shape(config_of("random:llama-3.1-8b@3"))
    assert whole is not None
    assert cut is not None
    assert (whole.num_layers, cut.num_layers) == (32, 3)
    layer = whole.main[0].numel
    assert whole.num_parameters - cut.num_parameters == 29 * layer


def test_a_tied_head_counts_once() -> None:
    shape = known_shape(config_of("random:gemma-3-27b"))
    assert shape is not None
    assert shape.head is shape.embedding
    assert shape.head is not None
    assert shape.head.role == "tied"


def test_experts_stay_in_16_bit() -> None:
    shape = known_shape(config_of("random:mixtral-8x7b"))
    assert shape is not None
    experts = [weight for weight in shape.main[0].weights if "experts" in weight.name]
    assert [weight.quantized for weight in experts] == [False, False]
    assert shape.num_quantized < 0.1 * shape.num_parameters


def test_another_model_is_read_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "a cache"))
    file = tmp_path / "my model" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(read_shape("tiny-llama") | {"num_hidden_layers": 3}))
    config = config_of(str(file.parent))
    assert known_shape(config) is None
    shape = model_shape(config)
    assert shape.num_layers == 3
    assert known_shape(config) == shape
    assert known_shape(config_of(f"random:{file}")) == shape
    cut = known_shape(config_of(f"random:{file}@2"))
    assert cut is not None
    assert cut.num_layers == 2
    # What decides the quantization is part of it.
    skipped = config_of(str(file.parent), quantization__llm_int8_skip_modules=["q_proj", "lm_head"])
    assert known_shape(skipped) is None
    assert model_shape(skipped).num_quantized < shape.num_quantized
    # A torn file is no shape, and is read anew.
    for kept in (tmp_path / "a cache" / "shapes").iterdir():
        kept.write_text(kept.read_text()[:100])
    assert known_shape(config) is None
    assert model_shape(config) == shape


def test_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name_or_path: the shape of nobody/nothing is not known here"):
        model_shape(config_of("nobody/nothing"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ValueError, match=r"model\.name_or_path: the model's shape can't be read: .*no-such-type"):
        model_shape(config_of(f"random:{file}"))
