"""Where the time of a load goes, in the functions of rank 0: ranks that share one GPU, a checkpoint on disk.

    python tests/benchmarks/load_profile.py [--shape llama-3.1-8b] [--ranks 8] [--set FIELD=VALUE]

The main thread's stack is sampled. The first load from a new checkpoint reads what was just written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

NUM_LINES = 45
PERIOD_SECONDS = 0.004

sys.path.insert(0, str(Path(__file__).resolve().parent))


class Sampler:
    """Looks at the main thread's stack every few milliseconds; slows it down by next to nothing."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.inside: Counter[str] = Counter()
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._began = time.perf_counter()
        self._thread.start()

    def _sample(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            frame = sys._current_frames().get(self._main or 0)
            names = []
            while frame is not None:
                code = frame.f_code
                names.append(f"{Path(code.co_filename).name}:{code.co_name}")
                if len(names) == 1:
                    names[0] += f":{frame.f_lineno}"
                frame = frame.f_back
            self.own[" < ".join(names[:3])] += 1
            self.inside.update({name.rsplit(":", 1)[0] if not at else name for at, name in enumerate(names)})

    def report(self, num_lines: int) -> str:
        """Seconds in a place, and seconds in a function and what it calls."""
        seconds = time.perf_counter() - self._began
        self._over.set()
        each = seconds / max(1, sum(self.own.values()))
        lines = [f"{seconds:.2f} s"]
        for title, counts in (("in place", self.own), ("inside", self.inside)):
            lines += [title, *(f"{count * each:7.2f} s  {name}" for name, count in counts.most_common(num_lines))]
        return "\n".join(lines)


def train(run_dir: Path) -> None:
    """Be a rank; rank 0 watches its load."""
    from qz3_widgets.training import model as models
    from qz3_widgets.training.main import main as train_rank

    load = models.load_base

    def watched(*args: Any, **kwargs: Any) -> Any:
        sampler = Sampler()
        model = load(*args, **kwargs)
        (run_dir / "load.txt").write_text(sampler.report(NUM_LINES))
        return model

    if os.environ.get("RANK") == "0":
        models.load_base = watched
    train_rank(run_dir)


def main() -> None:
    """Run it, and print the functions that took longest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--run-dir", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_dir is not None:
        train(options.run_dir)
        return
    import yaml
    from sharding import SCRATCH, launch_with, make_checkpoint, texts

    from qz3_widgets.config.changes import with_changes
    from qz3_widgets.config.schema import RunConfig
    from qz3_widgets.launch.directory import render_into
    from qz3_widgets.plan.plan import make_plan

    checkpoint = SCRATCH / options.shape
    if not (checkpoint / "model.safetensors.index.json").exists():
        make_checkpoint(checkpoint, options.shape)
    changes: dict[str, Any] = {
        "data.source": str(texts(SCRATCH / "texts.jsonl")), "data.eval_fraction": 0.0, "data.max_length": 128,
        "model.name_or_path": str(checkpoint), "training.max_steps": 1, "launch.num_processes": options.ranks,
        "launch.ranks_per_gpu": options.ranks, "launch.device": "cuda", "zero.overlap_comm": False,
    }  # fmt: skip
    changes |= {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in options.set)}
    folder = Path(tempfile.mkdtemp()) / "run"
    render_into(make_plan(with_changes(RunConfig(), changes)), folder)
    done = launch_with(Path(__file__), folder)
    if not (folder / "load.txt").exists():
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    print((folder / "load.txt").read_text())


if __name__ == "__main__":
    main()
