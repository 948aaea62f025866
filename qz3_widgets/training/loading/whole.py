"""Strategies without ZeRO-3: a whole copy on every rank, or one process with its layers spread over the devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ...config.schema import RunConfig
from .base import BaseModel
from .stock import from_pretrained


def load_replicated(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """Every rank quantizes and keeps the whole model: right where it fits, since no weight travels."""
    return from_pretrained(config, base, mark, {})


def load_device_map(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """Let accelerate place whole layers on the GPUs in turn, and on the CPU what is left: one GPU works at a time.

    bitsandbytes keeps what lands on the CPU in 32 bit.
    """
    options: dict[str, Any] = {"llm_int8_enable_fp32_cpu_offload": True}
    return from_pretrained(config, base, mark, options, device_map="auto")
