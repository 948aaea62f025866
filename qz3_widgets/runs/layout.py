"""Every file name of a run directory, in one place.

The files of a run directory are the only contract between the ranks and the notebook, so this module
uses the standard library only: every rank imports it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MEMORY_TRACE = re.compile(r"memory\.rank-(\d{5})\.jsonl$")


@dataclass(frozen=True)
class RunLayout:
    """Paths inside the run directory ``root``. Nothing here touches the disk but :meth:`make_folders`."""

    root: Path

    @property
    def run_id(self) -> str:
        """The run's identifier: the name of its directory."""
        return self.root.name

    @property
    def run_yaml(self) -> Path:
        """The configuration as given and as resolved."""
        return self.root / "run.yaml"

    @property
    def plan_json(self) -> Path:
        """What was predicted before the start."""
        return self.root / "plan.json"

    @property
    def manifest_json(self) -> Path:
        """Provenance: argv, git state, package versions, hardware."""
        return self.root / "manifest.json"

    @property
    def status_json(self) -> Path:
        """State, process identity, times and exit code."""
        return self.root / "status.json"

    @property
    def notes_json(self) -> Path:
        """The user's own tags and notes."""
        return self.root / "notes.json"

    @property
    def accelerate_yaml(self) -> Path:
        """What ``accelerate launch --config_file`` reads."""
        return self.root / "accelerate.yaml"

    @property
    def deepspeed_json(self) -> Path:
        """DeepSpeed's configuration."""
        return self.root / "deepspeed.json"

    @property
    def launch_sh(self) -> Path:
        """Starts the same run without the package's help."""
        return self.root / "launch.sh"

    @property
    def logs_dir(self) -> Path:
        """The folder of all logs."""
        return self.root / "logs"

    @property
    def launcher_log(self) -> Path:
        """What the launcher and all ranks printed."""
        return self.logs_dir / "launcher.log"

    @property
    def supervisor_log(self) -> Path:
        """What the supervisor did and saw, with times."""
        return self.logs_dir / "supervisor.log"

    @property
    def stop_requested(self) -> Path:
        """There while somebody wants the run to stop; holds how long it may take."""
        return self.root / "stop-requested"

    def rank_log(self, rank: int) -> Path:
        """The log of one rank, its traceback included if it failed."""
        return self.logs_dir / f"rank-{rank:05d}.log"

    @property
    def trace_dir(self) -> Path:
        """The folder of all trace files."""
        return self.root / "trace"

    def memory_trace(self, rank: int) -> Path:
        """Memory records of one rank; written by that rank alone."""
        return self.trace_dir / f"memory.rank-{rank:05d}.jsonl"

    def thinned_trace(self, rank: int) -> Path:
        """A long memory trace in short, written by whoever read it; it may go at any time."""
        return self.trace_dir / f".thinned.rank-{rank:05d}.arrow"

    @property
    def metrics(self) -> Path:
        """Loss, learning rate and speed per step; written by rank 0."""
        return self.trace_dir / "metrics.jsonl"

    def profile(self, rank: int) -> Path:
        """The torch profiler's trace of one rank, where ``training.profile_steps`` asked for it."""
        return self.trace_dir / f"profile.rank-{rank:05d}.json.gz"

    @property
    def probes_dir(self) -> Path:
        """The folder of the ranks' proofs."""
        return self.root / "probes"

    def probe(self, rank: int) -> Path:
        """What one rank counted of its sharding and quantization."""
        return self.probes_dir / f"rank-{rank:05d}.json"

    @property
    def adapter_dir(self) -> Path:
        """The trained adapter, in PEFT's own format."""
        return self.root / "adapter"

    @property
    def checkpoints_dir(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    def make_folders(self) -> None:
        """Create the run directory and the folders that the ranks write into."""
        for folder in (self.logs_dir, self.trace_dir, self.probes_dir):
            folder.mkdir(parents=True, exist_ok=True)


def rank_of_memory_trace(path: Path) -> int | None:
    """The rank whose memory trace ``path`` is, or ``None`` for any other file."""
    match = _MEMORY_TRACE.search(path.name)
    return int(match.group(1)) if match else None


def is_run_directory(path: Path) -> bool:
    """Whether ``path`` holds a run: both ``run.yaml`` and ``status.json`` are there.

    ``status.json`` is written last, so a directory whose creation was cut short is not a run.
    """
    layout = RunLayout(path)
    return layout.run_yaml.is_file() and layout.status_json.is_file()
