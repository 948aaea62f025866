from __future__ import annotations

from pathlib import Path

import pytest

from qz3_widgets.config import PRESET_GPUS, PRESETS, RunConfig, default_cache_dir, preset, preset_description
from qz3_widgets.config.shapes import shape_names

NUM_PRESETS = 8


def test_the_number_of_presets() -> None:
    assert len(PRESETS) == NUM_PRESETS
    assert list(PRESET_GPUS) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_configuration_with_a_description(name: str) -> None:
    config = preset(name)
    assert isinstance(config, RunConfig)
    assert config.zero.zero_stage == 3
    assert config.quantization.load_in_4bit
    assert config.quantization.bnb_4bit_quant_storage == config.model.dtype
    assert preset_description(name).endswith(".") or ":" in preset_description(name)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_a_preset_for_gpus_says_on_how_many(name: str) -> None:
    gpus = PRESET_GPUS[name]
    assert preset(name).launch.num_processes == gpus.num_gpus
    assert f"{gpus.num_gpus} GPUs of {gpus.gpu_memory_gib} GiB" in (PRESETS[name].__doc__ or "")
    assert str(gpus) == f"{gpus.num_gpus} x {gpus.gpu_memory_gib} GiB"


def test_names_and_models_differ() -> None:
    configs = [preset(name) for name in PRESETS]
    assert len({config.name for config in configs}) == NUM_PRESETS
    assert len({config.model.name_or_path for config in configs}) == NUM_PRESETS


def test_most_presets_have_a_shape() -> None:
    assert {name for name in PRESETS if name not in shape_names()} == {"demo"}


def test_the_demo_uses_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    config = preset("demo")
    assert config.model.name_or_path == str(tmp_path / "SmolLM2-135M-Instruct")
    assert config.data.source == str(tmp_path / "tech_support.jsonl")
    assert (config.launch.num_processes, config.launch.device) == (2, "auto")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no preset is called 'llama-8b'; did you mean llama-3.1-8b\?.*qwen3-32b"):
        preset("llama-8b")
    with pytest.raises(ValueError, match="There are: demo, "):
        preset_description("zzzz")
