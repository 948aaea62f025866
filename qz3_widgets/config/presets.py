"""Whole configurations to start from: the demo, and QLoRA with ZeRO-3 for well-known models on the GPUs they need.

A preset is a function; a variant calls another one and changes a few fields. The hub models need their licences
accepted and a token in the environment where the hub asks for them. Their data is an example; put your own there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from .changes import with_changes
from .paths import default_cache_dir
from .schema import RunConfig


@dataclass(frozen=True)
class MeantFor:
    """The hardware that a preset is made for; ``num_gpus`` 0 means that the CPU will do."""

    num_gpus: int
    gpu_memory_gib: int

    def __str__(self) -> str:
        return f"{self.num_gpus} x {self.gpu_memory_gib} GiB" if self.num_gpus else "CPU, or any GPU"


def demo() -> RunConfig:
    """SmolLM2-135M on technical-support dialogues, 2 ranks: a real run in a minute or two, on the CPU too."""
    cache = default_cache_dir()
    return with_changes(
        RunConfig(),
        {
            "name": "demo",
            "model.name_or_path": str(cache / "SmolLM2-135M-Instruct"),
            "lora.r": 8,
            "lora.lora_alpha": 16,
            "lora.target_modules": ["q_proj", "v_proj"],
            # One gather a layer instead of one for each small matrix of the adapter: a step takes little more than half
            # the time on two cores (4.6 against 8.4 s of CPU time with an adapter on all linear layers).
            "data.source": str(cache / "tech_support.jsonl"),
            "data.layout": "messages",
            "data.max_length": 128,
            "data.eval_fraction": 0.05,
            "training.per_device_train_batch_size": 4,
            "training.per_device_eval_batch_size": 4,
            "training.max_steps": 16,
            "training.learning_rate": 1e-3,
            "training.lr_scheduler_type": "linear",
            "training.optim": "adamw_torch",
            "training.eval_on_start": True,
            "training.memory_sample_seconds": 0.1,
            "launch.num_processes": 2,
        },
        source="preset demo",
    )


def llama_3_1_8b() -> RunConfig:
    """Llama 3.1 8B Instruct on 2 GPUs of 24 GiB."""
    return with_changes(
        RunConfig(),
        {
            "name": "llama-3.1-8b-qlora",
            "model.name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            "data.source": "trl-lib/Capybara",
            "data.layout": "messages",
            "data.max_length": 2048,
            "data.num_proc": 4,
            "data.eval_fraction": 0.02,
            "training.gradient_accumulation_steps": 8,
            "training.learning_rate": 2e-4,
            "training.warmup_steps": 10,
            # bitsandbytes' 8-bit optimizers save next to nothing here, since only the adapter has a state, and
            # DeepSpeed does not count them among those it is tested with.
            "training.optim": "adamw_torch_fused",
            "training.eval_steps": 100,
            "training.save_steps": 100,
            "training.save_total_limit": 2,
            "launch.num_processes": 2,
        },
        source="preset llama-3.1-8b",
    )


def llama_3_1_70b() -> RunConfig:
    """Llama 3.1 70B Instruct on 2 GPUs of 80 GiB.

    With stock loading the 4-bit base, some 37 GiB, is whole on each of them until the engine is built.
    """
    return with_changes(
        llama_3_1_8b(),
        {
            "name": "llama-3.1-70b-qlora",
            "model.name_or_path": "meta-llama/Llama-3.1-70B-Instruct",
            "training.learning_rate": 1e-4,
            "launch.timeout_seconds": 3600,
        },
        source="preset llama-3.1-70b",
    )


def llama_3_1_405b() -> RunConfig:
    """Llama 3.1 405B Instruct on 8 GPUs of 80 GiB, which hold it only if the 4-bit weights are sharded while they load.

    Stock loading puts the whole 4-bit model, some 200 GiB, on every rank first, and runs out of memory there.
    """
    return with_changes(
        llama_3_1_70b(),
        {
            "name": "llama-3.1-405b-qlora",
            "model.name_or_path": "meta-llama/Llama-3.1-405B-Instruct",
            "data.max_length": 1024,
            "training.gradient_accumulation_steps": 4,
            "training.learning_rate": 5e-5,
            "launch.num_processes": 8,
            "launch.timeout_seconds": 7200,
        },
        source="preset llama-3.1-405b",
    )


def qwen3_8b() -> RunConfig:
    """Qwen3 8B on 2 GPUs of 24 GiB."""
    return with_changes(
        llama_3_1_8b(),
        {
            "name": "qwen3-8b-qlora",
            "model.name_or_path": "Qwen/Qwen3-8B",
        },
        source="preset qwen3-8b",
    )


def qwen3_32b() -> RunConfig:
    """Qwen3 32B on 2 GPUs of 48 GiB.

    With stock loading the 4-bit base, some 18 GiB, is whole on each of them until the engine is built.
    """
    return with_changes(
        qwen3_8b(),
        {"name": "qwen3-32b-qlora", "model.name_or_path": "Qwen/Qwen3-32B", "training.learning_rate": 1e-4},
        source="preset qwen3-32b",
    )


def mistral_7b() -> RunConfig:
    """Mistral 7B Instruct v0.3 on 2 GPUs of 24 GiB."""
    return with_changes(
        llama_3_1_8b(),
        {
            "name": "mistral-7b-qlora",
            "model.name_or_path": "mistralai/Mistral-7B-Instruct-v0.3",
        },
        source="preset mistral-7b",
    )


def gemma_3_27b() -> RunConfig:
    """Gemma 3 27B instruction-tuned, its text part, on 2 GPUs of 48 GiB."""
    return with_changes(
        llama_3_1_8b(),
        {
            "name": "gemma-3-27b-qlora",
            "model.name_or_path": "google/gemma-3-27b-it",
            # The picture tower has q_proj, k_proj and v_proj too, and text never reaches it: an adapter there would
            # get no gradient. These names are the text part's alone.
            "lora.target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
            # A vocabulary of 262,208: the logits of one sequence of 2048 tokens are 2 GiB in fp32, several times.
            "data.max_length": 1024,
            "training.gradient_accumulation_steps": 16,
            "training.learning_rate": 1e-4,
        },
        source="preset gemma-3-27b",
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "llama-3.1-8b": llama_3_1_8b,
    "llama-3.1-70b": llama_3_1_70b,
    "llama-3.1-405b": llama_3_1_405b,
    "qwen3-8b": qwen3_8b,
    "qwen3-32b": qwen3_32b,
    "mistral-7b": mistral_7b,
    "gemma-3-27b": gemma_3_27b,
}
"""Name to function. A preset is made when it is asked for, since the demo's folders depend on the environment."""

PRESET_GPUS: dict[str, MeantFor] = {
    "demo": MeantFor(0, 0),
    "llama-3.1-8b": MeantFor(2, 24),
    "llama-3.1-70b": MeantFor(2, 80),
    "llama-3.1-405b": MeantFor(8, 80),
    "qwen3-8b": MeantFor(2, 24),
    "qwen3-32b": MeantFor(2, 48),
    "mistral-7b": MeantFor(2, 24),
    "gemma-3-27b": MeantFor(2, 48),
}
"""Preset name to the hardware it is meant for."""


def preset(name: str) -> RunConfig:
    """The preset called ``name``.

    Raises:
        ValueError: no such preset; the message names the nearest and lists all.
    """
    return _function(name)()


def preset_description(name: str) -> str:
    """The first sentence of a preset's docstring: what it is, and on which GPUs it is meant.

    Raises:
        ValueError: no such preset.
    """
    return (_function(name).__doc__ or "").partition("\n")[0].strip()


def _function(name: str) -> Callable[[], RunConfig]:
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no preset is called {name!r}{hint} There are: {', '.join(PRESETS)}")
