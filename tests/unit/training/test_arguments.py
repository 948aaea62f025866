"""Every field of the configuration reaches the run: changed, it changes what is executed or what ranks are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config.changes import get_field, with_changes
from qz3_widgets.config.schema import RunConfig, field_paths
from qz3_widgets.launch.command import render
from qz3_widgets.plan.capabilities import imagine
from qz3_widgets.plan.plan import make_plan
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.training import arguments as args

BASE = {
    "launch.device": "cuda",
    "launch.num_processes": 4,
    "training.eval_steps": 10,
    "training.save_steps": 10,
    "training.early_stopping_patience": 3,
    "zero.offload_param_device": "cpu",
}
"""Switches without which other fields have nothing to act on."""

OTHER: dict[str, Any] = {
    "name": "another",
    "model.name_or_path": "Qwen/Qwen3-8B",
    "model.revision": "v2",
    "model.tokenizer_name_or_path": "somebody/tokenizer",
    "model.dtype": "float16",
    "model.attn_implementation": "eager",
    "model.trust_remote_code": True,
    "quantization.load_in_4bit": False,
    "quantization.bnb_4bit_quant_type": "fp4",
    "quantization.bnb_4bit_compute_dtype": "float32",
    "quantization.bnb_4bit_quant_storage": "uint8",
    "quantization.bnb_4bit_use_double_quant": False,
    "quantization.llm_int8_skip_modules": ["lm_head", "q_proj"],
    "lora.r": 4,
    "lora.lora_alpha": 5,
    "lora.lora_dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "lora.modules_to_save": ["norm"],
    "lora.bias": "all",
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "zero.zero_stage": 2,
    "zero.offload_param_device": "none",
    "zero.offload_optimizer_device": "cpu",
    "zero.offload_pin_memory": False,
    "zero.overlap_comm": False,
    "zero.contiguous_gradients": False,
    "zero.reduce_bucket_size": 1000,
    "zero.stage3_prefetch_bucket_size": 1000,
    "zero.stage3_param_persistence_threshold": 1000,
    "zero.stage3_max_live_parameters": 1000,
    "zero.stage3_max_reuse_distance": 1000,
    "zero.sub_group_size": 1000,
    "zero.stage3_gather_16bit_weights_on_model_save": False,
    "zero.leaf_modules": ["LlamaDecoderLayer"],
    "data.loss_on": "completion",
    "training.precision": "fp32",
    "training.activation_checkpointing": "reentrant",
    "training.lr_scheduler_type": "linear",
    "training.optim": "paged_adamw_8bit",
    "launch.device": "cpu",
    "launch.num_processes": 2,
    "launch.ranks_per_gpu": 2,
    "launch.num_machines": 2,
    "launch.machine_rank": 1,
    "launch.main_process_ip": "10.0.0.1",
    "launch.main_process_port": 29600,
    "launch.environment": {"NCCL_DEBUG": "INFO"},
}
"""Another value for fields that no rule below finds one for."""

TOGETHER: dict[str, dict[str, Any]] = {
    "launch.num_machines": {"launch.main_process_ip": "10.0.0.1", "launch.main_process_port": 29600},
    "launch.machine_rank": {
        "launch.num_machines": 2,
        "launch.main_process_ip": "10.0.0.1",
        "launch.main_process_port": 29600,
    },
    "zero.zero_stage": {"zero.offload_param_device": "none"},
}
"""Changes that a field needs beside it; they are in the base of its comparison too where they can be."""

READ_BY_THE_RANK = {
    # Taken from the configuration object where it is used; each has a test of its own behaviour.
    "data.source": "training/data.py",
    "data.source_format": "training/data.py",
    "data.hub_config": "training/data.py",
    "data.split": "training/data.py",
    "data.layout": "config/data_layout.py",
    "data.messages_column": "training/data.py",
    "data.prompt_column": "training/data.py",
    "data.completion_column": "training/data.py",
    "data.text_column": "training/data.py",
    "data.chat_template": "training/tokenizers.py",
    "data.eval_source": "training/data.py",
    "data.eval_fraction": "training/data.py",
    "data.max_examples": "training/data.py",
    "model.load_strategy": "config/strategy.py",
    "zero.release_gathered": "training/loading/sharded.py",
    "zero.fused_gather": "training/run.py",
    "training.activation_offload": "training/activation_offload.py",
    "zero.shard_statistics": "training/loading/sharded.py",
    "training.max_duration_seconds": "training/trainer.py",
    "training.memory_sample_seconds": "training/main.py",
    "training.profile_steps": "training/run.py",
    "training.logging_steps": "training/run.py",
    "launch.timeout_seconds": "training/arguments.py",
}

PACKAGE = Path(args.__file__).parents[1]


def given_to_the_run(config: RunConfig) -> str:
    """All that is executed and all that the libraries are given, as text."""
    layout = RunLayout(Path("/runs/one"))
    plan = make_plan(config, imagine(8, 80 * 2**30))
    rendered = render(
        plan, layout.root, port=config.launch.main_process_port or 0, python="python", train_script=Path("/t.py"),
        working_dir=Path("/w"),
    )  # fmt: skip
    device = plan.device
    return repr(
        [
            config.name, rendered, args.model_kwargs(config), args.tokenizer_kwargs(config),
            args.quantization_kwargs(config), args.lora_kwargs(config), args.checkpointing_kwargs(config),
            args.collective_timeout(config), config.model.name_or_path, config.zero.leaf_modules,
            args.sft_kwargs(config, layout, device=device, has_eval=True),
        ]
    )  # fmt: skip


def other_value(config: RunConfig, path: str) -> Any:
    if path in OTHER:
        return OTHER[path]
    value = get_field(config, path)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value else 7
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if value is None:
        return 7
    raise AssertionError(f"{path}: no other value is known for {value!r}")


@pytest.mark.parametrize("path", [path for path in field_paths() if path not in READ_BY_THE_RANK])
def test_a_changed_field_changes_the_run(path: str) -> None:
    together = TOGETHER.get(path, {})
    base = with_changes(RunConfig(), {**BASE, **(together if path != "launch.num_machines" else {})})
    if path == "training.early_stopping_patience":
        base = with_changes(base, {"training.early_stopping_patience": None})
    changed = with_changes(base, {**together, path: other_value(base, path)})
    assert get_field(changed, path) != get_field(base, path)
    assert given_to_the_run(changed) != given_to_the_run(base), f"{path} changes nothing: a dead control"


@pytest.mark.parametrize("path", sorted(READ_BY_THE_RANK))
def test_a_field_read_by_the_rank_is_read(path: str) -> None:
    source = (PACKAGE / READ_BY_THE_RANK[path]).read_text(encoding="utf-8")
    assert f".{path.rpartition('.')[2]}" in source


def test_the_list_of_fields_is_complete() -> None:
    assert set(READ_BY_THE_RANK) <= set(field_paths())
    assert set(OTHER) <= set(field_paths())
    assert len(field_paths()) > 80
