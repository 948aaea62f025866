"""Load so that no rank ever holds the model: each parameter is quantized and partitioned as it comes.

A rank reads about 1/N of a safetensors checkpoint. What transformers has to convert (renamed, merged or split
weights) goes through its own pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config

from ...config.schema import RunConfig
from ...units import format_bytes
from ..arguments import model_kwargs, quantization_kwargs
from ..sharding.partition import Partitioner
from ..sharding.quantizer import ShardingOptions, finish_pending, sharded_quantizer
from ..sharding.sources import FileTensor, Source, free_staging, open_checkpoint
from .base import BaseModel, model_class, random_sources


def load_sharded(config: RunConfig, base: BaseModel, mark: Callable[[str], None]) -> PreTrainedModel:
    """``from_pretrained`` over unread tensors, with a quantizer that partitions.

    Raises:
        ValueError: ZeRO-3 or the quantization is off.
    """
    quantization = quantization_kwargs(config)
    known = deepspeed_config()
    if known is None or config.zero.zero_stage != 3 or quantization is None:
        raise ValueError("model.load_strategy: sharded needs zero.zero_stage 3 and quantization.load_in_4bit")
    options = ShardingOptions(
        Partitioner(known),
        shard_statistics=config.zero.shard_statistics,
        release_gathered=config.zero.release_gathered,
        mark=mark,
    )
    kwargs: dict[str, Any] = {**model_kwargs(config), "quantization_config": BitsAndBytesConfig(**quantization)}
    with sharded_quantizer(options):
        tensors = _tensors(base, kwargs)
        if tensors is None:  # an older file format: whole tensors, partitioned one by one
            model = model_class(base).from_pretrained(base.name_or_path, config=base.shape, **kwargs)
        else:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "trust_remote_code")}
            model = model_class(base).from_pretrained(None, config=base.shape, state_dict=tensors, **kwargs)
            # PEFT writes it into the adapter, where it names the base model to load.
            model.config._name_or_path = model.name_or_path = base.name_or_path
        finish_pending()
    free_staging()
    mark("weights_loaded")
    if tensors is not None and not base.random:
        print(
            f"read {format_bytes(FileTensor.bytes_read)} of the checkpoint's {format_bytes(_stored_bytes(tensors))}; "
            f"{options.num_sliced} tensors by slices, {options.num_whole} whole"
        )
    return model


def _tensors(base: BaseModel, kwargs: dict[str, Any]) -> dict[str, Source] | None:
    if base.random:
        return random_sources(base, kwargs["dtype"])
    return open_checkpoint(local_checkpoint(base, kwargs["revision"]))


def _stored_bytes(tensors: dict[str, Source]) -> int:
    return sum(source.numel() * source.stored.itemsize for source in tensors.values())


def local_checkpoint(base: BaseModel, revision: str) -> Path:
    """The folder with the checkpoint's files; from the hub, downloaded by one process of each machine."""
    folder = Path(base.name_or_path)
    if folder.is_dir():
        return folder
    from accelerate import PartialState
    from huggingface_hub import snapshot_download

    with PartialState().local_main_process_first():
        return Path(
            snapshot_download(
                base.name_or_path,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
