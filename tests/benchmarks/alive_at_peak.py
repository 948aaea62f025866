"""Which allocations are alive at the peak of a step, and which code made them: torch's allocation history, replayed.

    python tests/benchmarks/alive_at_peak.py [--shape llama-3.1-405b] [--layers 6] [--world-size 8] [--set FIELD=VALUE]

Rehearses rank 0 on one NVIDIA GPU; the second step is recorded. What a decoder layer needs does not depend on how many
there are, so a few layers answer for all of them. The table leaves out what was allocated before the step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

RECORDED_STEP = 2
FRAMES_SHOWN = 5
UNTOLD = (
    "torch/utils/_", "torch/_compile", "_dynamo/", "torch/library.py", "torch/nn/modules/module.py", "torch/autograd/",
    "torch/utils/checkpoint.py", "utils/nvtx.py",
)  # fmt: skip


class Replay:
    """Allocations as they come and go, on top of what was there before the first event.

    As torch counts ``allocated``: a block is gone when its tensor is, though another stream may still be reading it.
    """

    def __init__(self) -> None:
        self._alive: dict[int, dict[str, Any]] = {}
        self._now = 0

    def play(self, events: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
        """The most bytes during ``events``, and the allocations alive at that moment."""
        peak, at_peak = -1, []
        for event in events:
            if event["action"] == "alloc":
                self._alive[event["addr"]] = event
                self._now += event["size"]
            elif event["action"] == "free_requested":
                self._alive.pop(event["addr"], None)
                self._now -= event["size"]
            if self._now > peak:
                peak, at_peak = self._now, list(self._alive.values())
        return peak, at_peak


def timeline(events: list[dict[str, Any]], num_windows: int = 60) -> list[str]:
    """The peak of each of so many equal parts of the events, with its five largest places."""
    replay, lines = Replay(), []
    size = -(-len(events) // num_windows)
    for first in range(0, len(events), size):
        peak, at_peak = replay.play(events[first : first + size])
        sums: dict[str, int] = defaultdict(int)
        for event in at_peak:
            sums[place(event, frames=1)] += event["size"]
        top = sorted(sums.items(), key=lambda item: -item[1])[:5]
        told = ", ".join(f"{bytes_ / 2**30:.2f} {where}" for where, bytes_ in top)
        lines.append(f"{first:7d} {peak / 2**30:7.3f}  {told}")
    return lines


def place(event: dict[str, Any], frames: int = FRAMES_SHOWN) -> str:
    """The innermost lines of code, outermost last, without torch's own plumbing."""
    told = [
        f"{'/'.join(frame['filename'].split('/')[-2:])}:{frame['line']} {frame['name']}"
        for frame in event["frames"]
        if not any(part in frame["filename"] for part in UNTOLD)
    ]
    return " < ".join(told[:frames])


def table(events: list[dict[str, Any]]) -> str:
    """Bytes at the peak, by the code that allocated them."""
    peak, at_peak = Replay().play(events)
    lines = [f"{peak / 2**30:8.3f} GiB on top at the peak"]
    places: dict[str, list[int]] = defaultdict(list)
    for event in at_peak:
        places[place(event)].append(event["size"])
    for where, sizes in sorted(places.items(), key=lambda item: -sum(item[1])):
        if sum(sizes) > 2**24:
            each = " ".join(f"{size / 2**30:.3f}" for size in sorted(sizes, reverse=True)[:8])
            lines.append(f"{sum(sizes) / 2**30:8.3f} GiB in {len(sizes):4d} [{each}]  {where}")
    return "\n".join([*lines, "", *timeline(events)])


def train(run_dir: Path) -> None:
    """Be the rank, with one step's allocations recorded."""
    import torch

    from qz3_widgets.training.main import main as train_rank
    from qz3_widgets.training.trainer import RecordingCallback

    begin, end = RecordingCallback.on_step_begin, RecordingCallback.on_step_end

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == RECORDED_STEP:
            torch.cuda.memory._record_memory_history(max_entries=4_000_000, stacks="python")
        begin(self, args, state, control, **kwargs)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end(self, args, state, control, **kwargs)
        if state.global_step == RECORDED_STEP:
            events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
            torch.cuda.memory._record_memory_history(enabled=None)
            (run_dir / "alive.txt").write_text(table(events) + "\n")

    RecordingCallback.on_step_begin = on_step_begin  # type: ignore[method-assign]
    RecordingCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    train_rank(run_dir)


def main() -> None:
    """Rehearse, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-405b", help="name of a preset")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--run-dir", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_dir is not None:
        train(options.run_dir)
        return
    import torch
    import yaml
    from sharding import launch_with

    from qz3_widgets.analysis.memory import peaks
    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.presets import preset
    from qz3_widgets.launch.directory import render_into
    from qz3_widgets.plan.rehearsal import make_rehearsal
    from qz3_widgets.runs.store import Run

    if not torch.cuda.is_available():
        sys.exit("the history of allocations is the CUDA allocator's: this needs an NVIDIA GPU")
    changes = {"data.max_length": 1024, "training.per_device_train_batch_size": 1, "lora.r": 16}
    changes |= {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in options.set)}
    config = with_changes(preset(options.shape), changes)
    plan = make_rehearsal(config, options.world_size, steps=RECORDED_STEP, num_layers=options.layers)
    folder = Path(tempfile.mkdtemp()) / "run"
    layout = render_into(plan, folder)
    done = launch_with(Path(__file__), folder)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    print((folder / "alive.txt").read_text())
    print(peaks(Run(layout).memory()).to_string())
    print("\n".join(line for line in done.stdout.splitlines() if "step" in line or "computed" in line))


if __name__ == "__main__":
    main()
