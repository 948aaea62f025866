"""Rules across fields, whatever the machine."""

from __future__ import annotations

from collections.abc import Iterator

from ..config.data_layout import num_held_out
from ..config.strategy import strategy_faults
from .context import BNB_OPTIMIZERS, Context
from .issue import Issue

_DTYPE_OF = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def sharding(context: Context) -> Iterator[Issue]:
    """What is partitioned, if anything."""
    stage, ranks = context.config.zero.zero_stage, context.config.launch.num_processes
    fix = {"zero.zero_stage": 3}
    if stage != 3:
        what = {0: "nothing is", 1: "only the optimizer's state is", 2: "only optimizer state and gradients are"}[stage]
        yield Issue("not-sharded", "info", "zero.zero_stage", f"{what} sharded: every rank holds the whole model", fix)
    elif ranks == 1:
        yield Issue("one-rank", "info", "launch.num_processes", "with one rank there is nothing to shard")


def load_strategy(context: Context) -> Iterator[Issue]:
    """The way in which the weights are loaded goes with the stage and the number of processes."""
    for field, message, fix in strategy_faults(context.config):
        yield Issue("load-strategy", "error", field, message, fix)
    zero = context.config.zero
    if zero.zero_stage == 3 and zero.shard_statistics and not zero.release_gathered:
        yield Issue(
            "statistics-stay-whole",
            "warning",
            "zero.shard_statistics",
            "has no effect with zero.release_gathered off: the released layer wants its statistics whole",
            {"zero.shard_statistics": False},
        )


def quantization(context: Context) -> Iterator[Issue]:
    """4-bit weights, and the type that they are stored in."""
    config = context.config
    section = config.quantization
    if not section.load_in_4bit:
        yield Issue(
            "not-quantized",
            "info",
            "quantization.load_in_4bit",
            "is off: plain LoRA, the base takes about four times the memory",
            {"quantization.load_in_4bit": True},
        )
    elif config.zero.zero_stage == 3 and section.bnb_4bit_quant_storage != config.model.dtype:
        yield Issue(
            "storage-dtype",
            "warning",
            "quantization.bnb_4bit_quant_storage",
            f"is {section.bnb_4bit_quant_storage}, and model.dtype is {config.model.dtype}: "
            "ZeRO-3 gathers each type by itself, which takes more collectives, and older versions fail at it",
            {"quantization.bnb_4bit_quant_storage": config.model.dtype},
        )


def precision(context: Context) -> Iterator[Issue]:
    """The types of weights, layers and activations agree."""
    config = context.config
    if config.training.precision == "fp16" and context.device == "cpu":
        return  # an error of its own, whose fix is another precision
    wanted = _DTYPE_OF[config.training.precision]
    given = {"model.dtype": config.model.dtype}
    if config.quantization.load_in_4bit:
        given["quantization.bnb_4bit_compute_dtype"] = config.quantization.bnb_4bit_compute_dtype
    for path, dtype in given.items():
        if dtype != wanted:
            yield Issue(
                "precision-mismatch",
                "warning",
                path,
                f"is {dtype}, and training.precision is {config.training.precision}: layers convert back and forth",
                {path: wanted},
            )


def offload(context: Context) -> Iterator[Issue]:
    """Offload to the CPU goes with neither 4-bit weights nor bitsandbytes' optimizers."""
    config = context.config
    if config.zero.offload_optimizer_device != "none" and config.training.optim in BNB_OPTIMIZERS:
        yield Issue(
            "offload-with-bnb-optimizer",
            "error",
            "training.optim",
            f"{config.training.optim} keeps its state on the GPU, and zero.offload_optimizer_device puts it on the CPU",
            {"training.optim": "adamw_torch"},
        )
    if config.zero.offload_param_device != "none" and config.quantization.load_in_4bit and context.device == "cuda":
        yield Issue(
            "offload-with-4bit",
            "warning",
            "zero.offload_param_device",
            "offloading 4-bit parameters is known to take more GPU memory, not less (PEFT's documentation says so too)",
            {"zero.offload_param_device": "none"},
        )


def adapter(context: Context) -> Iterator[Issue]:
    """Parts of the adapter that are not sharded."""
    if context.config.lora.modules_to_save:
        yield Issue(
            "modules-to-save",
            "warning",
            "lora.modules_to_save",
            "trained in full, with gradients and optimizer state, and not sharded while they load",
        )
    if (
        context.config.lora.use_dora
        and context.config.zero.zero_stage == 3
        and context.config.quantization.load_in_4bit
    ):
        yield Issue(
            "dora-with-zero3-4bit",
            "error",
            "lora.use_dora",
            "PEFT's DoRA layers make their base weight anew inside the forward, which ZeRO-3 can't partition in 4 bit",
            {"lora.use_dora": False},
        )


def loss(context: Context) -> Iterator[Issue]:
    """The part of an example that the loss counts exists in the data's layout."""
    data, layout = context.config.data, context.inputs.data.layout
    if layout is None:
        return
    fix = {"data.loss_on": "all"}
    if data.loss_on == "completion" and layout == "text":
        yield Issue(
            "loss-on-completion",
            "error",
            "data.loss_on",
            "is completion, and the data are plain text: there is no completion to tell apart",
            fix,
        )
    if data.loss_on == "assistant" and context.inputs.data.is_chat is False:
        yield Issue(
            "loss-on-assistant",
            "error",
            "data.loss_on",
            f"is assistant, and the data ({layout}) are no chats: there are no turns of an assistant",
            {"data.loss_on": "completion"} if layout == "prompt_completion" else fix,
        )


def packing(context: Context) -> Iterator[Issue]:
    """Packing without padding joins a batch into one long sequence."""
    config = context.config
    if config.data.packing and config.model.attn_implementation == "eager":
        length = config.data.max_length * config.training.per_device_train_batch_size
        yield Issue(
            "packing-with-eager",
            "warning",
            "model.attn_implementation",
            f"eager stores the square of the sequence, and packing makes one of up to {length} tokens of a batch",
            {"model.attn_implementation": "sdpa"},
        )


def evaluation(context: Context) -> Iterator[Issue]:
    """Evaluations that are asked for have data."""
    data, training = context.config.data, context.config.training
    if data.eval_source is not None:
        return
    asked = [name for name in ("eval_steps", "eval_on_start") if getattr(training, name)]
    if data.eval_fraction == 0:
        for name in asked:
            yield Issue(
                "eval-without-data",
                "error",
                f"training.{name}",
                "there is no evaluation data: data.eval_fraction is 0 and data.eval_source is empty",
                {"data.eval_fraction": context.default("data.eval_fraction")},
            )
        return
    available = context.inputs.data.num_examples
    if available is None:
        return
    used = available if data.max_examples is None else min(available, data.max_examples)
    if used > 0 and num_held_out(used, data.eval_fraction) == 0:
        yield Issue(
            "eval-fraction",
            "error" if asked else "warning",
            "data.eval_fraction",
            f"{used} example can't be split: nothing is held out for evaluation",
            {"data.eval_fraction": 0.0, **{f"training.{name}": context.default(f"training.{name}") for name in asked}},
        )


def intervals(context: Context) -> Iterator[Issue]:
    """Steps that never come."""
    training = context.config.training
    if training.max_steps is None:
        return
    for name, what in (("eval_steps", "evaluation during training"), ("save_steps", "checkpoint")):
        every = getattr(training, name)
        if every is not None and every > training.max_steps:
            yield Issue(
                "interval-beyond-end",
                "warning",
                f"training.{name}",
                f"{every} is more than max_steps ({training.max_steps}): there will be no {what}",
                {f"training.{name}": training.max_steps},
            )
    if training.warmup_steps >= training.max_steps:
        yield Issue(
            "warmup-beyond-end",
            "warning",
            "training.warmup_steps",
            f"{training.warmup_steps} is not less than max_steps ({training.max_steps}): the peak is never reached",
            {"training.warmup_steps": training.max_steps // 10},
        )


def without_effect(context: Context) -> Iterator[Issue]:
    """Fields that were set and that this configuration does not read."""
    config = context.config
    dead = {
        "training.num_train_epochs": config.training.max_steps is not None and "max_steps decides",
        "training.warmup_steps": config.training.lr_scheduler_type == "constant"
        and "lr_scheduler_type constant has no warmup; constant_with_warmup has",
        "quantization.llm_int8_skip_modules": not config.quantization.load_in_4bit and "load_in_4bit is off",
        "data.eval_fraction": config.data.eval_source is not None and "eval_source decides",
        "data.hub_config": context.inputs.data.is_local and "data.source is no hub dataset",
        "data.split": context.inputs.data.is_local and "data.source is no hub dataset",
        "data.chat_template": context.inputs.data.is_chat is False and "the data are no chats",
        "zero.stage3_prefetch_bucket_size": config.zero.zero_stage != 3 and "zero_stage is not 3",
        "zero.stage3_param_persistence_threshold": config.zero.zero_stage != 3 and "zero_stage is not 3",
        "zero.stage3_max_live_parameters": config.zero.zero_stage != 3 and "zero_stage is not 3",
        "zero.stage3_max_reuse_distance": config.zero.zero_stage != 3 and "zero_stage is not 3",
        "training.save_total_limit": config.training.save_steps is None and "save_steps is empty",
    }
    for path, why in dead.items():
        if why and context.changed(path):
            yield Issue("no-effect", "warning", path, f"has no effect: {why}", {path: context.default(path)})


def remote_code(context: Context) -> Iterator[Issue]:
    """Code of strangers."""
    if context.config.model.trust_remote_code:
        yield Issue(
            "remote-code",
            "warning",
            "model.trust_remote_code",
            f"Python code that comes with {context.config.model.name_or_path} runs with your rights on every rank",
        )


RULES = (
    sharding,
    load_strategy,
    quantization,
    precision,
    offload,
    adapter,
    loss,
    packing,
    evaluation,
    intervals,
    without_effect,
    remote_code,
)
