"""What a GPU holds beyond torch's allocator, and how much of its cache the allocator can't use for what is asked of it.

    python tests/benchmarks/device_overhead.py [--ranks 1,2] [--capped 1.05,1.1,1.2] [--out FOLDER]

``--ranks``: processes with a GPU each that talk through NCCL; what all of a GPU holds less what torch has reserved is
printed after each first use of a library, as rank 0 sees it. ``--capped``: rehearsals that may reserve only so many
times what is predicted for their fullest moment; the smallest that goes through tells what fragmentation costs
(``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` in the environment: what it costs then).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

MIB = 2**20
MOST_SECONDS = 60.0
SHAPES = (("llama-3.1-8b", 8, "1x1024"), ("llama-3.1-8b@16", 8, "4x2048"), ("llama-3.1-70b@20", 8, "2x1024"))

sys.path.insert(0, str(Path(__file__).resolve().parent))


def beyond() -> tuple[float, float, float]:
    """MiB that the whole device holds, that torch has reserved, and the difference."""
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return (total - free) / MIB, reserved / MIB, (total - free - reserved) / MIB


def stages(rank: int, world_size: int) -> list[tuple[str, tuple[float, float, float]]]:
    """Use one library after the other, and look after each."""
    import bitsandbytes.functional as bnb
    import deepspeed
    import torch
    import torch.nn.functional as functional
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    torch.cuda.set_device(rank)
    found = []

    def look(name: str, use: Callable[[], object]) -> None:
        use()
        found.append((name, beyond()))

    def attend() -> None:
        query = torch.randn(1, 32, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()

    def quantize() -> None:
        packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        bnb.dequantize_4bit(packed, state)

    def reduce() -> None:
        torch.distributed.all_reduce(torch.ones(2**24, device="cuda"))

    def gather() -> None:
        part = torch.ones(2**24, device="cuda", dtype=torch.bfloat16)
        whole = torch.empty(world_size * 2**24, device="cuda", dtype=torch.bfloat16)
        torch.distributed.all_gather_into_tensor(whole, part)

    weight = torch.empty(0)
    look("a first tensor: the context", lambda: torch.empty(2**20, device="cuda"))
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    look("a random matrix: torch's own kernels", lambda: weight.float().square().mean())
    look("a product: cuBLAS", lambda: weight @ weight)
    look("attention, there and back", attend)
    look("quantized and dequantized: bitsandbytes", quantize)
    targets = torch.zeros(1024, device="cuda", dtype=torch.long)
    look("the fused loss: Triton", lambda: ChunkedLogProbFunction.apply(
        weight[:1024], weight, None, targets, 1.0, 32768))  # fmt: skip
    look("NCCL is made", lambda: deepspeed.init_distributed(dist_backend="nccl", verbose=False))
    look("a first reduction", reduce)
    look("a first gather", gather)
    look("ten more of each", lambda: [(reduce(), gather()) for _ in range(10)])
    torch.distributed.destroy_process_group()
    return found


def _rank(rank: int, world_size: int, port: int, report: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    found = stages(rank, world_size)
    if rank == 0:
        lines = [f"{name:<44} {used:>9.0f} {reserved:>9.0f} {rest:>9.0f}" for name, (used, reserved, rest) in found]
        report.write_text("\n".join(lines), encoding="utf-8")


def print_stages(world_size: int) -> None:
    """One table."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "table.txt"
        torch.multiprocessing.spawn(_rank, (world_size, 29631 + world_size, report), nprocs=world_size)
        print(f"\n{world_size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, MiB")
        print(f"{'after':<44} {'used':>9} {'reserved':>9} {'beyond':>9}")
        print(report.read_text(encoding="utf-8"), flush=True)


def print_capped(caps: list[float], out: Path) -> None:
    """Rehearse each shape under each cap, and without one, all of a shape at once."""
    from memory_model import EVALUATING, Case, config_of
    from rehearse_evaluation import CAP

    from qz3_widgets.launch.process import start, stop
    from qz3_widgets.plan.memory import forecast
    from qz3_widgets.plan.rehearsal import make_rehearsal
    from qz3_widgets.plan.shapes import model_shape

    print(
        f"\n{os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')}\nMiB; more: reserved beyond, as a part of peak less settled"
    )
    print(f"{'shape':<18}{'size':<8}{'cap':>6} {'outcome':<10}{'peak':>7}{'settled':>8}{'reserved':>9}{'more':>8}")
    for shape, world_size, size in SHAPES:
        plan = make_rehearsal(config_of(Case(shape, shape, world_size, size).fields(), "cuda"), world_size, steps=3)
        step = forecast(
            plan.config, model_shape(plan.config), device="cuda", world_size=world_size,
            capacity_bytes=plan.device_capacity_bytes,
        ).phases["step"]  # fmt: skip
        runs = []
        for part in (*caps, None):
            cap = {} if part is None else {CAP: str(int(part * step.peak_bytes))}
            with (
                patch("qz3_widgets.launch.directory.find_train_script", lambda: EVALUATING),
                patch.dict(os.environ, cap),
            ):
                runs.append((part, start(plan, runs_dir=out / "runs")))
        deadline = time.monotonic() + MOST_SECONDS
        for part, run in runs:
            while not run.status.has_ended and time.monotonic() < deadline:
                time.sleep(0.2)
            if not run.status.has_ended:
                stop(run.layout.root, 1.0)
            told, reserved = "none" if part is None else f"{part:.2f}", _reserved(run)
            more = (reserved - step.peak_bytes) / (step.peak_bytes - step.settled_bytes)
            print(
                f"{shape:<18}{size:<8}{told:>6} {run.state:<10}{step.peak_bytes / MIB:>7.0f}"
                f"{step.settled_bytes / MIB:>8.0f}{reserved / MIB:>9.0f}{more:>+8.1%}", flush=True,
            )  # fmt: skip


def _reserved(run: Any) -> int:
    from qz3_widgets.analysis.memory import peaks

    table = peaks(run.memory())
    return (
        int(table.loc[table["phase"] == "step", "reserved_peak_bytes"].max()) if (table["phase"] == "step").any() else 0
    )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1")
    parser.add_argument("--capped", default="", help="parts of the predicted peak, as 1.05,1.1")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "qz3-device-overhead")
    options = parser.parse_args()
    for number in (int(text) for text in options.ranks.split(",") if text):
        print_stages(number)
    if options.capped:
        print_capped([float(text) for text in options.capped.split(",")], options.out)


if __name__ == "__main__":
    main()
