"""Load as the libraries do: every rank holds the whole quantized model, DeepSpeed partitions it afterwards.

transformers enters ``deepspeed.zero.Init`` only for models that are not quantized (``get_init_context`` in
``modeling_utils.py``), so with 4-bit weights ZeRO-3 shards nothing until the engine is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ...config.schema import RunConfig
from ..arguments import model_kwargs, quantization_kwargs
from .base import BaseModel, model_class, random_state


def load_stock(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """``from_pretrained``, with the arguments of the configuration and nothing else."""
    kwargs: dict[str, Any] = model_kwargs(config)
    quantization = quantization_kwargs(config)
    if quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
    if not base.random:
        model = AutoModelForCausalLM.from_pretrained(base.name_or_path, config=base.shape, **kwargs)
    else:
        state = random_state(base, kwargs["dtype"])
        mark("random_weights")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "trust_remote_code")}
        model = model_class(base).from_pretrained(None, config=base.shape, state_dict=state, **kwargs)
    mark("weights_loaded")
    return model  # type: ignore[no-any-return]
