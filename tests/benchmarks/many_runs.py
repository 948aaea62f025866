"""What a folder of 500 runs costs a notebook, one of them of 8 ranks with some 200,000 records each.

Run it from the checkout: ``PYTHONPATH=. python -m tests.benchmarks.many_runs [--runs 500] [--steps 33000]
[--monitor-minutes 60]``.

Everything happens in a real kernel, whose resident memory is what is told: the table of runs at the first look and at
the next, the figures of all of them, the long run opened in a live view until both figures are drawn. Then an hour's
monitoring: a run of 2 ranks is recorded as fast as it can be written, a step each two seconds of its own clock, and the
view looks at it after every one; memory and number of widgets are told after the first minute and at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_kernel

from tests.conftest import REPOSITORY
from tests.fake_runs import make_run
from tests.ui.running import RunningRun

_TABLE = """
import time
def say(what, begin): print(f"{{what}}: {{time.perf_counter() - begin:.3f}} s")
import qz3_widgets as qz3
from qz3_widgets.widgets.runs_panel import RunsPanel
begin = time.perf_counter(); panel = RunsPanel({folder!r}); say("table, first look", begin)
begin = time.perf_counter(); panel.look(); say("table, next look", begin)
"""
_FIGURES = """
begin = time.perf_counter()
while panel.table.fill(60): pass
say("figures of all runs, once", begin)
begin = time.perf_counter(); panel.look(); say("table with figures", begin)
panel.close()
"""
_OPEN = """
begin = time.perf_counter(); live = qz3.watch({run!r}); say("long run, state shown", begin)
while "<svg" not in live.memory.value or "<svg" not in live.loss.value: time.sleep(0.01)
say("long run, both figures", begin); live.close()
"""
_WATCH = """
from ipywidgets.widgets.widget import _instances
from qz3_widgets.widgets import live as view
view._MIN_DRAW_SECONDS = 0; view._DRAW_SHARE = 0
live = qz3.MonitorPanel(runs_dir={folder!r})
"""
_LOOK = "live.live.refresh(draw_all=True); live.look(); print(len(_instances), live.error.value, live.live.error.value)"
_STEP_SECONDS = 2.0


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description="What many runs and a long run cost a notebook.")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=33_000, help="of the long run")
    parser.add_argument("--monitor-minutes", type=int, default=60, help="of the recorded run's own clock")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        make_runs(folder, chosen.runs, chosen.steps)
        kernel = Kernel()
        try:
            print(f"kernel before: {kernel.memory():.0f} MB")
            kernel.say(_TABLE.format(folder=str(folder)))
            kernel.say(_OPEN.format(run=str(folder / "long-r8-20260917-121314")))
            print(f"kernel after the table and the long run: {kernel.memory():.0f} MB, at most {kernel.most():.0f} MB")
            kernel.say(_FIGURES)
            print(f"kernel after all figures: {kernel.memory():.0f} MB, at most {kernel.most():.0f} MB")
            monitor(kernel, Path(name) / "watched", chosen.monitor_minutes)
        finally:
            kernel.end()


class Kernel:
    """A kernel, and what it takes."""

    def __init__(self) -> None:
        self._manager, self._client = start_new_kernel(cwd=str(REPOSITORY))
        self._process = psutil.Process(self._manager.provisioner.pid)

    def say(self, code: str, *, show: bool = True) -> str:
        """Run ``code``; returns what it printed, and raises if it failed."""
        told: list[str] = []

        def output(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                told.append(message["content"]["text"])

        content = self._client.execute_interactive(code, timeout=600, output_hook=output)["content"]
        if content["status"] != "ok":
            raise RuntimeError("\n".join(content["traceback"]))
        if show:
            print("".join(told), end="")
        return "".join(told)

    def memory(self) -> float:
        """Resident megabytes."""
        return self._process.memory_info().rss / 1e6

    def most(self) -> float:
        """Most that was ever resident, in megabytes."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6

    def end(self) -> None:
        """End it."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def make_runs(folder: Path, number: int, steps: int) -> None:
    """``number`` runs, one of them long."""
    folder.mkdir()
    first = make_run(folder, run_id="run-000-20260917-121314", num_steps=40)
    for place in range(1, number - 1):
        copy = folder / f"run-{place:03d}-20260917-121314"
        shutil.copytree(first, copy)
        status = json.loads((copy / "status.json").read_text())
        status |= {"run_id": copy.name, "created": f"2026-09-{1 + place % 28:02d}T12:00:00.000+00:00"}
        # As of now: a run whose traces are younger than its end is taken for one that was started again.
        status["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S.999+00:00", time.gmtime(time.time() + 1))
        (copy / "status.json").write_text(json.dumps(status))
    make_run(folder, run_id="long-r8-20260917-121314", world_size=8, num_steps=steps, eval_steps=None)
    size = sum(file.stat().st_size for file in folder.glob("long-*/trace/*"))
    print(f"{number} runs; the long one has {size / 1e6:.0f} MB of traces")


def monitor(kernel: Kernel, folder: Path, minutes: int) -> None:
    """Watch a run for so many minutes of its own clock."""
    run = RunningRun(folder, num_steps=3, max_steps=10**6)
    kernel.say(_WATCH.format(folder=str(folder)), show=False)
    a_minute = round(60 / _STEP_SECONDS)
    for minute in range(1, minutes + 1):
        for _ in range(a_minute):
            run.origin -= _STEP_SECONDS  # its clock runs ahead of ours
            run.append_step(_STEP_SECONDS)
            told = kernel.say(_LOOK, show=False).split(maxsplit=1)
            assert len(told) == 1, told
        if minute in (1, 2, 5) or minute % 10 == 0:
            print(f"monitored for {minute} min: {told[0]} widget objects, {kernel.memory():.0f} MB")


if __name__ == "__main__":
    main()
