"""What ``auto`` stands for in ZeRO-3's settings: numbers made from one decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qz3_widgets.config import RunConfig, with_changes
from qz3_widgets.training.zero_settings import (
    MAX_REDUCE_BUCKET,
    apply_settings,
    computed_settings,
    decoder_layer_names,
    largest_block,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)


def model(*widths: int) -> nn.Module:
    """An embedding of 1,000 elements, and blocks of ``width`` squared each."""
    made = nn.Module()
    made.embedding = nn.Embedding(100, 10)
    made.layers = nn.ModuleList(Block(width) for width in widths)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def test_the_largest_of_the_blocks_that_repeat() -> None:
    assert largest_block(model(4, 6, 5)) == 36
    assert largest_block(model()) == 1000  # nothing repeats: all of it is gathered together


def test_an_only_block_is_one() -> None:
    assert largest_block(model(4)) == 16


def test_leaves_are_the_blocks_of_the_stack() -> None:
    assert decoder_layer_names(model(4, 4)) == ("Block",)
    assert decoder_layer_names(model(4)) == ("Block",)
    assert decoder_layer_names(nn.Linear(2, 2)) == ()


def test_experts_go_with_their_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Block(4) for _ in range(4))

    made = nn.Module()
    made.layers = nn.ModuleList(Layer() for _ in range(2))
    assert decoder_layer_names(made) == ("Layer",)


def test_two_stacks_have_two_kinds() -> None:
    made = nn.Module()
    made.encoder, made.decoder = model(4, 4), nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert set(decoder_layer_names(made)) == {"Block", "Linear"}


def test_what_stays_whole_is_not_gathered() -> None:
    assert largest_block(model(4, 6), persistent_below=35) == 36
    assert largest_block(model(4, 6), persistent_below=36) == 0


def test_what_is_partitioned_counts_whole() -> None:
    made = model(4, 4)
    for parameter in made.parameters():
        whole: Any = parameter
        whole.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert largest_block(made) == 16


def test_auto_is_computed_from_one_layer() -> None:
    made = model(8, 8)
    next(made.layers.parameters()).requires_grad_(True)  # type: ignore[union-attr]
    settings = computed_settings(RunConfig(), made, hidden_size=2).settings
    assert settings["reduce_bucket_size"] == 64
    assert settings["stage3_param_persistence_threshold"] == 20
    assert settings["stage3_prefetch_bucket_size"] == 64
    assert settings["stage3_max_live_parameters"] >= 64  # at least the layer at work
    assert settings["stage3_max_reuse_distance"] == 64


def test_what_is_given_stays() -> None:
    made = model(8, 8)
    names = computed_settings(RunConfig(), made, hidden_size=2).settings.keys()
    given = with_changes(RunConfig(), {f"zero.{name}": 5 for name in names})
    assert computed_settings(given, made, hidden_size=2).settings == {}
    partly = with_changes(RunConfig(), {"zero.stage3_param_persistence_threshold": 100})
    settings = computed_settings(partly, made, hidden_size=2).settings
    assert settings.keys() == names - {"stage3_param_persistence_threshold"}
    assert settings["stage3_prefetch_bucket_size"] == 0  # a layer's 64 elements count as small


def test_it_says_what_it_was_computed_from() -> None:
    computed = computed_settings(RunConfig(), model(8, 8), hidden_size=2)
    document = computed.to_json()
    assert document["leaf_modules"] == ("Block",)
    assert (document["layer_elements"], document["trainable_elements"], document["hidden_size"]) == (64, 0, 2)
    assert str(computed).startswith("leaf_modules Block, reduce_bucket_size 1, stage3_prefetch_bucket_size 64")
    named = with_changes(RunConfig(), {"zero.leaf_modules": ["Block"]})
    assert computed_settings(named, model(8, 8), hidden_size=2).leaf_modules == ()


def test_the_reduce_bucket_is_never_empty_nor_huge() -> None:
    assert computed_settings(RunConfig(), model(4), hidden_size=1).settings["reduce_bucket_size"] == 1
    made = model(4)
    large: Any = next(made.parameters())
    large.requires_grad_(True)
    large.ds_numel = 10 * MAX_REDUCE_BUCKET
    assert computed_settings(RunConfig(), made, hidden_size=1).settings["reduce_bucket_size"] == MAX_REDUCE_BUCKET


def test_settings_reach_the_engines_configuration() -> None:
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    apply_settings({"reduce_bucket_size": 3}, config)
    assert config == {"zero_optimization": {"stage": 3, "reduce_bucket_size": 3}}
