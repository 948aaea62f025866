"""Does it fit, what to change, and which ways there are: on machines that are imagined."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.presets import preset
from qz3_widgets.plan.fit import Fit, largest
from qz3_widgets.plan.imagined import on_imagined
from qz3_widgets.plan.plan import PlanError
from qz3_widgets.plan.prospect import Prospect, prospect, refuse_if_too_large
from qz3_widgets.terminal_plan import bar, show_prospect

GIB = 2**30
RELEASED = {"model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False}


def look(name: str, gpus: int, gib: float, **changes: Any) -> Prospect:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return prospect(on_imagined(with_changes(preset(name), fields), gpus, gib))


def shown(found: Prospect, width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    show_prospect(found, console, command="my.yaml")
    return console.export_text()


def test_405b_fits_eight_gpus_and_as_released_it_does_not() -> None:
    found = look("llama-3.1-405b", 8, 80)
    assert found.fit.fits
    assert found.verdict.startswith("Fits. The fullest moment is a step: 32.")
    released = prospect(on_imagined(with_changes(preset("llama-3.1-405b"), RELEASED), 8, 80))
    assert not released.fit.fits
    assert released.fit.first_failing == "load"
    assert "ZeRO-3 does not shard a 4-bit model while it loads" in released.verdict
    first = released.advice[0]
    assert first.change == {
        "model.load_strategy": "sharded",
        "zero.release_gathered": True,
        "zero.shard_statistics": True,
    }
    assert first.fit.fits


@pytest.mark.parametrize("gpus, gib", [(4, 80), (2, 80), (1, 80), (8, 24), (2, 40)])
def test_the_first_advice_applied_fits(gpus: int, gib: float) -> None:
    found = look("llama-3.1-405b", gpus, gib)
    assert found.advice, found.verdict
    first = found.advice[0]
    assert first.fit.fits
    again = prospect(on_imagined(with_changes(found.plan.config, first.change), gpus, gib))
    assert again.fit.fits
    assert again.fit.forecast.peak_bytes == first.fit.forecast.peak_bytes


def test_what_can_not_be_made_to_fit_gets_what_helps_most() -> None:
    found = look("llama-3.1-405b", 1, 2)
    assert not found.fit.fits
    assert len(found.advice) == 1
    assert not found.advice[0].fit.fits
    assert "What helps most" in shown(found)


def test_strategies_are_ordered_by_fit_and_speed() -> None:
    found = look("llama-3.1-8b", 2, 24)
    fitting = [each.strategy.name for each in found.strategies if each.fit.fits]
    assert fitting[0] == "replicated"  # no weight travels
    assert fitting.index("sharded") < fitting.index("sharded_offload")
    assert [each.strategy.name for each in found.strategies if each.is_current] == ["sharded"]
    large = look("llama-3.1-405b", 8, 80)
    assert large.strategies[0].strategy.name == "sharded"
    assert {each.strategy.name: each.fit.fits for each in large.strategies}["replicated"] is False


def test_limits_are_the_last_that_fit() -> None:
    found = look("llama-3.1-70b", 2, 80)
    limits = found.limits
    for field, number, step in (
        ("data.max_length", limits["max_length"], 64),
        ("training.per_device_train_batch_size", limits["per_device_train_batch_size"], 1),
    ):
        fits = [
            prospect(on_imagined(with_changes(found.plan.config, {field: size}), 2, 80)).fit.fits
            for size in (number, number + step)
        ]
        assert fits == [True, False], field
    ranks = look("llama-3.1-405b", 8, 80).limits["num_ranks"]
    assert look("llama-3.1-405b", ranks, 80).fit.fits
    assert not look("llama-3.1-405b", ranks - 1, 80).fit.fits


@pytest.mark.parametrize("edge", [1, 2, 3, 7, 64, 100])
def test_the_search_finds_the_edge(edge: int) -> None:
    assert largest(lambda number: number <= edge, 100) == edge
    assert largest(lambda number: False, 100) is None


def test_json_is_the_contract() -> None:
    document = json.loads(json.dumps(look("llama-3.1-405b", 4, 80).to_json()))
    assert document["fits"] is True
    assert document["world_size"] == 4
    assert document["device_capacity_bytes"] == 80 * GIB
    assert document["strategy"] == "zero3"
    assert [entry["rank"] for entry in document["ranks"]] == [0, 1, 2, 3]
    for phase in ("load", "ready", "step"):
        figures = document["ranks"][0]["phases"][phase]
        assert sum(figures["components"].values()) == figures["peak_bytes"]
        assert sum(figures["settled_components"].values()) == figures["settled_bytes"]
    assert {"change", "fits", "peak_bytes", "why"} == set(document["advice"][0])
    assert {"rule", "severity", "field", "message", "fix"} <= set(
        (document["issues"] or [dict.fromkeys(("rule", "severity", "field", "message", "fix"))])[0]
    )


def test_a_run_that_can_not_fit_is_refused() -> None:
    plan = on_imagined(with_changes(preset("llama-3.1-405b"), RELEASED), 8, 80)
    with pytest.raises(PlanError, match=r"model\.load_strategy: Does not fit: loading needs .* on every rank"):
        refuse_if_too_large(plan)
    refuse_if_too_large(on_imagined(preset("llama-3.1-405b"), 8, 80))


def test_the_terminal_shows_bars_components_and_advice() -> None:
    text = shown(look("llama-3.1-405b", 8, 80))
    assert "Plan: llama-3.1-405b-qlora on 8 x 80.0 GiB, ZeRO-3, sharded load, 1,024 tokens x 1" in text
    assert "4-bit weights" in text
    assert "> ZeRO-3, sharded load" in text
    assert "Next: qz3 rehearse my.yaml" in text
    over = shown(prospect(on_imagined(with_changes(preset("llama-3.1-405b"), RELEASED), 8, 80)))
    assert "▶" in over
    assert "--set model.load_strategy=sharded --set zero.release_gathered=true" in over


@pytest.mark.parametrize("size, expected", [(0, "·" * 8 + "▕"), (4, "████····▕"), (8, "████████▕"), (9, "████████▶")])
def test_a_bar(size: float, expected: str) -> None:
    assert bar(size, 8, 8) == expected


def test_an_evaluation_that_does_not_fit_is_named_and_mended() -> None:
    config = with_changes(preset("llama-3.1-8b"), {"training.per_device_eval_batch_size": 256})
    found = prospect(on_imagined(config, 2, 24))
    assert found.fit.first_failing == "eval"
    assert found.verdict.startswith("Does not fit: an evaluation needs ")
    assert found.verdict.endswith("It evaluates 256 sequences at once.")
    assert found.advice[0].change == {"training.per_device_eval_batch_size": 1}
    assert found.advice[0].fit.fits
    text = shown(found)
    assert "eval: fullest as the middle LlamaDecoderLayer computes" in text
    assert {line.split()[0] for line in text.splitlines() if "▕" in line or "▶" in line} >= {"eval", "save"}
    current = next(each for each in found.strategies if each.is_current)
    assert current.verdict == "out of memory in an evaluation"


def test_what_comes_and_goes_makes_a_fit_narrow() -> None:
    found = look("llama-3.1-8b", 2, 24).fit
    fullest = found.forecast.phases[found.forecast.fullest]
    spare = int(0.3 * (fullest.peak_bytes - fullest.settled_bytes))
    for free, narrow in ((spare - 1, True), (max(spare, int(0.05 * fullest.peak_bytes)) + 1, False)):
        machine = replace(found.machine, capacity_bytes=found.needed_bytes + free)
        assert Fit(found.forecast, machine).is_narrow is narrow


def test_expectation_is_written_with_the_plan(tmp_path: Path) -> None:
    content = on_imagined(preset("llama-3.1-8b"), 2, 24).to_json()["expected"]
    assert list(content["phases"]) == ["load", "ready", "step", "eval", "save"]
    names = {suspect["name"] for suspect in content["suspects"]}
    assert {"not-sharded-at-load", "not-let-go", "not-quantized"} <= names
    json.dumps(content)
