"""Expected against measured, of runs that are made up: within the stated error, beyond it, and like a suspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.analysis.truth import compare_with_expected, expected_sizes
from qz3_widgets.plotting import plot_memory
from qz3_widgets.runs.store import Run
from tests.fake_runs import GPU_70B, make_run

PHASES = ("load", "ready", "step")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(make_run(tmp_path, world_size=2, shape=GPU_70B, num_steps=4, eval_steps=None, spread=0.0))


def sizes_of(run: Run, **scale: float) -> dict[str, dict[str, int]]:
    """What rank 0 held in each phase, times ``scale``."""
    table = peaks(run.memory())
    rows = table[table["rank"] == 0].set_index("phase")
    return {
        phase: {name: int(rows.loc[phase, name] * scale.get(phase, 1.0)) for name in ("settled_bytes", "peak_bytes")}
        for phase in PHASES
    }


def expect(run: Run, phases: dict[str, dict[str, int]], *suspects: dict[str, Any], peak: float = 0.08) -> None:
    content = {"phases": phases, "error": {"settled": 0.01, "peak": peak}, "suspects": list(suspects)}
    run.layout.plan_json.write_text(json.dumps({"expected": content}))


def truth_of(run: Run) -> dict[str, Any]:
    found = compare_with_expected(run, peaks(run.memory()))
    assert found is not None
    return found


def test_without_an_expectation_nothing_is_said(run: Run) -> None:
    assert compare_with_expected(run, peaks(run.memory())) is None
    run.layout.plan_json.write_text("{torn")
    assert compare_with_expected(run, peaks(run.memory())) is None
    assert expected_sizes(run) == {}


def test_as_expected(run: Run) -> None:
    expect(run, sizes_of(run))
    truth = truth_of(run)
    assert truth["ok"]
    assert truth["sentence"].startswith("as expected: the largest difference is 0.1%, ready, settled of rank 1")
    assert len(truth["rows"]) == 2 * 2 * 3


def test_more_than_expected_without_a_known_cause(run: Run) -> None:
    expect(run, sizes_of(run, load=0.5))
    truth = truth_of(run)
    assert not truth["ok"]
    assert truth["cause"] is None
    assert truth["sentence"].startswith("load, settled: 36.8 GiB measured on rank 0, 18.4 GiB expected: 100% more")


def test_the_suspect_that_it_resembles(run: Run) -> None:
    suspects = [
        {"name": "other", "sentence": "it is something else", "phases": sizes_of(run, load=4.0)},
        {"name": "whole", "sentence": "every rank holds the whole model", "phases": sizes_of(run)},
    ]
    expect(run, sizes_of(run, load=0.2, step=0.5), *suspects)
    truth = truth_of(run)
    assert truth["cause"] == "whole"
    assert truth["sentence"].startswith("every rank holds the whole model (load, settled: 36.8 GiB measured")


def test_a_step_may_take_less_and_a_load_may_not(run: Run) -> None:
    phases = sizes_of(run)
    phases["step"]["peak_bytes"] *= 2  # examples are shorter than they may be
    expect(run, phases)
    assert truth_of(run)["ok"]
    phases["load"]["peak_bytes"] *= 2
    expect(run, phases)
    assert not truth_of(run)["ok"]


def test_an_evaluation_may_take_less_and_not_more_and_what_a_save_leaves_is_not_compared(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path, world_size=2, shape=GPU_70B, num_steps=4, eval_steps=2, spread=0.0))
    table = peaks(run.memory())
    between = {
        phase: {name: int(table[table["phase"] == phase][name].max()) for name in ("settled_bytes", "peak_bytes")}
        for phase in ("eval", "save")
    }
    expect(run, {**sizes_of(run), **between})
    truth = truth_of(run)
    assert truth["ok"], truth["sentence"]
    compared = {(row["phase"], row["figure"]) for row in truth["rows"]}
    assert ("eval", "settled_bytes") in compared
    assert ("save", "peak_bytes") in compared
    assert ("save", "settled_bytes") not in compared
    for phase, sizes in between.items():
        for scale, well in ((2.0, True), (0.5, False)):
            expect(run, {**sizes_of(run), phase: {**sizes, "peak_bytes": int(sizes["peak_bytes"] * scale)}})
            assert truth_of(run)["ok"] is well, (phase, scale)


def test_on_a_cpu_peaks_are_told_and_not_judged(run: Run) -> None:
    expect(run, sizes_of(run), peak=10.0)
    assert set(expected_sizes(run)["step"]) == {"settled_bytes"}
    phases = sizes_of(run)
    phases["load"]["peak_bytes"] //= 3
    expect(run, phases, peak=10.0)
    assert truth_of(run)["ok"]


def test_the_plot_draws_what_is_expected(run: Run) -> None:
    def dotted() -> int:
        lines = [line for ax in plot_memory(run).axes for line in ax.lines]
        return sum(getattr(line, "_unscaled_dash_pattern", (0, None))[1] == (1, 1.6) for line in lines)

    assert dotted() == 0
    expect(run, sizes_of(run))
    words = [text.get_text() for ax in plot_memory(run).axes for text in ax.texts]
    assert "expected" in words
    assert dotted() == 6 + 1  # two for each phase, and one in the list of ranks
