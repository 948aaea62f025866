"""What runs are called where several stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.schema import RunConfig
from ..runs.store import Run


def config_of(run: Run) -> RunConfig | None:
    """The run's configuration, or ``None`` where it can't be read: the rest of a damaged run is still worth a look."""
    try:
        return run.config
    except ValueError:
        return None


def label_runs(runs: Sequence[Run]) -> dict[str, str]:
    """Run id to a short name: the configured one where no other run here has it, else the run id."""
    names = {}
    for run in runs:
        config = config_of(run)
        names[run.run_id] = run.run_id if config is None else config.name
    found = list(names.values())
    return {run_id: name if found.count(name) == 1 else run_id for run_id, name in names.items()}
