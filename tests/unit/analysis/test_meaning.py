from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.compare import compare
from qz3_widgets.analysis.meaning import gpu_sentence
from qz3_widgets.runs.store import Run
from tests.fake_runs import CPU_135M, GIB, GPU_70B, GPU_70B_SHARDED, Shape, make_run


def sentence(runs_dir: Path, *changes: dict[str, Any]) -> str | None:
    """Of runs named a, b, ... of 70B on eight GPUs, the first as released and the others sharded."""
    runs = []
    for number, change in enumerate(changes):
        name = "abc"[number]
        values = {
            "run_id": f"{name}-20260917-12131{number}",
            "name": name,
            "world_size": 8,
            "num_steps": 6,
            "shape": GPU_70B if number == 0 else GPU_70B_SHARDED,
            **change,
        }
        runs.append(Run(make_run(runs_dir, **values)))
    return gpu_sentence(compare(runs))


def with_peak(gib: float) -> Shape:
    return Shape(**{**vars(GPU_70B), "step_peak": round(gib * GIB), "loaded": GIB, "load_peak": GIB, "ready": GIB})


def test_runs_that_need_different_gpus(runs_dir: Path) -> None:
    assert (
        sentence(runs_dir, {}, {})
        == "a (at most 40.6 GiB) fits GPUs of 48 GiB, narrowly; b (at most 10.8 GiB) fits GPUs of 16 GiB."
    )


def test_runs_that_need_the_same_gpus_are_not_worth_a_word(runs_dir: Path) -> None:
    assert sentence(runs_dir, {"shape": GPU_70B_SHARDED}, {}) is None


def test_a_cpu_says_nothing_of_gpus(runs_dir: Path) -> None:
    assert sentence(runs_dir, {"shape": CPU_135M}, {"shape": CPU_135M}) is None


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("state, why", [("failed", "it failed"), ("lost", "it was lost")])
def test_what_a_failed_run_needs_is_not_known_however_far_it_came(
    runs_dir: Path, state: str, why: str, num_steps: int
) -> None:
    text = sentence(runs_dir, {"state": state, "error": "CUDA out of memory", "num_steps": num_steps}, {})
    assert text == f"b (at most 10.8 GiB) fits GPUs of 16 GiB; what a needs is not known: {why}."


def test_two_failed_runs_tell_nothing(runs_dir: Path) -> None:
    assert sentence(runs_dir, {"state": "failed"}, {"state": "failed"}) is None


@pytest.mark.parametrize("state", ["running", "cancelled"])
def test_an_unfinished_run_is_known_as_far_as_it_came(runs_dir: Path, state: str) -> None:
    text = sentence(runs_dir, {"state": state, "num_steps": 4, "max_steps": 40}, {})
    assert (
        text
        == "a (at most 40.6 GiB up to step 4) fits GPUs of 48 GiB, narrowly; b (at most 10.8 GiB) fits GPUs of 16 GiB."
    )


def test_what_lies_beside_the_allocator_counts(runs_dir: Path) -> None:
    # 14.5 GiB are less than 16, but a context and NCCL take more than 1.5.
    text = sentence(runs_dir, {"shape": with_peak(14.5), "spread": 0.0}, {})
    assert text is not None
    assert text.startswith("a (at most 14.5 GiB) fits GPUs of 24 GiB;")


def test_what_fits_narrowly_is_named_so_and_what_fits_nowhere_too(runs_dir: Path) -> None:
    text = sentence(runs_dir, {"shape": with_peak(36.9), "spread": 0.0}, {"shape": with_peak(150), "spread": 0.0})
    assert (
        text
        == "a (at most 36.9 GiB) fits GPUs of 40 GiB, narrowly; b (at most 150.0 GiB) fits no GPU of up to 141 GiB."
    )


def test_ranks_that_share_a_gpu_tell_nothing_of_its_size(runs_dir: Path) -> None:
    assert sentence(runs_dir, {"config": {"launch": {"ranks_per_gpu": 2}}}, {}) is None
