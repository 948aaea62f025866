"""Random weights: the same on every rank, and however they are cut."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig

from qz3_widgets.config.shapes import read_shape
from qz3_widgets.training.loading.base import BaseModel, random_sources
from qz3_widgets.training.loading.noise import Noise


def noise(name: str = "model.layers.0.mlp.up_proj.weight", *shape: int) -> Noise:
    return Noise(name, shape or (2000, 1100), torch.bfloat16, spread=0.02)  # longer than its period


def test_a_slice_is_the_slice_of_the_whole() -> None:
    source = noise()
    whole, rng = source.whole().reshape(-1), random.Random(0)
    assert whole.dtype == torch.bfloat16
    for _ in range(8):
        begin, end = sorted(rng.choices(range(whole.numel() + 1), k=2))
        assert torch.equal(source.read(begin, end), whole[begin:end])


def test_the_same_name_gives_the_same_values() -> None:
    assert torch.equal(noise().whole(), noise().whole())
    other = noise("model.layers.1.mlp.up_proj.weight")
    assert not torch.equal(noise().read(0, 1000), other.read(0, 1000))


def test_the_values_have_the_spread_that_was_asked_for() -> None:
    whole = noise().whole().float()
    assert float(whole.std()) == pytest.approx(0.02, rel=0.01)
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-4)
    assert not torch.equal(whole[0], whole[1])


def test_vectors_are_ones_and_biases_zeros() -> None:
    assert noise("model.norm.weight", 5).whole().tolist() == [1.0] * 5
    assert noise("model.layers.0.self_attn.q_proj.bias", 5).whole().tolist() == [0.0] * 5
    assert noise("model.norm.weight", 5).read(2, 4).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_noise_has_every_weight_once(tied: bool) -> None:
    values = read_shape("tiny-llama") | {"tie_word_embeddings": tied}
    shape = AutoConfig.for_model(values.pop("model_type"), **values)
    sources = random_sources(BaseModel("random:tiny-llama", shape, random=True), torch.bfloat16)
    assert ("lm_head.weight" in sources) is not tied
    assert sources["model.embed_tokens.weight"].shape == (320, 64)
    assert len(sources) == 3 - tied + 2 * 9
    assert {source.dtype for source in sources.values()} == {torch.bfloat16}
