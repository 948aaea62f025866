"""Load as the libraries do: every rank holds the whole quantized model, DeepSpeed partitions it afterwards.

transformers enters ``deepspeed.zero.Init`` only for models that are not quantized (``get_init_context`` in
``modeling_utils.py``), so with 4-bit weights ZeRO-3 shards nothing until the engine is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ...config.schema import RunConfig
from ..arguments import model_kwargs, quantization_kwargs
from ..sharding.linear import let_go, take_off_statistics
from .base import BaseModel, model_class, random_sources


def load_stock(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """``from_pretrained``, with the arguments of the configuration and nothing else."""
    model = from_pretrained(config, base, mark, {})
    if config.zero.zero_stage == 3:
        _close_other_leaks(config, model)
    return model


def from_pretrained(
    config: RunConfig,
    base: BaseModel,
    mark: Callable[[str], None],
    quantization_options: dict[str, Any],
    **options: Any,
) -> PreTrainedModel:
    """Load ``base`` as transformers does, from its files or from random values.

    Args:
        config: the run's configuration.
        base: where the weights come from.
        mark: told when there is something to record.
        quantization_options: arguments of ``BitsAndBytesConfig`` beside the configured ones.
        options: further arguments of ``from_pretrained``.
    """
    kwargs: dict[str, Any] = {**model_kwargs(config), **options}
    quantization = quantization_kwargs(config)
    if quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization, **quantization_options)
    if not base.random:
        model = AutoModelForCausalLM.from_pretrained(base.name_or_path, config=base.shape, **kwargs)
    else:
        state = {name: source.whole() for name, source in random_sources(base, kwargs["dtype"]).items()}
        mark("random_weights")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "trust_remote_code")}
        model = model_class(base).from_pretrained(None, config=base.shape, state_dict=state, **kwargs)
    mark("weights_loaded")
    return model


def _close_other_leaks(config: RunConfig, model: torch.nn.Module) -> None:
    """What the strategy's name does not speak of, unless the configuration wants it as released too."""
    if not config.zero.release_gathered:
        return
    for module in list(model.modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            layer = let_go(module)
            if config.zero.shard_statistics:
                take_off_statistics(layer)  # the engine partitions it with the weights
