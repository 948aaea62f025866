"""What every loading strategy takes and gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...config.schema import RunConfig


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


def random_state(base: BaseModel, dtype: torch.dtype, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Freshly initialized weights in the base's shape: name to tensor of ``dtype``, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The class itself, since from_config() would hand the weights to ZeRO-3 at once.
        model = model_class(base)(copy.deepcopy(base.shape)).to(dtype)
    return dict(model.state_dict())
