"""What the memory model predicts against what is measured: the cases, the runs, and a table beside this script.

    python tests/benchmarks/memory_model.py [--device cpu|cuda] [--cases tuned|held-out|all|NAME,...] [--at-once 2]
    python tests/benchmarks/memory_model.py --cases ""      # only print the errors of what the table holds

Every case is a rehearsal of one rank (on a CPU without arithmetic, where memory alone is taken), or, where it says
``ranks``, a run of real ranks. Its figures are ``settled_bytes`` and ``peak_bytes`` of the phases load, ready and step
(:func:`qz3_widgets.analysis.memory.peaks`), and of eval and save where it says with which batch it ``evaluates``
(:mod:`rehearse_evaluation`). Cases of the set ``held-out`` were not looked at while the model was made.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

TABLE = Path(__file__).with_name("memory_model.csv")
SCRATCH = Path(tempfile.gettempdir()) / "qz3-memory-model"
PHASES = ("load", "ready", "step")
BETWEEN_STEPS = ("eval", "save")
EVALUATING = Path(__file__).with_name("rehearse_evaluation.py")
COLUMNS = ("case", "set", "device", "device_name", "capacity_bytes", "world_size", "real_ranks", "changes", "measured")
TO_FILL_GIB = 64
"""Of a GPU, that cases share which run at once: by what is predicted of them."""


@dataclass(frozen=True)
class Case:
    """One configuration to measure."""

    name: str
    shape: str  # what stands after random:
    world_size: int
    size: str  # micro-batch x tokens
    changes: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False
    ranks: bool = False  # real ones, that share the device
    evaluates: int = 0  # sequences in a batch of the evaluation; 0: there is none

    def fields(self) -> dict[str, Any]:
        """Fields of the configuration."""
        batch, length = (int(part) for part in self.size.split("x"))
        return {
            "model.name_or_path": f"random:{self.shape}",
            "data.max_length": length,
            "training.per_device_train_batch_size": batch,
            **({"training.per_device_eval_batch_size": self.evaluates} if self.evaluates else {}),
            **self.changes,
        }


R, CKPT, TARGETS = "lora.r", "training.activation_checkpointing", "lora.target_modules"
ACCUMULATE = "training.gradient_accumulation_steps"
CPU_CASES = (
    Case("1b-1", "llama-3.2-1b@2", 1, "1x512"),
    Case("1b-4", "llama-3.2-1b@4", 4, "1x1024"),
    Case("1b-8", "llama-3.2-1b", 8, "2x512"),
    Case("3b-2", "llama-3.2-3b@4", 2, "1x2048"),
    Case("8b-8", "llama-3.1-8b@4", 8, "1x1024"),
    Case("8b-8-long", "llama-3.1-8b@4", 8, "4x2048"),
    Case("8b-1", "llama-3.1-8b@2", 1, "1x1024"),
    Case("8b-4", "llama-3.1-8b@4", 4, "1x4096"),
    Case("8b-reentrant", "llama-3.1-8b@4", 8, "1x1024", {CKPT: "reentrant"}),
    Case("8b-none", "llama-3.1-8b@2", 8, "1x1024", {CKPT: "none"}),
    Case("8b-r128", "llama-3.1-8b@4", 8, "1x1024", {R: 128}),
    Case("8b-plain-scales", "llama-3.1-8b@4", 8, "1x1024", {"quantization.bnb_4bit_use_double_quant": False}),
    Case("8b-qv", "llama-3.1-8b@4", 8, "1x1024", {TARGETS: ["q_proj", "v_proj"], R: 8}),
    Case("8b-accumulated", "llama-3.1-8b@4", 8, "1x1024", {"training.gradient_accumulation_steps": 3}),
    Case("8b-whole-scales", "llama-3.1-8b@4", 8, "1x1024", {"zero.shard_statistics": False}),
    Case("8b-retained", "llama-3.1-8b@4", 8, "1x1024", {"zero.release_gathered": False}),
    Case("8b-unfused", "llama-3.1-8b@4", 8, "1x1024", {"zero.fused_gather": False}),
    Case("8b-no-prefetch", "llama-3.1-8b@4", 8, "1x1024", {"zero.stage3_prefetch_bucket_size": 0}),
    Case("70b-8", "llama-3.1-70b@2", 8, "1x1024"),
    Case("405b-8", "llama-3.1-405b@2", 8, "1x1024"),
    Case("405b-4-long", "llama-3.1-405b@2", 4, "2x2048"),
    Case("qwen3-4", "qwen3-8b@4", 4, "1x1024"),
    Case("gemma-8", "gemma-3-27b@2", 8, "1x1024"),
    Case("mixtral-8", "mixtral-8x7b@2", 8, "1x1024"),
    Case("qwen3-moe-8", "qwen3-30b-a3b@2", 8, "1x512"),
    Case("mistral-2", "mistral-7b@4", 2, "1x2048", held_out=True),
    Case("qwen3-32b-8", "qwen3-32b@2", 8, "1x1024", held_out=True),
    Case("3b-4-r64", "llama-3.2-3b@6", 4, "2x1024", {R: 64}, held_out=True),
    Case("8b-2-short", "llama-3.1-8b@3", 2, "8x512", held_out=True),
    Case("gemma-2", "gemma-3-27b@2", 2, "1x2048", held_out=True),
    Case("405b-8-long", "llama-3.1-405b@3", 8, "1x2048", held_out=True),
    Case("70b-4", "llama-3.1-70b@3", 4, "2x1024", held_out=True),
    Case("qwen3-14b-8192", "qwen3-14b@4", 8, "1x8192", held_out=True),
    Case("mixtral-4", "mixtral-8x7b@2", 4, "2x512", held_out=True),
    Case("1b-2-none", "llama-3.2-1b@8", 2, "1x512", {CKPT: "none"}, held_out=True),
    Case("8b-attention", "llama-3.1-8b@4", 8, "1x1024", {TARGETS: ["q_proj", "k_proj", "v_proj", "o_proj"], R: 32},
         held_out=True),
    Case("eval-8b-8", "llama-3.1-8b@4", 8, "1x1024", evaluates=4),
    Case("eval-8b-8-batch", "llama-3.1-8b@4", 8, "1x1024", evaluates=32),
    Case("eval-8b-1", "llama-3.1-8b@2", 1, "1x1024", evaluates=16),
    Case("eval-8b-unfused", "llama-3.1-8b@4", 8, "1x1024", {"zero.fused_gather": False}, evaluates=8),
    Case("eval-8b-retained", "llama-3.1-8b@4", 8, "1x1024", {"zero.release_gathered": False}, evaluates=8),
    Case("eval-8b-none", "llama-3.1-8b@2", 8, "1x512", {CKPT: "none", ACCUMULATE: 4}, evaluates=16),
    Case("eval-1b-2", "llama-3.2-1b@4", 2, "1x512", {R: 128}, evaluates=32),
    Case("eval-70b-8", "llama-3.1-70b@2", 8, "1x2048", evaluates=8),
    Case("eval-qwen3-4", "qwen3-8b@4", 4, "1x1024", evaluates=16),
    Case("eval-gemma-8", "gemma-3-27b@2", 8, "1x1024", evaluates=16),
    Case("eval-mixtral-8", "mixtral-8x7b@2", 8, "1x1024", evaluates=8),
    Case("eval-3b-2", "llama-3.2-3b@4", 2, "1x2048", evaluates=8, held_out=True),
    Case("eval-mistral-4", "mistral-7b@4", 4, "2x512", evaluates=64, held_out=True),
    Case("eval-qwen3-32b-8", "qwen3-32b@2", 8, "1x4096", evaluates=2, held_out=True),
    Case("eval-405b-8", "llama-3.1-405b@2", 8, "1x1024", evaluates=16, held_out=True),
    Case("eval-8b-attention", "llama-3.1-8b@4", 8, "1x1024", {TARGETS: ["q_proj", "v_proj"], R: 32}, evaluates=32,
         held_out=True),
    Case("eval-qwen3-moe-8", "qwen3-30b-a3b@2", 8, "1x512", evaluates=16, held_out=True),
)  # fmt: skip

STOCK = {
    "model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False,
    "zero.leaf_modules": "none",
}  # fmt: skip
PLAIN = {"model.load_strategy": "replicated", "zero.zero_stage": 0}
OFFLOAD = "training.activation_offload"
DOUBLE = "quantization.bnb_4bit_use_double_quant"
CUDA_CASES = (
    Case("1b-1-nccl", "llama-3.2-1b", 1, "1x1024", ranks=True),
    Case("1b-2-shared", "llama-3.2-1b", 2, "1x512", ranks=True),
    Case("1b-4-shared", "llama-3.2-1b@8", 4, "2x512", ranks=True),
    Case("1b-8-shared", "llama-3.2-1b@8", 8, "1x1024", ranks=True),
    Case("1b-1-stock", "llama-3.2-1b", 1, "1x1024", STOCK, ranks=True),
    Case("8b-2-stock", "llama-3.1-8b@8", 2, "1x1024", STOCK, ranks=True),
    Case("8b-1-plain", "llama-3.1-8b@8", 1, "1x1024", PLAIN, ranks=True),
    Case("8b-1-nccl", "llama-3.1-8b", 1, "1x1024", ranks=True),
    Case("8b-1-nccl-long", "llama-3.1-8b@8", 1, "4x2048", {OFFLOAD: False}, ranks=True),
    Case("1b-8", "llama-3.2-1b", 8, "1x2048"),
    Case("3b-4", "llama-3.2-3b", 4, "2x1024"),
    Case("8b-8", "llama-3.1-8b", 8, "1x1024"),
    Case("8b-8-long", "llama-3.1-8b", 8, "4x2048", {OFFLOAD: False}),
    Case("8b-8-8192", "llama-3.1-8b@16", 8, "1x8192", {OFFLOAD: False}),
    Case("8b-8-batch", "llama-3.1-8b@16", 8, "8x512", {OFFLOAD: False}),
    Case("8b-none", "llama-3.1-8b@8", 8, "1x1024", {CKPT: "none"}),
    Case("8b-reentrant", "llama-3.1-8b@8", 8, "1x1024", {CKPT: "reentrant"}),
    Case("8b-r128", "llama-3.1-8b@16", 8, "1x1024", {R: 128}),
    Case("8b-plain-scales", "llama-3.1-8b@16", 8, "1x1024", {DOUBLE: False}),
    Case("8b-qv", "llama-3.1-8b@16", 8, "1x1024", {TARGETS: ["q_proj", "v_proj"], R: 8}),
    Case("8b-accumulated", "llama-3.1-8b@16", 8, "1x1024", {ACCUMULATE: 4}),
    Case("8b-retained", "llama-3.1-8b@16", 8, "1x1024", {"zero.release_gathered": False}),
    Case("8b-params-on-host", "llama-3.1-8b@16", 2, "1x1024", {"zero.offload_param_device": "cpu"}),
    Case("70b-8", "llama-3.1-70b", 8, "1x1024"),
    Case("405b-8", "llama-3.1-405b", 8, "1x1024"),
    Case("qwen3-4", "qwen3-8b", 4, "1x1024"),
    Case("gemma-8", "gemma-3-27b", 8, "1x1024"),
    Case("mixtral-8", "mixtral-8x7b@8", 8, "1x1024"),
    Case("8b-optimizer-on-host", "llama-3.1-8b@8", 2, "1x1024", {"zero.offload_optimizer_device": "cpu"}),
    Case("1b-2-shared-attention", "llama-3.2-1b", 2, "2x512",
         {TARGETS: ["q_proj", "k_proj", "v_proj", "o_proj"], R: 32}, held_out=True, ranks=True),
    Case("1b-4-stock", "llama-3.2-1b@8", 4, "1x1024", STOCK, held_out=True, ranks=True),
    Case("3b-1-nccl", "llama-3.2-3b", 1, "2x1024", held_out=True, ranks=True),
    Case("mistral-2", "mistral-7b", 2, "1x2048", held_out=True),
    Case("qwen3-32b-8", "qwen3-32b", 8, "1x1024", held_out=True),
    Case("3b-2-r64", "llama-3.2-3b", 2, "2x1024", {R: 64}, held_out=True),
    Case("8b-4-4096", "llama-3.1-8b", 4, "1x4096", held_out=True),
    Case("8b-2-batch", "llama-3.1-8b@16", 2, "8x512", {OFFLOAD: False}, held_out=True),
    Case("8b-8-offloaded", "llama-3.1-8b", 8, "4x2048", {OFFLOAD: True}, held_out=True),
    Case("8b-whole-scales", "llama-3.1-8b@16", 8, "1x1024", {"zero.shard_statistics": False}, held_out=True),
    Case("70b-4", "llama-3.1-70b@40", 4, "2x1024", held_out=True),
    Case("405b-8-long", "llama-3.1-405b", 8, "2x2048", held_out=True),
    Case("405b-4", "llama-3.1-405b@40", 4, "1x1024", held_out=True),
    Case("gemma-4", "gemma-3-27b@16", 4, "1x2048", held_out=True),
    Case("qwen3-moe-8", "qwen3-30b-a3b@12", 8, "1x1024", held_out=True),
    Case("mixtral-4", "mixtral-8x7b@6", 4, "2x512", held_out=True),
    Case("qwen3-14b-8192", "qwen3-14b", 8, "1x8192", held_out=True),
    Case("eval-8b-8", "llama-3.1-8b", 8, "1x1024", evaluates=4),
    Case("eval-8b-8-batch", "llama-3.1-8b@16", 8, "1x1024", evaluates=64),
    Case("eval-1b-2-shared", "llama-3.2-1b", 2, "1x512", evaluates=16, ranks=True),
    Case("eval-qwen3-4", "qwen3-8b", 4, "1x1024", evaluates=32, held_out=True),
    Case("eval-70b-8", "llama-3.1-70b@40", 8, "1x2048", evaluates=8, held_out=True),
)  # fmt: skip


def config_of(fields: dict[str, Any], device: str) -> Any:
    """The configuration of a case."""
    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.schema import RunConfig

    common = {"name": "memory-model", "launch.device": device, "training.memory_sample_seconds": 0.5}
    return with_changes(RunConfig(), {**common, **fields})


def begin(case: Case, device: str) -> Any:
    """Start a case."""
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.plan import make_plan
    from qz3_widgets.plan.rehearsal import make_rehearsal

    config = config_of(case.fields(), device)
    if case.ranks:
        from qz3_widgets.config.changes import with_changes

        ranks = {"launch.num_processes": case.world_size, "launch.ranks_per_gpu": case.world_size}
        steps = {"training.max_steps": 3, "data.eval_fraction": 0.0, "data.source": str(_texts())}
        plan = make_plan(with_changes(config, {**ranks, **steps}))
    else:
        plan = make_rehearsal(config, case.world_size, steps=3)
    if not case.evaluates:
        return start(plan, runs_dir=SCRATCH / "runs")
    with patch("qz3_widgets.launch.directory.find_train_script", lambda: EVALUATING):
        return start(plan, runs_dir=SCRATCH / "runs")


def _texts() -> Path:
    from sharding import texts

    SCRATCH.mkdir(parents=True, exist_ok=True)
    return texts(SCRATCH / "texts.jsonl")


def read(case: Case, device: str, run: Any) -> dict[str, str]:
    """A line of the table."""
    from qz3_widgets.analysis.memory import peaks

    trace = run.memory()
    table = peaks(trace)
    measured = {}
    for phase in (*PHASES, *(BETWEEN_STEPS if case.evaluates else ())):
        rows = table[table["phase"] == phase]
        measured[phase] = {name: int(rows[name].max()) for name in ("settled_bytes", "peak_bytes")}
    (header, *_) = trace.headers.values()
    return {
        "case": case.name,
        "set": "held-out" if case.held_out else "tuned",
        "device": device,
        "device_name": str(header["device_name"]),
        "capacity_bytes": str(header["capacity_bytes"]),
        "world_size": str(case.world_size),
        "real_ranks": str(int(case.ranks)),
        "changes": json.dumps(case.fields()),
        "measured": json.dumps(measured),
    }


def load_table(path: Path = TABLE) -> list[dict[str, str]]:
    """The lines that are there."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save_table(rows: list[dict[str, str]], path: Path = TABLE) -> None:
    """Write all lines, in the order of devices and cases."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def gib_of(case: Case, device: str) -> float:
    """What a case is predicted to take of its device, with room for what is not predicted."""
    from qz3_widgets.plan.memory import forecast
    from qz3_widgets.plan.shapes import model_shape

    ranks = {"launch.ranks_per_gpu": case.world_size} if case.ranks else {}
    config = config_of({**case.fields(), **ranks}, device)
    expected = forecast(
        config, model_shape(config), device="cuda" if device == "cuda" else "cpu", world_size=case.world_size
    )
    return (expected.peak_bytes / 2**30 * 1.3 + 1) * (case.world_size if case.ranks else 1)


def measure(cases: list[Case], device: str, at_once: int, out: Path) -> None:
    """Run the cases, some at a time; each line is written as soon as it is there."""
    needed = {case.name: gib_of(case, device) for case in cases}
    waiting = sorted(cases, key=lambda case: needed[case.name], reverse=device == "cuda")
    running = list[tuple[Case, Any]]()
    while waiting or running:
        taken = sum(needed[case.name] for case, _ in running)
        for case in list(waiting):
            fits = device == "cpu" or not running or taken + needed[case.name] <= TO_FILL_GIB
            if fits and sum(each.world_size if each.ranks else 1 for each, _ in running) < at_once:
                waiting.remove(case)
                running.append((case, begin(case, device)))
                taken += needed[case.name]
        time.sleep(0.5)
        for case, run in [pair for pair in running if pair[1].status.has_ended]:
            running.remove((case, run))
            if run.state != "succeeded":
                print(f"{case.name}: {run.status.error}\n{run.tail_log(num_lines=30)}", file=sys.stderr, flush=True)
                continue
            row = read(case, device, run)
            rows = [each for each in load_table(out) if (each["case"], each["device"]) != (case.name, device)]
            save_table([*rows, row], out)
            print(case.name, row["measured"], flush=True)


def errors(rows: list[dict[str, str]]) -> list[tuple[str, str, str, str, int, int]]:
    """(case, set, phase, figure, predicted, measured) of every figure."""
    from qz3_widgets.plan.memory import forecast
    from qz3_widgets.plan.shapes import model_shape

    found = []
    for row in rows:
        ranks = {"launch.ranks_per_gpu": int(row["world_size"])} if row["real_ranks"] == "1" else {}
        config = config_of({**json.loads(row["changes"]), **ranks}, row["device"])
        predicted = forecast(
            config, model_shape(config), device="cuda" if row["device"] == "cuda" else "cpu",
            world_size=int(row["world_size"]), capacity_bytes=int(row.get("capacity_bytes") or 0) or None,
        )  # fmt: skip
        for phase, figures in json.loads(row["measured"]).items():
            for name, measured in figures.items():
                value = getattr(predicted.phases[phase], name)
                found.append((row["case"], row["set"], phase, name, value, measured))
    return found


def report(rows: list[dict[str, str]]) -> None:
    """Print the errors of each case, and what they are on average and at worst."""
    found = errors(rows)
    cases: dict[str, list[str]] = {}
    for case, _, phase, name, predicted, measured in found:
        text = f"{phase}.{name[:4]} {100 * (predicted / measured - 1):+6.2f}% ({measured / 2**20:9.1f})"
        cases.setdefault(case, []).append(text)
    for case, texts in cases.items():
        print(f"{case:<16} {'  '.join(texts)}")
    for which in ("tuned", "held-out"):
        for name in ("settled_bytes", "peak_bytes"):
            each = [abs(p / m - 1) for _, own, _, figure, p, m in found if own == which and figure == name]
            if each:
                mean, worst = 100 * sum(each) / len(each), 100 * max(each)
                print(f"{which} {name}: mean {mean:.2f} %, worst {worst:.2f} %, {len(each)} figures")


def main() -> None:
    """Measure what was asked for, then report on all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", default="tuned")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    all_cases = CPU_CASES if options.device == "cpu" else CUDA_CASES
    names = options.cases.split(",")
    chosen = [
        case for case in all_cases
        if options.cases in ("all", "held-out" if case.held_out else "tuned") or case.name in names
    ]  # fmt: skip
    measure(chosen, options.device, options.at_once, options.table)
    report([row for row in load_table(options.table) if row["device"] == options.device])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
