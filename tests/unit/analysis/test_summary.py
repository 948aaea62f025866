from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.summary import summarize
from qz3_widgets.analysis.verdict import judge
from qz3_widgets.runs.store import Run
from tests.fake_runs import EPOCH, GPU_70B, iso, make_run

OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.62 GiB"


def summary_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    summary = summarize(Run(make_run(tmp_path, **changes)))
    json.dumps(summary, allow_nan=False)
    return summary


def test_what_the_command_promises(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, config={"lora": {"r": 8}})
    assert summary["state"] == "succeeded"
    assert summary["config"]["lora"]["r"] == 8
    assert summary["given"] == {"lora": {"r": 8}}
    assert [rank["rank"] for rank in summary["ranks"]] == [0, 1]
    step = summary["ranks"][0]["phases"]["step"]
    assert step["settled_bytes"] < step["peak_bytes"]
    assert set(summary["ranks"][0]["phases"]) >= {"load", "ready", "step"}
    assert summary["first_loss"] > summary["last_loss"]
    assert summary["eval_loss_before"] > summary["eval_loss_after"]
    assert summary["tokens_per_second"] > 0
    assert summary["expected_against_measured"] is None
    assert summary["failure"] is None
    assert summary["fullest"]["phase"] == "step"
    assert summary["times"]["launch_to_first_step_seconds"] == pytest.approx(20.8, abs=0.5)
    assert summary["times"]["total_seconds"] > 50
    assert summary["times"]["phase_seconds"]["load"] == pytest.approx(5, abs=0.2)
    verdict = judge(summary)
    assert verdict.level == "ok"
    assert "evaluation loss fell from 5.550 to" in verdict.sentence
    assert "host memory, which the ranks share" in verdict.detail


def test_a_killed_rank(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, state="failed", num_steps=7, max_steps=40)
    failure = summary["failure"]
    assert (failure["rank"], failure["phase"], failure["step"]) == (1, "step", 7)
    assert failure["error"] == "killed by SIGKILL"
    assert failure["at"] is not None
    assert "Rank 1 failed in step 7, 39 s after the start: killed by SIGKILL" in failure["sentence"]
    assert judge(summary).level == "error"


def test_out_of_memory_while_loading(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path, state="failed", fail_phase="load", failed_rank=3, error=OOM, world_size=8, shape=GPU_70B
    )
    assert summary["failure"]["sentence"].startswith("Rank 3 failed in load, ")
    assert summary["failure"]["error"] == OOM
    assert summary["first_loss"] is None
    assert summary["times"]["launch_to_first_step_seconds"] is None
    assert summary["ranks"][3]["phases"]["load"]["settled_bytes"] is None
    assert summary["ranks"][3]["outcome"] == "failed"
    assert OOM in judge(summary).sentence


def test_the_failed_rank_is_found_in_the_traces_alone(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, state="failed", fail_phase="load", error=OOM)
    status = json.loads((run_dir / "status.json").read_text())
    status |= {"failed_rank": None, "failed_at": None, "error": None}
    (run_dir / "status.json").write_text(json.dumps(status))
    failure = summarize(Run(run_dir))["failure"]
    assert (failure["rank"], failure["phase"], failure["error"]) == (1, "load", OOM)


def test_a_failed_rank_without_a_trace(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, state="failed", missing_ranks=(1,))
    assert summary["failure"]["rank"] == 1
    assert summary["failure"]["phase"] is None
    assert summary["missing_ranks"] == [1]
    assert "No trace of rank 1." in judge(summary).detail


def test_nothing_started(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, state="pending")
    for file in (run_dir / "trace").iterdir():
        file.unlink()
    summary = summarize(Run(run_dir))
    json.dumps(summary, allow_nan=False)
    assert summary["ranks"] == []
    assert summary["fullest"] is None
    assert summary["world_size"] == 2
    assert judge(summary).sentence == "Not started yet."


@pytest.mark.parametrize(
    "state, words",
    [("running", "Running, step 12 of 40"), ("cancelled", "Cancelled after 12 steps"), ("lost", "Lost after step")],
)
def test_other_states(tmp_path: Path, state: str, words: str) -> None:
    assert words in judge(summary_of(tmp_path, state=state, max_steps=40)).sentence


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, nan_at=5)
    assert summary["last_loss"] is None
    assert summary["first_nan_step"] == 5
    assert judge(summary).sentence == "The loss is not a number from step 5 on."


def test_a_run_that_learned_nothing_is_not_all_right(tmp_path: Path) -> None:
    verdict = judge(summary_of(tmp_path, loss=(2.0, 2.4)))
    assert verdict.level == "warn"
    assert "nothing was learned" in verdict.sentence


def test_damage_is_told(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, torn={0: 2}, world_size=3, missing_ranks=(2,))
    assert summary["num_damaged_lines"] == 2
    assert judge(summary).detail.endswith("No trace of rank 2. 2 damaged trace lines left out.")


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "run.yaml").write_text("resolved: {model: {nme: x}}")
    summary = summarize(Run(run_dir))
    assert summary["config"] is None
    assert summary["name"] == summary["run_id"]
    assert summary["last_loss"] is not None


def test_a_resumed_run_counts_its_last_attempt(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, attempts=2)
    assert summary["num_attempts"] == 2
    assert summary["times"]["launch_to_first_step_seconds"] == pytest.approx(20.8, abs=0.5)
    assert summary["status"]["created"] == iso(EPOCH)
