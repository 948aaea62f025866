"""What a ZeRO-3 QLoRA run is made of: seven sections of fields, each with its meaning, unit and bounds.

The form, ``--set``, the docs table and the generated files all come from here. Field names are the ecosystem's own.
Models are frozen, unknown keys are refused, and rules that concern one section stand in it; rules across sections and
against a machine live in :mod:`qz3_widgets.plan`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Dtype = Literal["bfloat16", "float16", "float32"]
StorageDtype = Literal["uint8", "bfloat16", "float16", "float32"]
AutoOr = Literal["auto"]

_SECRET_NAME = re.compile(r"TOKEN(?!IZERS_)|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # a list will do: YAML has no tuples


def _f(default: Any, description: str, *, unit: str | None = None, rare: bool = False, **bounds: Any) -> Any:
    """A field with one description, its unit, and whether a form folds it away (``rare``)."""
    return Field(default=default, description=description, json_schema_extra={"unit": unit, "rare": rare}, **bounds)


class Section(BaseModel):
    """Base of all sections: frozen, strict about unknown keys and about types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model: where it comes from and how it is loaded."""

    name_or_path: str = _f(
        "meta-llama/Llama-3.1-8B",
        "Hub id, local folder, or random:<preset name or path of a config.json> for random weights in that shape.",
        min_length=1,
    )
    revision: str | None = _f(None, "Branch, tag or commit on the hub; empty means the default branch.", rare=True)
    tokenizer_name_or_path: str | None = _f(
        None, "Hub id or folder of the tokenizer; empty means the model's own.", rare=True
    )
    load_strategy: Literal["auto", "sharded", "stock", "replicated", "device_map"] = _f(
        "auto",
        "How the weights get onto the ranks. sharded: each is quantized and partitioned as it comes, no rank holds "
        "the model. stock: as released, every rank holds it whole first. replicated: data parallel, a whole copy each. "
        "device_map: one process, layers spread over the devices. auto: sharded for ZeRO-3 with 4 bit.",
    )
    dtype: Dtype = _f("bfloat16", "Type of the weights that are not quantized: embeddings, norms, head.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = _f(
        "sdpa", "Attention kernel. flash_attention_2 and _3 need their packages and a GPU."
    )
    trust_remote_code: bool = _f(
        False,
        "Run Python code that comes with the model. It can do anything you can: only for sources you trust.",
        rare=True,
    )


class QuantizationSection(Section):
    """4-bit quantization of the frozen base by bitsandbytes."""

    load_in_4bit: bool = _f(True, "Quantize the linear layers of the base to 4 bit. Off means plain LoRA.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _f("nf4", "4-bit data type; nf4 fits normally distributed weights.")
    bnb_4bit_compute_dtype: Dtype = _f("bfloat16", "Type in which the layers compute after dequantization.")
    bnb_4bit_quant_storage: StorageDtype = _f(
        "bfloat16", "Type that the packed nibbles are stored as. ZeRO-3 wants the same type as model.dtype."
    )
    bnb_4bit_use_double_quant: bool = _f(
        True, "Quantize the quantization statistics too: about 0.4 bit per parameter less."
    )
    llm_int8_skip_modules: Names | None = _f(
        None, "Names of modules kept in 16 bit; empty means the library's choice (the head).", rare=True
    )


class LoraSection(Section):
    """The trainable low-rank adapter."""

    r: int = _f(16, "Rank of the update matrices.", ge=1, le=1024)
    lora_alpha: int = _f(32, "Scale of the update: it is multiplied by lora_alpha / r.", ge=1)
    lora_dropout: float = _f(0.0, "Dropout on the adapter's input.", ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | Names = _f(
        "all-linear", "Which layers get an adapter: all-linear, or a list of module names such as q_proj."
    )
    modules_to_save: Names | None = _f(
        None, "Whole modules that are trained and saved beside the adapter. They are not sharded: costly.", rare=True
    )
    bias: Literal["none", "all", "lora_only"] = _f("none", "Which biases are trained.", rare=True)
    use_rslora: bool = _f(False, "Rank-stabilized scale: lora_alpha / sqrt(r).", rare=True)
    use_dora: bool = _f(False, "Weight-decomposed adaptation: a magnitude vector per layer; slower.", rare=True)

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if value == ():
            raise ValueError("is an empty list: name at least one module, or use all-linear")
        return value


class ZeroSection(Section):
    """DeepSpeed ZeRO: what is partitioned over the ranks, and in which pieces it moves."""

    zero_stage: Literal[0, 1, 2, 3] = _f(
        3, "What is partitioned: 1 optimizer state, 2 and gradients, 3 and parameters. 0 is plain data parallel."
    )
    offload_param_device: Literal["none", "cpu"] = _f("none", "Where each rank's shard of the parameters lives.")
    offload_optimizer_device: Literal["none", "cpu"] = _f("none", "Where the optimizer's state lives and steps.")
    offload_pin_memory: bool = _f(True, "Keep offloaded tensors in pinned host memory: faster copies.", rare=True)
    overlap_comm: bool = _f(True, "Overlap communication with computation, for more memory.", rare=True)
    contiguous_gradients: bool = _f(True, "Copy gradients into one buffer as they are produced.", rare=True)
    reduce_bucket_size: PositiveInt | AutoOr = _f(
        "auto", "Elements reduced at once; auto: the adapter's, 50 million at most.", unit="elements", rare=True
    )
    stage3_prefetch_bucket_size: NonNegativeInt | AutoOr = _f(
        "auto", "Storage elements gathered ahead; auto: one layer.", unit="elements", rare=True
    )
    stage3_param_persistence_threshold: NonNegativeInt | AutoOr = _f(
        "auto",
        "Parameters smaller than this stay whole on every rank; auto: 10 x hidden size.",
        unit="elements",
        rare=True,
    )
    stage3_max_live_parameters: NonNegativeInt | AutoOr = _f(
        "auto",
        "Storage elements gathered before prefetching waits; auto: two layers. One holds four packed 4-bit weights.",
        unit="elements",
        rare=True,
    )
    stage3_max_reuse_distance: NonNegativeInt | AutoOr = _f(
        "auto",
        "What is used again within so many storage elements is not released in between; auto: one layer.",
        unit="elements",
        rare=True,
    )
    sub_group_size: PositiveInt = _f(
        1_000_000_000, "Elements that the optimizer steps at once.", unit="elements", rare=True
    )
    stage3_gather_16bit_weights_on_model_save: bool = _f(
        True, "Gather trained weights on rank 0 when saving, so that plain PEFT can load the adapter."
    )
    release_gathered: bool = _f(
        True,
        "Let go of gathered 4-bit weights between forward and backward. false: as released, where every layer that was "
        "gathered stays until its backward.",
    )
    shard_statistics: bool = _f(
        True, "Partition the quantization statistics with the weights. false: they stay whole on every rank.", rare=True
    )
    leaf_modules: Literal["auto", "none"] | Names = _f(
        "auto",
        "Modules that are gathered and released as one. auto: the model's decoder layers; none: each weight by itself, "
        "as DeepSpeed does; or class names, such as LlamaDecoderLayer.",
        rare=True,
    )
    fused_gather: bool = _f(
        True,
        "Gather each leaf module's shards in one collective, the next one ahead. false: DeepSpeed's own hooks, which "
        "walk over each weight. Needs release_gathered.",
        rare=True,
    )

    # One validator for each field, and none for the section: so every contradiction is reported, not only the first,
    # and at its own field. `info.data` holds the fields above that are valid.
    @field_validator("offload_param_device", "leaf_modules")
    @classmethod
    def _needs_stage_3(cls, value: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        stage = info.data.get("zero_stage", 3)
        if value == ():
            raise ValueError("is an empty list: name a class, or use auto or none")
        if value not in ("none", "auto") and stage != 3:
            raise ValueError(f"needs zero_stage 3, not {stage}; or set it to none")
        return value

    @field_validator("offload_optimizer_device")
    @classmethod
    def _needs_some_stage(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("zero_stage", 3) == 0:
            raise ValueError("needs zero_stage 1, 2 or 3, not 0; or set it to none")
        return value


class DataSection(Section):
    """The training text."""

    source: str = _f(
        "data.jsonl",
        "A file (.jsonl, .json, .csv, .parquet, .txt), a folder of such files, or a hub dataset.",
        min_length=1,
    )
    source_format: Literal["auto", "jsonl", "csv", "parquet", "text", "hub"] = _f(
        "auto",
        "What the source is; auto goes by the file's ending, and takes what is no path for a hub dataset.",
        rare=True,
    )
    hub_config: str | None = _f(None, "Configuration of a hub dataset that has several.", rare=True)
    split: str = _f("train", "Split of a hub dataset.", rare=True, min_length=1)
    layout: Literal["auto", "messages", "prompt_completion", "text"] = _f(
        "auto", "What one example is: a chat, a prompt with its completion, or plain text. auto goes by the columns."
    )
    messages_column: str = _f("messages", "Column with the chat: a list of {role, content}.", rare=True, min_length=1)
    prompt_column: str = _f("prompt", "Column with the prompt.", rare=True, min_length=1)
    completion_column: str = _f("completion", "Column with the completion.", rare=True, min_length=1)
    text_column: str = _f("text", "Column with plain text.", rare=True, min_length=1)
    chat_template: str | None = _f(None, "A Jinja file used in place of the tokenizer's chat template.", rare=True)
    max_length: int = _f(1024, "Longest example; what is longer is cut.", unit="tokens", ge=8)
    packing: bool = _f(False, "Put several short examples into one sequence of max_length.")
    loss_on: Literal["all", "completion", "assistant"] = _f(
        "all", "Which tokens the loss counts: all, the completion, or the assistant's turns."
    )
    eval_source: str | None = _f(None, "A source of its own for evaluation; empty means a part of the training data.")
    eval_fraction: Fraction = _f(0.05, "Part of the data that is held out for evaluation; 0 means none.")
    max_examples: PositiveInt | None = _f(None, "Use only the first so many examples.", unit="examples", rare=True)
    num_proc: PositiveInt = _f(1, "Processes that tokenize.", unit="processes", rare=True)
    dataloader_num_workers: NonNegativeInt = _f(0, "Processes that load batches on each rank.", rare=True)


class TrainingSection(Section):
    """Optimization, precision, limits, and what is recorded."""

    per_device_train_batch_size: int = _f(1, "Sequences in one forward pass of one rank.", unit="sequences", ge=1)
    per_device_eval_batch_size: int = _f(1, "Sequences in one evaluation pass of one rank.", unit="sequences", ge=1)
    gradient_accumulation_steps: int = _f(1, "Forward passes whose gradients make one step.", ge=1)
    max_steps: PositiveInt | None = _f(None, "Optimizer steps; empty means as many as num_train_epochs gives.")
    num_train_epochs: float = _f(1.0, "Passes over the data, where max_steps is empty.", gt=0.0)
    max_duration_seconds: PositiveInt | None = _f(
        None, "Stop after the step in which this time is over, and save.", unit="s", rare=True
    )
    early_stopping_patience: PositiveInt | None = _f(
        None, "Stop after so many evaluations without a better loss. Needs eval_steps.", unit="evaluations", rare=True
    )
    learning_rate: float = _f(2e-4, "Peak learning rate.", gt=0.0, le=1.0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = _f(
        "cosine", "How the learning rate changes over the steps."
    )
    warmup_steps: NonNegativeInt = _f(0, "Steps over which the learning rate rises from 0.", unit="steps")
    weight_decay: float = _f(0.0, "Weight decay of the adapter.", ge=0.0, le=1.0)
    max_grad_norm: float = _f(1.0, "Gradients are scaled down to this norm; 0 means never.", ge=0.0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = _f(
        "adamw_torch", "Optimizer. The 8-bit and paged ones are bitsandbytes' own and need a GPU."
    )
    adam_beta1: float = _f(0.9, "Adam's decay of the gradient's mean.", ge=0.0, lt=1.0, rare=True)
    adam_beta2: float = _f(0.999, "Adam's decay of the gradient's square.", ge=0.0, lt=1.0, rare=True)
    adam_epsilon: float = _f(1e-8, "Adam's term against division by zero.", gt=0.0, rare=True)
    precision: Literal["bf16", "fp16", "fp32"] = _f("bf16", "Type of activations and gradients.")
    activation_checkpointing: Literal["non_reentrant", "reentrant", "none"] = _f(
        "non_reentrant", "Recompute each layer in the backward pass instead of keeping its activations."
    )
    activation_offload: bool | AutoOr = _f(
        "auto",
        "Keep the inputs of decoder layers, which checkpointing saves, in pinned host memory, copied while the GPU "
        "computes. auto: where they would take more than 4 % of the GPU's memory.",
        rare=True,
    )
    seed: NonNegativeInt = _f(42, "Seed of the adapter's weights, of shuffling and of the held-out split.")
    logging_steps: int = _f(1, "Steps between two lines in the log. Metrics are recorded at every step.", ge=1)
    eval_steps: PositiveInt | None = _f(
        None, "Steps between two evaluations; empty means only at the end.", unit="steps"
    )
    eval_on_start: bool = _f(False, "Evaluate before the first step too.")
    save_steps: PositiveInt | None = _f(None, "Steps between two checkpoints; empty means none.", unit="steps")
    save_total_limit: PositiveInt | None = _f(None, "Checkpoints kept; empty means all.", rare=True)
    memory_sample_seconds: float = _f(
        0.2,
        "Time between two memory samples within a phase; phases and steps are recorded in any case.",
        unit="s",
        ge=0.01,
        le=60.0,
        rare=True,
    )

    profile_steps: PositiveInt | None = _f(
        None,
        "Write a torch profiler trace of so many steps, on each rank, to the run's trace folder; empty means none.",
        unit="steps",
        le=100,
        rare=True,
    )

    @field_validator("eval_steps")
    @classmethod
    def _patience_needs_evaluations(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("early_stopping_patience") is not None:
            raise ValueError("early_stopping_patience needs it: set how often to evaluate")
        return value


class LaunchSection(Section):
    """Where the ranks run."""

    device: Literal["auto", "cuda", "cpu"] = _f("auto", "auto takes the GPUs if there are any, else the CPU.")
    num_processes: int = _f(2, "Ranks over all machines; on GPUs one for each.", unit="ranks", ge=1)
    ranks_per_gpu: int = _f(
        1, "Ranks that share one GPU, over gloo: for trying out a sharding on fewer GPUs; slow.", ge=1, rare=True
    )
    num_machines: int = _f(1, "Machines that take part, each with num_processes / num_machines ranks.", ge=1, rare=True)
    machine_rank: NonNegativeInt = _f(0, "This machine's number, from 0.", rare=True)
    main_process_ip: str | None = _f(None, "Address of machine 0; needed for more than one machine.", rare=True)
    main_process_port: Annotated[int, Field(ge=1024, le=65535)] | None = _f(
        None, "Port of machine 0; empty means a free one.", rare=True
    )
    timeout_seconds: int = _f(
        1800, "How long a rank waits for the others before it gives up.", unit="s", ge=10, rare=True
    )
    threads_per_rank: PositiveInt | None = _f(
        None, "CPU threads of each rank; empty means cores / ranks.", unit="threads", rare=True
    )
    environment: dict[str, str] = _f(
        {}, "Environment variables of the ranks. Not for secrets: they are written to the run directory.", rare=True
    )

    @field_validator("num_machines")
    @classmethod
    def _ranks_divide(cls, value: int, info: ValidationInfo) -> int:
        num_processes = info.data.get("num_processes", value)
        if num_processes % value:
            raise ValueError(f"num_processes ({num_processes}) does not divide by num_machines ({value})")
        return value

    @field_validator("machine_rank")
    @classmethod
    def _machine_exists(cls, value: int, info: ValidationInfo) -> int:
        num_machines = info.data.get("num_machines", value + 1)
        if value >= num_machines:
            raise ValueError(f"{value} is not below num_machines ({num_machines}); the first machine is 0")
        return value

    @field_validator("main_process_ip", "main_process_port")
    @classmethod
    def _machines_meet(cls, value: str | int | None, info: ValidationInfo) -> str | int | None:
        if value is None and info.data.get("num_machines", 1) > 1:
            raise ValueError("more than one machine needs it, the same on all of them")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = [repr(name) for name in value if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        if wrong:
            raise ValueError(f"no name for a variable: {', '.join(wrong)}")
        unusable = [name for name, text in value.items() if "\0" in text]
        if unusable:
            raise ValueError(f"{', '.join(unusable)} holds a NUL character, which no environment can")
        secret = [name for name in value if _SECRET_NAME.search(name)]
        if secret:
            raise ValueError(
                f"{', '.join(secret)} looks like a secret, and this file is not the place for it; "
                "export it before you start the run, the ranks inherit it"
            )
        return value


class RunConfig(Section):
    """One run: seven sections, and a name."""

    name: str = _f(
        "run", "What the run is called; its directory is named after it.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
    )
    model: ModelSection = Field(default_factory=ModelSection)
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    zero: ZeroSection = Field(default_factory=ZeroSection)
    data: DataSection = Field(default_factory=DataSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    launch: LaunchSection = Field(default_factory=LaunchSection)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "quantization": QuantizationSection,
    "lora": LoraSection,
    "zero": ZeroSection,
    "data": DataSection,
    "training": TrainingSection,
    "launch": LaunchSection,
}
"""Section name to its class, in the order in which a form shows them."""


def field_paths() -> tuple[str, ...]:
    """Every leaf field as ``section.field`` (and ``name``), in schema order."""
    return ("name", *(f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields))
