from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.analysis.compare import Comparison, compare
from qz3_widgets.analysis.names import label_runs
from qz3_widgets.runs.store import Run
from tests.fake_runs import CPU_135M_SHORT, GPU_70B, GPU_70B_SHARDED, make_run

LONG = {"shape": GPU_70B, "world_size": 2, "loss": (1.7, 1.2)}


def runs_of(tmp_path: Path, *changes: dict[str, Any]) -> list[Run]:
    return [
        Run(make_run(tmp_path, **{"run_id": f"{chr(97 + i)}-20260917-12000{i}", **change}))
        for i, change in enumerate(changes)
    ]


def of(tmp_path: Path, *changes: dict[str, Any]) -> Comparison:
    return compare(runs_of(tmp_path, *changes))


def test_json_is_the_contract(tmp_path: Path) -> None:
    found = of(tmp_path, {"config": {"lora": {"r": 8}}}, {"config": {"lora": {"r": 16, "lora_dropout": 0.1}}}).to_json()
    assert set(found) == {"config_diff", "metrics", "directions"}
    assert found["config_diff"] == {
        "lora.r": {"a-20260917-120000": 8, "b-20260917-120001": 16},
        "lora.lora_dropout": {"a-20260917-120000": 0.0, "b-20260917-120001": 0.1},
    }
    assert set(found["metrics"]) == {"a-20260917-120000", "b-20260917-120001"}
    assert set(found["directions"].values()) == {"lower", "higher"}
    assert found["directions"]["step_peak_bytes"] == "lower"
    assert found["directions"]["tokens_per_second"] == "higher"
    for metrics in found["metrics"].values():
        assert set(found["directions"]) <= set(metrics)
        assert metrics["state"] == "succeeded"
    json.dumps(found, allow_nan=False)


def test_the_better_one_is_marked(tmp_path: Path) -> None:
    found = of(tmp_path, LONG, {**LONG, "shape": GPU_70B_SHARDED})
    second = frozenset({"b-20260917-120001"})
    assert found.better("step_peak_bytes") == second
    assert found.better("tokens_per_second") == second
    assert found.better("step_seconds") == second
    assert found.better("eval_loss_after") == frozenset()  # the same
    assert found.better("num_steps") == frozenset()  # no direction
    assert found.losses_compare
    assert "29.3 GiB less memory" in found.sentence
    assert "the evaluation loss is the same" in found.sentence
    with pytest.raises(ValueError, match="no metric 'speed'"):
        found.better("speed")


def test_losses_over_other_text_are_not_judged(tmp_path: Path) -> None:
    found = of(tmp_path, {}, {"config": {"data": {"max_length": 64}}, "loss": (5.5, 1.0), "shape": CPU_135M_SHORT})
    assert not found.losses_compare
    assert found.better("last_loss") == frozenset()
    assert found.better("step_peak_bytes") == {"b-20260917-120001"}
    assert found.sentence.startswith("data.max_length differs, so the losses don't compare")
    assert any("max_length differs" in note for note in found.notes)


def test_a_failed_run_is_shown_and_not_judged(tmp_path: Path) -> None:
    dead = {"state": "failed", "fail_phase": "load", "shape": GPU_70B_SHARDED, "error": "OutOfMemoryError: no"}
    found = of(tmp_path, LONG, dead, {**LONG, "loss": (1.7, 1.0)})
    assert found.metrics["b-20260917-120001"]["load_peak_bytes"] > 0
    assert found.metrics["b-20260917-120001"]["step_peak_bytes"] is None
    assert found.better("load_peak_bytes") == frozenset()  # the one with the lowest never finished its load
    assert found.better("total_seconds") == frozenset()
    assert found.better("last_loss") == {"c-20260917-120002"}
    assert any(note.startswith("b: failed after 0 steps") for note in found.notes)
    assert "b: rank 1 failed in load" in found.sentence


def test_a_running_run_is_not_judged_by_its_loss(tmp_path: Path) -> None:
    found = of(tmp_path, {}, {"state": "running", "max_steps": 99, "loss": (5.5, 0.1)})
    assert found.better("last_loss") == frozenset()
    assert any("12 steps so far" in note for note in found.notes)


def test_table(tmp_path: Path) -> None:
    table = of(tmp_path, {}, {}, {"state": "failed", "num_steps": 3}).table()
    assert list(table.columns) == ["a-20260917-120000", "b-20260917-120001", "c-20260917-120002"]
    assert table.loc["step_peak_bytes"].notna().all()
    assert "reserved_peak_bytes" not in table.index  # on the CPU it says nothing


def test_html_is_escaped_and_shows_all(tmp_path: Path) -> None:
    config = {
        "data": {"source": "<script>alert(1)</script>"},
        "launch": {"environment": {"NOTE": "hf_abcdefgh12345678"}},
    }
    html = of(tmp_path, {}, {"config": config}, {"state": "failed", "num_steps": 3})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "hf_abcdefgh12345678" not in html
    assert "failed" in html
    assert html.count('class="qz3-run-dot') == 6


def test_devices_that_differ_are_named(tmp_path: Path) -> None:
    found = of(tmp_path, {}, LONG)
    assert any("different devices" in note for note in found.notes)


def test_labels(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"name": "same"}, {"name": "same"}, {"name": "other"})
    assert list(label_runs(runs).values()) == ["a-20260917-120000", "b-20260917-120001", "other"]


def test_bad_input(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {})
    with pytest.raises(ValueError, match="two runs or more, not 1"):
        compare(runs)
    with pytest.raises(ValueError, match="a-20260917-120000 is named more than once"):
        compare(runs * 2)


def test_a_run_whose_configuration_cannot_be_read(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {}, {"config": {"lora": {"r": 4}}}, {"config": {"lora": {"r": 2}}})
    (runs[0].layout.root / "run.yaml").write_text("nothing: here")
    found = compare(runs)
    assert found.config_diff == {"lora.r": {"a-20260917-120000": None, "b-20260917-120001": 4, "c-20260917-120002": 2}}
    assert "empty" in found._repr_html_()
