"""From the configuration to the libraries' own arguments. Pure: no model, no disk, no clock.

Every field of the configuration that the ranks use passes through one of these functions, or through the launch
files; a test changes each field and sees that something here changes.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..config.schema import RunConfig
from ..runs.layout import RunLayout

DTYPES: dict[str, torch.dtype] = {
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


PRECISIONS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""``training.precision`` as a type."""


def local_or_hub(name: str) -> str:
    """A folder's path with ``~`` spelled out, or a hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def model_kwargs(config: RunConfig) -> dict[str, Any]:
    """Arguments of ``AutoModelForCausalLM.from_pretrained`` beside the quantization."""
    model = config.model
    return {
        "revision": model.revision or "main",
        "dtype": DTYPES[model.dtype],
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
    }


def tokenizer_kwargs(config: RunConfig) -> dict[str, Any]:
    """Arguments of ``AutoTokenizer.from_pretrained``; a tokenizer of its own has no use for the model's revision."""
    model = config.model
    own = model.tokenizer_name_or_path is not None
    return {
        "pretrained_model_name_or_path": local_or_hub(model.tokenizer_name_or_path or model.name_or_path),
        "revision": "main" if own else model.revision or "main",
        "trust_remote_code": model.trust_remote_code,
    }


def quantization_kwargs(config: RunConfig) -> dict[str, Any] | None:
    """Arguments of ``BitsAndBytesConfig``; ``None`` means a 16-bit base."""
    section = config.quantization
    if not section.load_in_4bit:
        return None
    skip = section.llm_int8_skip_modules
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": section.bnb_4bit_quant_type,
        "bnb_4bit_compute_dtype": DTYPES[section.bnb_4bit_compute_dtype],
        "bnb_4bit_quant_storage": DTYPES[section.bnb_4bit_quant_storage],
        "bnb_4bit_use_double_quant": section.bnb_4bit_use_double_quant,
        "llm_int8_skip_modules": None if skip is None else list(skip),
    }


def lora_kwargs(config: RunConfig) -> dict[str, Any]:
    """Arguments of ``peft.LoraConfig``."""
    section = config.lora
    targets = section.target_modules
    return {
        "task_type": "CAUSAL_LM",
        "r": section.r,
        "lora_alpha": section.lora_alpha,
        "lora_dropout": section.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": None if section.modules_to_save is None else list(section.modules_to_save),
        "bias": section.bias,
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
    }


def checkpointing_kwargs(config: RunConfig) -> dict[str, Any] | None:
    """``activation_checkpointing_kwargs`` of the Trainer; ``None`` where nothing is recomputed."""
    mode = config.training.activation_checkpointing
    return None if mode == "none" else {"use_reentrant": mode == "reentrant"}


def sft_kwargs(config: RunConfig, layout: RunLayout, *, device: str, has_eval: bool) -> dict[str, Any]:
    """Arguments of ``trl.SFTConfig`` for a run on ``device``; ``has_eval`` says whether there is evaluation data."""
    training, data = config.training, config.data
    evaluates = has_eval and training.eval_steps is not None
    patience = training.early_stopping_patience
    return {
        "output_dir": str(layout.checkpoints_dir),
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_train_epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "activation_checkpointing": training.activation_checkpointing != "none",
        "seed": training.seed,
        "data_seed": training.seed,
        "use_cpu": device == "cpu",
        "ddp_timeout": config.launch.timeout_seconds,
        "ddp_backend": _backend(config, device),
        # Every step is recorded; what is printed is thinned out by logging_steps, in the callback that prints.
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": [],
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.eval_steps if evaluates else None,
        "eval_on_start": training.eval_on_start and has_eval,
        "metric_for_best_model": "eval_loss" if evaluates and patience else None,
        "greater_is_better": False if evaluates and patience else None,
        "save_strategy": "no" if training.save_steps is None else "steps",
        "save_steps": training.save_steps or 500,
        "save_total_limit": training.save_total_limit,
        "dataloader_num_workers": data.dataloader_num_workers,
        "dataloader_pin_memory": device == "cuda",
        "dataset_num_proc": data.num_proc if data.num_proc > 1 else None,
        "dataset_text_field": "text",
        "max_length": data.max_length,
        "packing": data.packing,
        "completion_only_loss": data.loss_on == "completion",
        "assistant_only_loss": data.loss_on == "assistant",
        "trust_remote_code": config.model.trust_remote_code,
        "deepspeed": str(layout.deepspeed_json) if config.zero.zero_stage > 0 else None,
    }


def collective_timeout(config: RunConfig) -> timedelta:
    """How long a collective waits for the other ranks."""
    return timedelta(seconds=config.launch.timeout_seconds)


def _backend(config: RunConfig, device: str) -> str | None:
    """The collectives' backend; ``None`` for a process on its own, which accelerate would otherwise want to connect."""
    if config.zero.zero_stage == 0 and config.launch.num_processes == 1:
        return None
    # Ranks that share a GPU can't use NCCL, which wants a device for each.
    return "gloo" if device == "cpu" or config.launch.ranks_per_gpu > 1 else "nccl"
