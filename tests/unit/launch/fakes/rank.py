"""Stands in for ``train_qlora.py``: writes a trace as a rank does, and behaves as FAKE_RANKS says, rank by rank.

``steps:N``   N short steps, then a good end                ``raise``    an exception, with its traceback in the log
``deaf``      never ends, and ignores SIGTERM               ``die``      kills itself with SIGKILL after three steps
``exit:3``    leaves with a code and without a word          ``import``   fails before it has opened its trace
``nursery``   starts a process in a session of its own, then runs on
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil

from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.trace.records import TraceWriter


def main(argv: list[str]) -> int:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    behaviours = json.loads(os.environ.get("FAKE_RANKS", "{}"))
    behaviour, _, number = behaviours.get(str(rank), behaviours.get("all", "steps:3")).partition(":")
    layout = RunLayout(Path(argv[argv.index("--run-dir") + 1]))
    if behaviour == "import":
        raise ModuleNotFoundError("No module named 'torch'")
    header = {
        "rank": rank, "local_rank": rank, "world_size": world_size, "host": os.uname().nodename, "pid": os.getpid(),
        "pid_created": psutil.Process().create_time(), "device": "cpu", "device_name": "fake", "source": "cpu-walk",
        "capacity_bytes": 2**34, "rehearsal": False,
    }  # fmt: skip
    writer = TraceWriter(layout.memory_trace(rank), header)
    log = open(layout.rank_log(rank), "a", buffering=1)  # noqa: SIM115 - open to the end
    log.write(f"rank {rank} starts with {argv}\n")

    def end(outcome: str, error: str | None) -> None:
        writer.append({"kind": "end", "phase": "step", "step": 1, "outcome": outcome, "error": error})

    def on_signal(number: int, frame: object) -> None:
        end("cancelled", "ended by SIGTERM")
        os._exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else on_signal)
    if behaviour == "nursery":
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
    step = 0
    last = int(number) if behaviour == "steps" else 10**6
    while step < last:
        step += 1
        writer.append(
            {"kind": "memory", "phase": "step", "step": step, "event": "step_end", "allocated_bytes": 2**20 * step,
             "reserved_bytes": 2**21, "peak_allocated_bytes": 2**20 * (step + rank), "host_rss_bytes": 2**26}
        )  # fmt: skip
        if rank == 0 and step == 1:
            metrics = TraceWriter(layout.metrics, {"kind": "header"})
        if rank == 0:
            loss = 3.0 - 0.1 * min(step, 20)
            metrics.append(
                {"kind": "metrics", "event": "step", "step": step, "max_steps": min(last, 10**4), "loss": loss}
            )
        time.sleep(0.05)
        if step == 3 and behaviour == "raise":
            try:
                raise ValueError(f"the data of rank {rank} is bad, and HF_TOKEN=hf_Planted0Secret0Planted is no help")
            except ValueError as error:
                log.write(traceback.format_exc())
                end("failed", f"ValueError: {error}")
                return 1
        if step == 3 and behaviour == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and behaviour == "exit":
            os._exit(int(number))
    end("succeeded", None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
