"""What recording costs: the share of a step that goes into memory records, and steps with and without them in turn.

    python tests/benchmarks/recording.py [--steps 40] [--model DIR]

One rank of ZeRO-3 on this machine's device, through the same training code as any run. Odd steps record (events,
and samples from the thread), even steps don't. Prints the time inside the recorder as a share of the recorded
steps, which is exact, and the ratio of the medians, which the machine's noise limits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


class Stopwatch:
    """Time spent in records, and step times by whether they were recorded."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.count = 0
        self.on: list[float] = []
        self.off: list[float] = []


def make_recorder(base: type, watch: Stopwatch) -> type:
    """A recorder that measures itself and is silent in even steps."""

    class Measured(base):  # type: ignore[misc]
        begun: float

        def mark(self, event: str) -> None:
            if self.phase == "step" and self.step % 2 == 0 and event != "step_begin":
                return
            begin = time.perf_counter()
            super().mark(event)
            if self.phase == "step":
                watch.inside[-1] += time.perf_counter() - begin
                watch.count += 1

        def begin_step(self, step: int) -> None:
            now = time.perf_counter()
            if step > 3:  # the first steps build DeepSpeed's trace
                (watch.on if (step - 1) % 2 else watch.off).append(now - self.begun)
            self.begun = now
            watch.inside.append(0.0)
            super().begin_step(step)

    return Measured


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default=None, help="a model, random: too; the demo's, if left out")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()

    from sharding import texts

    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.schema import RunConfig
    from qz3_widgets.demo import demo_configs, prepare_demo
    from qz3_widgets.launch.command import environment_of
    from qz3_widgets.launch.directory import render_into
    from qz3_widgets.plan.plan import make_plan

    changes: dict[str, Any] = {
        "launch.num_processes": 1, "launch.ranks_per_gpu": 1, "training.max_steps": options.steps,
        "training.eval_on_start": False, "data.eval_source": None, "data.eval_fraction": 0.0,
        "training.memory_sample_seconds": 0.2, "training.per_device_train_batch_size": options.batch,
    }  # fmt: skip
    if options.model is not None:
        lines = texts(Path(tempfile.mkdtemp()) / "texts.jsonl", count=256)
        base = RunConfig()
        changes |= {"model.name_or_path": options.model, "data.source": str(lines)}
    else:
        _, base = demo_configs(folder=prepare_demo())
    config = with_changes(base, changes)
    plan = make_plan(config)
    with tempfile.TemporaryDirectory() as scratch:
        layout = render_into(plan, Path(scratch) / "run")
        os.environ.update(environment_of(plan, port=0))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
        _train(config, layout, plan.device)


def _train(config: Any, layout: Any, device: str) -> None:
    from qz3_widgets.config.paths import default_cache_dir
    from qz3_widgets.trace.records import TraceWriter
    from qz3_widgets.training.meters import make_meter
    from qz3_widgets.training.recorder import MemoryRecorder
    from qz3_widgets.training.run import Work
    from qz3_widgets.training.session import RankIdentity

    watch = Stopwatch()
    writer = TraceWriter(layout.memory_trace(0), {"rank": 0, "world_size": 1})
    recorder = make_recorder(MemoryRecorder, watch)(
        writer, make_meter(device, 0, default_cache_dir()), sample_seconds=config.training.memory_sample_seconds
    )
    recorder.begun = time.perf_counter()
    recorder.start_sampling()
    identity = RankIdentity.from_environment()
    Work(config, layout, recorder, None, device=device, resume=False, identity=identity).run()
    recorded = watch.inside[2::2]  # odd steps after the first
    step = statistics.median(watch.on)
    sys.stdout.flush()
    print()
    per_step = watch.count / max(1, len(watch.inside) / 2)
    print(f"steps recorded {len(watch.on)}, not recorded {len(watch.off)}; records in a step {per_step:.1f}")
    print(f"median step: recorded {step:.4f} s, not recorded {statistics.median(watch.off):.4f} s")
    print(f"ratio of medians: {step / statistics.median(watch.off):.4f}")
    print(f"time inside the recorder: {statistics.median(recorded) / step:.4%} of a step")


if __name__ == "__main__":
    main()
