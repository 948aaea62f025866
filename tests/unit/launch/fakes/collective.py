"""A training script that is all collective and no training: one all-reduce over gloo, with a trace around it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.records import TraceWriter


def main(run_dir: Path) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    header = {
        "rank": rank, "local_rank": rank, "world_size": world_size, "host": os.uname().nodename, "pid": os.getpid(),
        "pid_created": psutil.Process().create_time(), "device": "cpu", "device_name": "fake", "source": "cpu-walk",
        "capacity_bytes": 2**34, "rehearsal": False,
    }  # fmt: skip
    layout = RunLayout(run_dir)
    writer = TraceWriter(layout.memory_trace(rank), header)
    import torch
    import torch.distributed as dist

    if world_size > 1:
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world_size
        dist.barrier()
        dist.destroy_process_group()
    print(f"rank {rank} of {world_size} port {os.environ.get('MASTER_PORT')}", flush=True)
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") and rank == 0:
        from accelerate.utils import DeepSpeedPlugin

        plugin = DeepSpeedPlugin()  # reads deepspeed.json, and refuses contradictions with accelerate.yaml
        assert plugin.zero_stage == 3
        assert plugin.zero3_init_flag
    writer.append({"kind": "end", "phase": "step", "step": 0, "outcome": "succeeded", "error": None})


if __name__ == "__main__":
    main(Path(sys.argv[sys.argv.index("--run-dir") + 1]))
