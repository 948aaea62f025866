"""The Trainer's checkpoints in a run directory: which are there, and whether one can be resumed from."""

from __future__ import annotations

import re
from pathlib import Path

from .layout import RunLayout

_STEP = re.compile(r"checkpoint-(\d+)$")
# DeepSpeed writes one such file for each rank (with a prefix for bf16), and the Trainer one of the other kind.
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
_RANDOM_STATE = re.compile(r"rng_state(?:_\d+)?\.pth$")


def list_checkpoints(layout: RunLayout) -> list[Path]:
    """The checkpoints that are there, oldest first."""
    if not layout.checkpoints_dir.is_dir():
        return []
    entries = ((_STEP.match(path.name), path) for path in layout.checkpoints_dir.iterdir())
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in entries if match)]


def num_processes_of(checkpoint: Path) -> int:
    """How many ranks wrote ``checkpoint``: its optimizer shards, or random states where there is no DeepSpeed."""
    shards = {match.group(1) for path in checkpoint.glob("global_step*/*") if (match := _SHARD.search(path.name))}
    if shards:
        return len(shards)
    return sum(1 for path in checkpoint.iterdir() if _RANDOM_STATE.match(path.name))


def resumable_checkpoint(layout: RunLayout, num_processes: int) -> Path:
    """The newest checkpoint, after checking that ``num_processes`` ranks can go on from it.

    Raises:
        ValueError: there is none, it is incomplete, or another number of ranks wrote it (DeepSpeed would fail on that
            with an assertion that says nothing).
    """
    checkpoints = list_checkpoints(layout)
    if not checkpoints:
        raise ValueError(
            f"{layout.run_id} has no checkpoint to resume from: training.save_steps says how often one is written"
        )
    newest = checkpoints[-1]
    if not (newest / "trainer_state.json").is_file():
        before = f", to resume from {checkpoints[-2].name}" if len(checkpoints) > 1 else ""
        raise ValueError(f"{newest} is incomplete: the run ended while it was written. Delete that folder{before}")
    written_by = num_processes_of(newest)
    if written_by != num_processes:
        raise ValueError(
            f"launch.num_processes is {num_processes}, but {written_by} ranks wrote {newest}: a sharded checkpoint can "
            "only be resumed with the number of ranks that wrote it"
        )
    return newest
