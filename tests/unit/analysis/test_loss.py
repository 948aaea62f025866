from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qz3_widgets.analysis.loss import default_span, eval_curve, loss_curve, smooth, speed, summarize_loss
from qz3_widgets.trace.reader import read_metrics
from tests.fake_runs import make_run


def test_a_whole_run(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path, num_steps=12, eval_steps=6))
    summary = summarize_loss(metrics)
    assert (summary.num_steps, summary.max_steps, summary.num_tokens) == (12, 12, 12 * 2048)
    assert summary.first is not None
    assert summary.last is not None
    assert summary.first > summary.last
    assert summary.eval_before == pytest.approx(5.55)
    assert summary.eval_after is not None
    assert summary.eval_after < 3
    evals = eval_curve(metrics)
    assert evals["step"].tolist() == [0, 6, 12]
    assert evals["num_tokens"].tolist() == [0, 6 * 2048, 12 * 2048]


def test_no_evaluation_before_the_first_step(tmp_path: Path) -> None:
    summary = summarize_loss(read_metrics(make_run(tmp_path, eval_on_start=False)))
    assert summary.eval_before is None
    assert summary.eval_after is not None


def test_speed_leaves_out_the_first_step(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path))
    found = speed(metrics)
    assert found.step_seconds == pytest.approx(2.2, rel=0.05)
    only = speed(metrics[metrics["step"] <= 1])
    assert only.step_seconds == pytest.approx(5.5, rel=0.05)


def test_a_resumed_run_counts_each_step_once_as_done_last(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path, attempts=2, num_steps=14, eval_steps=7))
    curve = loss_curve(metrics)
    assert curve["step"].tolist() == list(range(1, 15))
    # Attempt 1 ended at step 7, attempt 2 began again with step 6.
    assert curve.set_index("step")["attempt"].loc[[5, 6, 7]].tolist() == [1, 2, 2]
    assert eval_curve(metrics)["step"].tolist() == [0, 7, 14]


def test_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    metrics = read_metrics(make_run(tmp_path, nan_at=5))
    summary = summarize_loss(metrics)
    assert summary.first_nan_step == 5
    assert summary.last is not None
    assert np.isnan(summary.last)
    assert summary.last_smoothed is not None
    assert np.isfinite(summary.last_smoothed)
    assert loss_curve(metrics)["smoothed"].isna().tolist() == [False] * 4 + [True] * 8


def test_smooth() -> None:
    assert smooth(np.array([1.0, 1.0, 1.0]), 8).tolist() == [1.0, 1.0, 1.0]
    assert smooth(np.array([3.0, 1.0]), 1).tolist() == [3.0, 1.0]
    gap = smooth(np.array([2.0, np.nan, 2.0]), 4)
    assert np.isnan(gap[1])
    assert gap[2] == 2.0
    assert len(smooth(np.array([]), 3)) == 0
    with pytest.raises(ValueError, match="span is 0"):
        smooth(np.array([1.0]), 0)
    assert [default_span(steps) for steps in (1, 8, 12, 20, 56, 1000)] == [1, 2, 2, 3, 8, 8]


def test_nothing_recorded(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path)
    summary = summarize_loss(metrics)
    assert (summary.num_steps, summary.first, summary.eval_after, summary.first_nan_step) == (0, None, None, None)
    assert speed(metrics).tokens_per_second is None
    assert len(loss_curve(metrics)) == len(eval_curve(metrics)) == 0
