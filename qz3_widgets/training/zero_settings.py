"""ZeRO-3's settings that depend on the model's sizes: what ``auto`` stands for, computed in the rank.

All are numbers of storage elements, of which a bf16-packed 4-bit weight has one for four weights. The unit is one
decoder layer: gathered whole, the next one ahead of time, and let go before the one after that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config.schema import RunConfig

MAX_REDUCE_BUCKET = 20_000_000
"""Elements. Only the adapter has gradients, and a bucket larger than them all is memory for nothing."""


def largest_block(model: nn.Module, persistent_below: int = 0) -> int:
    """Storage elements of the largest block that the model repeats, a decoder layer.

    A model of one layer repeats none: its blocks are taken as they are; one without blocks is a block itself.
    Parameters of ``persistent_below`` elements and less are left out: ZeRO-3 keeps those whole, and gathers them no
    more.
    """
    blocks = [block for holder in model.modules() if isinstance(holder, nn.ModuleList) for block in holder]
    kinds = Counter(type(block) for block in blocks)
    repeated = [block for block in blocks if kinds[type(block)] > 1] or blocks or [model]
    return max(
        sum(size for parameter in block.parameters() if (size := _elements_of(parameter)) > persistent_below)
        for block in repeated
    )


def decoder_layer_names(model: nn.Module) -> tuple[str, ...]:
    """Class names of the blocks that the model is a stack of; a model with several stacks has several.

    Gathered by itself, each of a layer's weights, scales and adapters costs a turn of ZeRO-3's hooks in forward,
    recompute and backward, which take longer than the arithmetic: 2.4 s against 1.3 s a step in the shape of an 8B
    model on one H100, 1024 tokens.
    """
    names: dict[str, None] = {}
    inside: set[nn.Module] = set()
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList) and holder not in inside:  # what a block is made of goes with it
            for block in holder:
                inside.update(block.modules())
                names[type(block).__name__] = None
    return tuple(names)


@dataclass(frozen=True)
class Computed:
    """Settings that were ``auto``, and what they were computed from."""

    settings: dict[str, int]
    """DeepSpeed's names, in storage elements."""
    leaf_modules: tuple[str, ...]  # empty where the configuration says which, or none
    layer_elements: int  # of one decoder layer, without what stays whole
    trainable_elements: int
    hidden_size: int

    def to_json(self) -> dict[str, Any]:
        """For the probe's file."""
        return asdict(self)

    def __str__(self) -> str:
        told = [f"{name} {number:,}" for name, number in self.settings.items()]
        if self.leaf_modules:
            told.insert(0, f"leaf_modules {' '.join(self.leaf_modules)}")
        return ", ".join(told)


def computed_settings(config: RunConfig, model: nn.Module, hidden_size: int) -> Computed:
    """The settings that are ``auto`` in the configuration, with their numbers for this model.

    ``stage3_param_persistence_threshold``: 10 x hidden size, norms and biases. ``stage3_prefetch_bucket_size``: one
    layer ahead, to the element, or a parameter of the next one comes along. ``stage3_max_live_parameters``: two
    layers, the one at work and the next. ``stage3_max_reuse_distance``: one layer, so that it stays between its
    recomputation and its backward, and the last layers of the forward do not stay until theirs.
    ``reduce_bucket_size``: the adapter's elements, within reason.
    """
    zero = config.zero
    threshold = zero.stage3_param_persistence_threshold
    persistent = 10 * hidden_size if isinstance(threshold, str) else threshold
    layer = largest_block(model, persistent)
    trainable = sum(_elements_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    numbers = {
        "reduce_bucket_size": max(1, min(MAX_REDUCE_BUCKET, trainable)),
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": persistent,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": layer,
    }
    settings = {name: number for name, number in numbers.items() if getattr(zero, name) == "auto"}
    leaves = decoder_layer_names(model) if zero.leaf_modules == "auto" else ()
    return Computed(settings, leaves, layer, trainable, hidden_size)


def apply_settings(settings: dict[str, int], deepspeed_config: dict[str, Any]) -> None:
    """Write them into the configuration that the engine is going to be built with."""
    deepspeed_config["zero_optimization"].update(settings)


def _elements_of(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
