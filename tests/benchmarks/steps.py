"""Seconds and memory of a QLoRA step: without ZeRO (the floor), ZeRO-3 as released, ours, and FSDP2 beside them.

    python tests/benchmarks/steps.py [--variants floor,ours,stock,fsdp2] [--sizes 1x1024,4x2048] [--steps 20]
        [--set FIELD=VALUE] [--out DIR]
    python tests/benchmarks/steps.py --device cpu    # SmolLM2-135M on 2 CPU ranks: stock and ours, 4x128 and 1x64

One GPU, NCCL with one rank, the 8B shape from a checkpoint of random weights on disk, LoRA r 16 on all linear layers,
activation checkpointing, the same texts in the same order. All but ``fsdp2`` are runs of the package; that one is TRL's
trainer with accelerate's FSDP2, decoder layers wrapped and resharded after their forward. Variants run in turn, in one
call; ratios are to the floor of the same call. The first steps are left out of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

WARM_UP = 4
STOCK = {
    "model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False,
    "zero.leaf_modules": "none", "zero.reduce_bucket_size": 50_000_000, "zero.stage3_prefetch_bucket_size": 50_000_000,
    "zero.stage3_param_persistence_threshold": 10_000, "zero.stage3_max_live_parameters": 1_000_000_000,
    "zero.stage3_max_reuse_distance": 1_000_000_000,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "floor": {"model.load_strategy": "replicated", "zero.zero_stage": 0},
    "ours": {},
    "stock": STOCK,
    "fsdp2": {},
}


def train_peer(options: argparse.Namespace) -> None:
    """Be the FSDP2 rank; started by torchrun."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.cuda.set_device(0)
    batch, length = (int(part) for part in options.size.split("x"))
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(round(float(logs["loss"]), 4))

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=options.steps, logging_steps=1,
        bf16=True, report_to=[], save_strategy="no", learning_rate=1e-4, disable_tqdm=True, max_length=length,
        seed=42, data_seed=42, optim="adamw_torch_fused", max_grad_norm=1.0, lr_scheduler_type="constant",
        fsdp="full_shard auto_wrap",
        fsdp_config={
            "fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "fsdp_reshard_after_forward": True, "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    )  # fmt: skip
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        options.checkpoint, quantization_config=quantization, dtype=torch.bfloat16
    )
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(options.texts), split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.checkpoint),
        callbacks=[Clock()],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    figures = {
        "state": "succeeded", "step_seconds": seconds, "losses": losses,
        "step_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30,
    }  # fmt: skip
    options.result.write_text(json.dumps(figures))
    os._exit(0)  # some versions wait for each other at exit


def run_peer(checkpoint: Path, lines: Path, size: str, steps: int) -> dict[str, Any]:
    """Start the FSDP2 rank and read what it measured."""
    result = Path(tempfile.mkdtemp()) / "peer.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
        str(Path(__file__).resolve()), "--checkpoint", str(checkpoint), "--texts", str(lines),
        "--size", size, "--steps", str(steps), "--result", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "8"})
    if not result.exists():
        return {"state": "failed", "error": (done.stderr or done.stdout)[-1500:]}
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def run_on_cpu(size: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One run of the demo's model and dialogues on two CPU ranks."""
    from sharding import SCRATCH, follow

    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.demo import demo_configs, prepare_demo
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.plan import make_plan

    batch, length = (int(part) for part in size.split("x"))
    sharded = demo_configs(folder=prepare_demo())[1]
    fields = {
        "data.max_length": length, "data.eval_source": None, "data.eval_fraction": 0.0, "launch.device": "cpu",
        "training.per_device_train_batch_size": batch, "training.max_steps": steps, "training.eval_on_start": False,
        "training.lr_scheduler_type": "constant", "training.memory_sample_seconds": 0.5,
    }  # fmt: skip
    run = start(make_plan(with_changes(sharded, {**fields, **changes})), runs_dir=SCRATCH / "runs")
    return with_parts(run, follow(run, 900.0))


def run_ours(checkpoint: Path, lines: Path, size: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One run of the package."""
    from sharding import SCRATCH, follow

    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.schema import RunConfig
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.plan import make_plan

    batch, length = (int(part) for part in size.split("x"))
    base = {
        "model.name_or_path": str(checkpoint), "data.source": str(lines), "data.eval_fraction": 0.0,
        "data.max_length": length, "lora.r": 16, "lora.lora_alpha": 16, "training.learning_rate": 1e-4,
        "training.per_device_train_batch_size": batch, "training.gradient_accumulation_steps": 1,
        "training.max_steps": steps, "training.optim": "adamw_torch_fused", "training.lr_scheduler_type": "constant",
        "training.memory_sample_seconds": 0.5, "launch.num_processes": 1, "launch.device": "cuda",
    }  # fmt: skip
    run = start(make_plan(with_changes(RunConfig(), {**base, **changes})), runs_dir=SCRATCH / "runs")
    return with_parts(run, follow(run, 560.0))


def with_parts(run: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """``figures`` with the medians of a step's parts."""
    table = run.metrics().query("event == 'step'")
    for part in ("data", "forward", "backward", "optimizer", "gather_wait"):
        known = table[f"{part}_seconds"].iloc[WARM_UP:].dropna()
        if len(known):
            figures[f"{part}_seconds"] = float(known.median())
    return figures


def main() -> None:
    """Measure, and print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--variants", default=None, help="all of them; on the CPU stock and ours")
    parser.add_argument("--sizes", default=None, help="micro-batch x tokens: 1x1024,4x2048, on the CPU 4x128,1x64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="for 'ours'")
    parser.add_argument("--out", type=Path, default=None, help="folder for steps.json")
    for hidden in ("--checkpoint", "--texts", "--result"):
        parser.add_argument(hidden, type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--size", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result is not None:
        train_peer(options)
        return
    import yaml
    from sharding import SCRATCH, make_checkpoint, texts

    on_cpu = options.device == "cpu"
    sizes = (options.sizes or ("4x128,1x64" if on_cpu else "1x1024,4x2048")).split(",")
    variants = (options.variants or ("stock,ours" if on_cpu else ",".join(VARIANTS))).split(",")
    base = variants[0] if on_cpu else "floor"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    checkpoint = SCRATCH / options.shape
    if not on_cpu and not (checkpoint / "model.safetensors.index.json").exists():
        make_checkpoint(checkpoint, options.shape)
    lines = texts(SCRATCH / "texts.jsonl", count=256)
    given = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in options.set)}
    results: dict[str, dict[str, Any]] = {}
    for size in sizes:
        results[size] = {}
        for variant in variants:
            changes = {**VARIANTS[variant], **(given if variant == "ours" else {}), "name": f"steps-{variant}"}
            if on_cpu:
                found = run_on_cpu(size, options.steps, changes)
            elif variant == "fsdp2":
                found = run_peer(checkpoint, lines, size, options.steps)
            else:
                found = run_ours(checkpoint, lines, size, options.steps, changes)
            results[size][variant] = found
            print(size, variant, json.dumps(line_of(found, results[size].get(base))), flush=True)
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "steps.json").write_text(json.dumps(results, indent=2))


def line_of(found: dict[str, Any], floor: dict[str, Any] | None) -> dict[str, Any]:
    """The figures worth a line."""
    if found["state"] != "succeeded":
        return {"state": found["state"], "error": str(found.get("error"))[-300:]}
    seconds = found["step_seconds"]
    median = statistics.median(seconds[WARM_UP:])
    line: dict[str, Any] = {"median": round(median, 4), "second": round(seconds[1] / median, 2)}
    if floor is not None and floor["state"] == "succeeded":
        line["ratio"] = round(median / statistics.median(floor["step_seconds"][WARM_UP:]), 3)
    line["peak_gib"] = round(found["step_peak_gib"], 3)
    line |= {
        name: round(found[name], 4) for name in found if name.endswith("_seconds") and isinstance(found[name], float)
    }
    line["losses"] = [round(loss, 4) for loss in found["losses"]]
    return line


if __name__ == "__main__":
    main()
