"""What each rank holds with sharded and with stock loading: the table of the sharding work, measured in one call.

    python tests/benchmarks/sharding.py [--rows 8b,70b,405b,405b-long,exact,cpu] [--out DIR]

``8b``: 8 real ranks share one GPU over gloo, the 8B shape from a checkpoint on disk, stock and sharded in turn.
``70b``, ``405b``: rank 0 of 8 as a rehearsal on one GPU, sequence 1024; ``405b-long``: 2 x 2048. ``exact``: ten steps
of both loadings on it.
``cpu``: SmolLM2-135M on 2 CPU ranks, and the bytes each rank reads. Every row is a run of the package like any other;
its figures are read from its traces (``allocated``: torch's allocator, GiB of the fullest rank).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.gettempdir()) / "qz3-sharding-benchmark"
POLL_SECONDS = 0.5


def make_checkpoint(folder: Path, shape: str) -> None:
    """A random bf16 checkpoint in a known shape, with the byte tokenizer: a file for each few layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from qz3_widgets.config.shapes import read_shape
    from qz3_widgets.training.tokenizers import byte_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    values = read_shape(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    names = [name for name in model.state_dict() if not (config.tie_word_embeddings and name == "lm_head.weight")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map, part, size, number = {}, {}, 0, 0
    for name in names:
        tensor = model.state_dict()[name]
        if tensor.ndim == 1:
            made = torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            made = (torch.randn(tensor.shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()
        part[name], size = made, size + made.numel() * 2
        if size > 2**31 or name == names[-1]:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
            part, size = {}, 0
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def texts(file: Path, count: int = 64) -> Path:
    """Lines of text, long enough to fill any sequence with byte tokens."""
    lines = [json.dumps({"text": f"line {number}: " + "all work and no play " * 400}) for number in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def follow(run: Any, timeout: float) -> dict[str, Any]:
    """Wait for a run, and read its figures."""
    from qz3_widgets.analysis.memory import peaks
    from qz3_widgets.launch.process import stop

    begin = time.monotonic()
    while not run.status.has_ended:
        if time.monotonic() - begin > timeout:
            stop(run.layout.root, 2.0)
            break
        time.sleep(POLL_SECONDS)
    status = run.status
    figures: dict[str, Any] = {"state": status.state, "error": status.error, "wall_seconds": time.monotonic() - begin}
    trace = run.memory()
    table = peaks(trace)
    for phase in ("load", "attach", "ready", "step"):
        rows = table[table["phase"] == phase]
        if rows["settled_bytes"].notna().any():
            figures[f"{phase}_settled_gib"] = float(rows["settled_bytes"].max()) / 2**30
            figures[f"{phase}_peak_gib"] = float(rows["peak_bytes"].max()) / 2**30
            figures[f"{phase}_seconds"] = float((rows["end_seconds"] - rows["begin_seconds"]).max())
    metrics = run.metrics()
    steps = metrics[metrics["event"] == "step"]
    figures["losses"] = [round(float(loss), 6) for loss in steps["loss"].tolist()]
    figures["grad_norms"] = [round(float(norm), 6) for norm in steps["grad_norm"].tolist()]
    figures["step_seconds"] = [round(float(seconds), 3) for seconds in steps["step_seconds"].tolist()]
    read = run.layout.logs_dir / "rank-00000.log"
    figures["log"] = [line for line in read.read_text(errors="replace").splitlines() if "read " in line][-1:]
    if status.state != "succeeded":
        print(run.tail_log(num_lines=40), file=sys.stderr)
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}
    print(f"{run.run_id}: {json.dumps(shown)}", flush=True)  # now, in case that the time ends with the next
    return figures


def start_run(changes: dict[str, Any], timeout: float = 560.0) -> dict[str, Any]:
    """One run of the package."""
    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.schema import RunConfig
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.plan import make_plan

    base = {
        "data.source": str(texts(SCRATCH / "texts.jsonl")), "data.eval_fraction": 0.0, "lora.r": 16,
        "training.learning_rate": 1e-4, "training.memory_sample_seconds": 0.05,
    }  # fmt: skip
    plan = make_plan(with_changes(RunConfig(), {**base, **changes}))
    return follow(start(plan, runs_dir=SCRATCH / "runs"), timeout)


def launch_with(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Launch the run that was rendered into ``folder``, its ranks executing ``script`` in place of the usual one."""
    from qz3_widgets.launch.directory import find_train_script

    launcher = folder / "launch.sh"
    launcher.write_text(launcher.read_text().replace(str(find_train_script()), str(script.resolve())))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(["bash", str(launcher)], env=environment, capture_output=True, text=True)


def rehearse(shape: str, world_size: int, changes: dict[str, Any], timeout: float = 560.0) -> dict[str, Any]:
    """Rank 0 of ``world_size`` in ``shape``."""
    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.presets import preset
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.rehearsal import make_rehearsal

    config = with_changes(preset(shape), changes)
    return follow(start(make_rehearsal(config, world_size), runs_dir=SCRATCH / "runs"), timeout)


STOCK = {
    "model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False,
    "zero.leaf_modules": "none",
}  # fmt: skip
LONG = {
    "data.max_length": 1024, "training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 1,
    "training.memory_sample_seconds": 0.05, "lora.r": 16,
}  # fmt: skip


def row_8b(shape: str = "llama-3.1-8b", num_ranks: int = 8) -> dict[str, Any]:
    """Real ranks that share one GPU."""
    folder = SCRATCH / shape
    if not (folder / "model.safetensors.index.json").exists():
        make_checkpoint(folder, shape)
    common = {
        "model.name_or_path": str(folder), "launch.num_processes": num_ranks, "launch.ranks_per_gpu": num_ranks,
        "launch.device": "cuda", "data.max_length": 128, "training.max_steps": 1, "zero.overlap_comm": False,
        "zero.reduce_bucket_size": 50_000_000,
    }  # fmt: skip
    # The files were just written, so both find them in the page cache; what comes first has the colder machine.
    return {
        "sharded": start_run({**common, "name": "sharded"}),
        "stock": start_run({**common, **STOCK, "name": "stock"}),
    }


def row_70b() -> dict[str, Any]:
    """Rank 0 of 8, as shipped."""
    return {"sharded": rehearse("llama-3.1-70b", 8, LONG)}


def row_405b() -> dict[str, Any]:
    """Rank 0 of 8, as shipped."""
    return {"sharded": rehearse("llama-3.1-405b", 8, LONG)}


def row_405b_long() -> dict[str, Any]:
    """The same with 2 x 2048 tokens, for which the inputs of layers are kept in host memory."""
    longer = {**LONG, "data.max_length": 2048, "training.per_device_train_batch_size": 2}
    return {"sharded": rehearse("llama-3.1-405b", 8, longer)}


def row_exact() -> dict[str, Any]:
    """Ten steps from the same seed: stock twice (the noise), sharded, on 2 ranks of one GPU."""
    common = {
        "model.name_or_path": "random:llama-3.2-1b@4", "launch.num_processes": 2, "launch.ranks_per_gpu": 2,
        "launch.device": "cuda", "data.max_length": 256, "training.max_steps": 10, "training.learning_rate": 1e-3,
    }  # fmt: skip
    stock = {**common, **STOCK, "zero.leaf_modules": "auto"}  # other leaf modules round differently
    return {
        "stock": start_run({**stock, "name": "exact-stock"}),
        "stock again": start_run({**stock, "name": "exact-stock-again"}),
        "sharded": start_run({**common, "name": "exact-sharded"}),
    }


def row_cpu() -> dict[str, Any]:
    """SmolLM2-135M on 2 CPU ranks: loaded, one step."""
    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.presets import demo
    from qz3_widgets.demo import prepare_demo
    from qz3_widgets.launch.process import start
    from qz3_widgets.plan.plan import make_plan

    prepare_demo()
    results = {}
    for name, changes in {"stock": STOCK, "sharded": {}}.items():
        config = with_changes(
            demo(),
            {
                **changes, "launch.device": "cpu", "training.max_steps": 1, "training.eval_on_start": False,
                "data.eval_fraction": 0.0, "name": f"cpu-{name}",
            },
        )  # fmt: skip
        results[name] = follow(start(make_plan(config), runs_dir=SCRATCH / "runs"), 560.0)
    return results


ROWS = {"8b": row_8b, "70b": row_70b, "405b": row_405b, "405b-long": row_405b_long, "exact": row_exact, "cpu": row_cpu}


def main() -> None:
    """Measure the rows that were asked for, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=None, help="folder for sharding.json")
    options = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[str, Any] = {}
    for row in options.rows.split(","):
        begin = time.monotonic()
        results[row] = ROWS[row]()
        print(f"{row}: {time.monotonic() - begin:.0f} s", flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sharding.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
