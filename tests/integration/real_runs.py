"""Real runs for these tests: two ranks of a tiny model on the CPU, each started once and looked at often."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil
import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.launch.directory import render_into
from qz3_widgets.launch.process import start
from qz3_widgets.plan.plan import make_plan
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.store import Run

RUN_SECONDS = 150.0
"""Ten on an idle machine, and the first one on a machine builds DeepSpeed's operator, which takes a minute."""

TRAIN_MANY = Path(__file__).with_name("train_many.py")

WARMUP = {"training__lr_scheduler_type": "constant_with_warmup", "training__warmup_steps": 8}
"""A learning rate that depends on the step, and not on how many there will be."""

_THINGS = ("printer", "screen", "modem", "keyboard", "mouse", "disk", "fan", "battery", "cable", "speaker")
_FAULTS = ("does not start", "is slow", "makes a noise", "gets hot", "has no light", "is not found")


def dialogues() -> list[dict[str, Any]]:
    """60 short chats, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"My {thing} {fault}."},
                {"role": "assistant", "content": f"Unplug the {thing}, wait a minute and plug it in again."},
            ]
        }
        for thing in _THINGS
        for fault in _FAULTS
    ]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Runs:
    """Starts runs in one folder. What :meth:`finished` has run once is there for every test that asks for it."""

    def __init__(self, folder: Path) -> None:
        """Write the data into ``folder``; nothing is started."""
        self.folder = folder
        self.runs_dir = folder / "my runs"
        rows = dialogues()
        self.held_out_rows = rows[::6]
        self.train_rows = [row for number, row in enumerate(rows) if number % 6]
        self.train = write_jsonl(folder / "train.jsonl", self.train_rows)
        self.held_out = write_jsonl(folder / "held_out.jsonl", self.held_out_rows)
        self._finished: dict[str, Run] = {}

    def config(self, **changes: Any) -> RunConfig:
        """A small run, with changes: ``zero__zero_stage=2`` sets a field."""
        fields = {
            "name": "tiny",
            "model.name_or_path": "random:tiny-llama",
            "model.load_strategy": "stock",
            "lora.r": 4,
            "lora.target_modules": "all-linear",
            "data.source": str(self.train),
            "data.eval_source": str(self.held_out),
            "data.max_length": 96,
            "training.max_steps": 4,
            "training.per_device_train_batch_size": 2,
            "training.per_device_eval_batch_size": 4,
            "training.learning_rate": 5e-3,
            "training.lr_scheduler_type": "constant",
            "training.memory_sample_seconds": 0.1,
            "launch.device": "cpu",
            "launch.num_processes": 2,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return with_changes(RunConfig(), fields)

    def start(self, *, runs_dir: Path | None = None, **changes: Any) -> Run:
        """Start a run and return at once."""
        plan = make_plan(self.config(**changes))
        plan.raise_if_blocked()
        return start(plan, runs_dir=runs_dir or self.runs_dir)

    def finished(self, key: str, **changes: Any) -> Run:
        """The run called ``key``: started at the first call, which waits for its good end."""
        if key not in self._finished:
            run = self.start(name=key, **changes)
            succeed(run)
            self._finished[key] = run
        return self._finished[key]

    def together(self, configs: Mapping[str, Mapping[str, Any]], *, changes: Mapping[str, str] | None = None) -> None:
        """Train the runs called by the keys of ``configs`` in one launch, for :meth:`finished` to find.

        A run of a tiny model spends most of its time on imports. All are in the same two ranks, one after the other,
        each with the training code and the run directory of a run of its own. They must use DeepSpeed.

        Args:
            configs: the fields of each run.
            changes: to a key, Python code that the ranks execute before this run; what it changes through ``patch``
                (pytest's ``monkeypatch``) ends with the run.
        """
        folders = {}
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("qz3_widgets.launch.directory.find_train_script", lambda: TRAIN_MANY)
            for key, fields in configs.items():
                plan = make_plan(self.config(name=key, **fields))
                plan.raise_if_blocked()
                assert plan.deepspeed, key
                assert plan.local_ranks == 2, key
                folders[key] = render_into(plan, self.runs_dir / key).root
        work = [(str(folder), dedent((changes or {}).get(key, ""))) for key, folder in folders.items()]
        first, *_ = layouts = [RunLayout(folder) for folder in folders.values()]
        done = subprocess.run(
            ["bash", str(first.launch_sh)],
            env={**os.environ, "QZ3_TEST_RUNS": json.dumps(work)},
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS + 10.0 * len(work),
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        wait_for(lambda: not processes_of(self.runs_dir / first.run_id), 5.0)
        for rank in range(2):
            logs = re.split(r"^== .*\n", first.rank_log(rank).read_text(encoding="utf-8"), flags=re.MULTILINE)
            for layout, log in zip(layouts, logs[1:], strict=True):
                layout.rank_log(rank).write_text(log, encoding="utf-8")
        for key, layout in zip(folders, layouts, strict=True):
            run = Run(layout.root)
            assert run.state == "succeeded", key
            self._finished[key] = run


def wait_for(condition: Callable[[], object], seconds: float = RUN_SECONDS, *, run: Run | None = None) -> None:
    """Return when ``condition`` holds; fail after ``seconds``, or when ``run`` has ended without it."""
    deadline = time.monotonic() + seconds
    while not condition():
        over = run is not None and run.status.has_ended and not condition()
        if over or time.monotonic() > deadline:
            about = "" if run is None else f"\n{run!r}: {run.status}\n{run.tail_log(num_lines=60)}"
            raise AssertionError(f"{'the run ended first' if over else f'waited {seconds:g} s in vain'}{about}")
        time.sleep(0.05)


def end(run: Run, seconds: float = RUN_SECONDS) -> Run:
    """Wait for a run's end, whichever it is; none of its processes is left then."""
    wait_for(lambda: run.status.has_ended, seconds)
    wait_for(lambda: not processes_of(run.layout.root), 5.0)
    return run


def succeed(run: Run) -> Run:
    """Wait for a run's good end."""
    end(run)
    assert run.state == "succeeded", f"{run.status}\n{run.tail_log(num_lines=80)}"
    return run


def in_step(run: Run, step: int = 1) -> None:
    """Wait until a run has done ``step`` steps."""
    wait_for(lambda: len(run.metrics().query("event == 'step'")) >= step, run=run)


def losses(run: Run) -> dict[int, float]:
    """Step to training loss, of the last attempt at each."""
    frame = run.metrics()
    steps = frame[frame["event"] == "step"].drop_duplicates("step", keep="last")
    return {int(step): float(loss) for step, loss in zip(steps["step"], steps["loss"], strict=True)}


def rank_processes(run: Run) -> dict[int, psutil.Process]:
    """The ranks' processes, as their traces name them."""
    headers = run.memory().headers
    return {rank: psutil.Process(int(header["pid"])) for rank, header in headers.items()}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every living process whose command names ``folder``, but this one."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return [process for process in found if process.pid != os.getpid()]
