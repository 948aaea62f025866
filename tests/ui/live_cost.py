"""What a live view costs: a real kernel shows a long run that goes on, and its CPU time and memory are measured.

    python -m tests.ui.live_cost [--steps 20000] [--ranks 2] [--seconds 60]

The run is made up; its records come as often as a real one's (five samples a second for each rank, a step every two
seconds). An idle kernel's own cost is measured first and taken off.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_kernel

from tests.conftest import REPOSITORY
from tests.ui.running import RunningRun, append


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description="CPU share of a live view.")
    parser.add_argument("--steps", type=int, default=20_000, help="steps that the run has done when the view opens")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = RunningRun(
            Path(folder), num_steps=chosen.steps, world_size=chosen.ranks, max_steps=2 * chosen.steps, eval_steps=500
        )
        size = sum(file.stat().st_size for file in run.layout.trace_dir.iterdir())
        print(f"{chosen.steps} steps on {chosen.ranks} ranks, {size / 1e6:.0f} MB of traces")
        manager, client = start_new_kernel(cwd=str(REPOSITORY))
        try:
            kernel = psutil.Process(manager.provisioner.pid)
            execute(client, "import qz3_widgets as qz3; qz3.watch, qz3.plot_memory")
            idle = cpu_share(kernel, 5.0)
            begin = time.monotonic()
            execute(client, f"live = qz3.watch('latest', runs_dir={folder!r})")
            print(f"the cell took {time.monotonic() - begin:.2f} s")
            execute(client, "import time\nwhile not live.progress.value: time.sleep(.05)")
            print(f"state shown after {time.monotonic() - begin:.2f} s")
            feed(run, 10.0)  # the first look is over
            before = kernel.memory_info().rss
            share = cpu_share(kernel, chosen.seconds, run)
            execute(client, "assert live.following and not live.error.value, live.error.value")
            grown = kernel.memory_info().rss - before
            print(f"CPU: {share:.1%} of a core (idle kernel {idle:.1%}); resident memory {grown / 2**20:+.1f} MiB")
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def execute(client: Any, code: str) -> None:
    """Run ``code`` in the kernel; raises if it failed."""
    content = client.execute_interactive(code, timeout=120)["content"]
    if content["status"] != "ok":
        raise RuntimeError("\n".join(content["traceback"]))


def cpu_share(kernel: psutil.Process, seconds: float, run: RunningRun | None = None) -> float:
    """CPU time of the kernel over ``seconds``, as a share of one core, while ``run`` goes on."""
    before, begin = sum(kernel.cpu_times()[:2]), time.monotonic()
    if run is None:
        time.sleep(seconds)
    else:
        feed(run, seconds)
    return (sum(kernel.cpu_times()[:2]) - before) / (time.monotonic() - begin)


def feed(run: RunningRun, seconds: float) -> None:
    """Append records as a real run does."""
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        time.sleep(0.2)
        count += 1
        if count % 10 == 0:
            run.append_step(2.0)
        for rank in range(run.fake.world_size):
            size = run.fake.shape.ready
            sizes = dict.fromkeys(("allocated_bytes", "reserved_bytes", "peak_allocated_bytes"), size)
            moment = time.time() - run.origin
            record = {"time_seconds": moment, "kind": "memory", "phase": "step", "step": run.step + 1}
            append(run.layout.memory_trace(rank), [{**record, "event": "sample", **sizes}])


if __name__ == "__main__":
    main()
