"""One folder of real runs for all tests here: what has run once is looked at by many of them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.runs.store import Run

from .real_runs import WARMUP, Runs, processes_of, write_jsonl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Where the runs are, in a path with a space. Whatever is left of them at the end is killed, and an error."""
    folder = tmp_path_factory.mktemp("real runs")
    yield Runs(folder)
    left = processes_of(folder)
    for process in left:
        process.kill()
    assert not left


@pytest.fixture(scope="session")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same training in several ways, most of which must come to the same losses; not to be written to.

    One launch for all workers of pytest-xdist: the first that asks starts it, the others wait for it.

    ``measure`` is what others are held against: ten steps with a learning rate that depends on the step, never broken
    off; as all of these with ZeRO-3, and with non-reentrant checkpointing if not named otherwise.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ways to train"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = Runs(folder)
        configs = ways_to_train(runs)
        if not (folder / "done").exists():
            runs.together(configs)
            (folder / "done").touch()
    return {key: Run(runs.runs_dir / key) for key in configs}


def ways_to_train(runs: Runs) -> dict[str, dict[str, Any]]:
    """The fields of each."""
    with_ids = [{"id": number, **row} for number, row in enumerate(runs.train_rows)]
    # Otherwise what a tiny model has counts as small, and stays whole.
    ten = {"training__max_steps": 10, "zero__stage3_param_persistence_threshold": 100}
    sharded = {**ten, "model__load_strategy": "sharded"}
    return {
        "ten-sharded": sharded,
        # As released: the libraries' own load, layers and statistics.
        "ten-stock": {**ten, "zero__release_gathered": False, "zero__shard_statistics": False},
        "offloaded": {**sharded, "zero__offload_param_device": "cpu", "training__max_steps": 4},
        "measure": {"training__max_steps": 10, **WARMUP},
        "reentrant": {"training__activation_checkpointing": "reentrant", **WARMUP},
        "none": {"training__activation_checkpointing": "none", "training__profile_steps": 1, **WARMUP},
        # Only the assistant's turns; in fp32, with a batch in two halves, and rows of other columns in between.
        "assistant": {
            "data__source": str(write_jsonl(runs.folder / "with ids.jsonl", with_ids)),
            "data__loss_on": "assistant",
            "training__gradient_accumulation_steps": 2,
            "training__per_device_train_batch_size": 1,
            "training__precision": "fp32",
            "model__dtype": "float32",
            "quantization__bnb_4bit_compute_dtype": "float32",
            "quantization__bnb_4bit_quant_storage": "float32",
        },
    }
