"""What every loading strategy takes and gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...config.schema import RunConfig
from ..sharding.sources import Source
from .noise import Noise


@dataclass(frozen=True)
class BaseModel:
    """Where the weights come from: a folder or hub id, or random values in the shape of ``shape``."""

    name_or_path: str
    shape: PretrainedConfig
    random: bool


Loader = Callable[[RunConfig, BaseModel, Callable[[str], None]], PreTrainedModel]
"""``(config, base, mark) -> model``: loads the base, quantized if the configuration says so, and calls ``mark(event)``
at moments worth a memory record. DeepSpeed's communication is up when it is called."""


def model_class(base: BaseModel) -> Any:
    """The causal language model's class for the base's shape."""
    return AutoModelForCausalLM._model_mapping[type(base.shape)]


def random_sources(base: BaseModel, dtype: torch.dtype) -> dict[str, Source]:
    """Random weights in the base's shape, made when they are read: the same on every rank, and however they are cut.

    Scales of norms are 1, biases 0; matrices are noise of the model's initial spread.
    """
    with torch.device("meta"):
        model = model_class(base)(copy.deepcopy(base.shape))
    spread = float(getattr(base.shape, "initializer_range", None) or 0.02)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if base.shape.tie_word_embeddings else set()
    return {
        name: Noise(name, tensor.shape, dtype, spread=spread)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
