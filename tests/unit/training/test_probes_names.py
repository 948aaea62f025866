from __future__ import annotations

import pytest

from qz3_widgets.training.probes.names import base_name, compress


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("module.base_model.model.lm_head.original_module.weight", "lm_head.weight"),
    ],
)
def test_a_name_is_the_same_under_the_adapter(name: str, expected: str) -> None:
    assert base_name(name) == expected


def test_names_that_differ_in_numbers_become_one() -> None:
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in ("q", "k")]
    assert compress(names) == ["model.layers.{0..31}.self_attn.q_proj", "model.layers.{0..31}.self_attn.k_proj"]


def test_gaps_and_several_numbers_are_shown() -> None:
    assert compress(["a.0.w", "a.2.w", "a.5.w"]) == ["a.{0,2,5}.w"]
    assert compress([f"layers.{i}.experts.{j}.w1" for i in range(2) for j in range(4)]) == [
        "layers.{0..1}.experts.{0..3}.w1"
    ]
    assert compress(["lm_head.weight", "model.norm2.weight"]) == ["lm_head.weight", "model.norm2.weight"]
    assert compress([]) == []
