from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.presets import preset
from qz3_widgets.plan.capabilities import imagine
from qz3_widgets.units import GIB
from qz3_widgets.widgets import plan_panel
from qz3_widgets.widgets.plan_panel import HERE, IMAGINE, PlanPanel
from tests.unit.widgets.conftest import text_of


@pytest.fixture
def plan(tmp_path: Path) -> PlanPanel:
    return PlanPanel(preset("llama-3.1-405b"), runs_dir=tmp_path, machine=imagine(0, 0, num_cpus=2))


def test_a_preset_for_gpus_is_planned_for_those_it_is_meant_for(plan: PlanPanel) -> None:
    assert (plan.where.value, plan.num_gpus.value, plan.gib.value) == (IMAGINE, 8, 80)
    assert text_of(plan.verdict.value).startswith("✓ Fits. The fullest moment is a step:")
    assert plan.figure.value.count("<svg") == 1
    assert "ZeRO-3, sharded load" in text_of(plan.strategies.value)
    assert "(chosen)" in plan.strategies.value
    assert "tokens" in plan.limits.value
    assert plan.failures == ()


def test_fewer_and_smaller_gpus_change_the_verdict_and_give_advice(plan: PlanPanel) -> None:
    plan.gib.value = 24
    plan._sizes_later.flush()
    assert "Does not fit" in plan.verdict.value
    assert 'role="alert"' in plan.verdict.value
    (first, *_) = plan.advice.children
    first.click()
    assert plan.config.zero.offload_param_device == "cpu"
    assert "Fits" in plan.verdict.value


def test_advice_goes_to_whoever_edits_the_configuration(tmp_path: Path) -> None:
    given = []
    view = PlanPanel(preset("llama-3.1-405b"), runs_dir=tmp_path, machine=imagine(0, 0), on_apply=given.append)
    view.advice.children[0].click()
    assert given == [view.found.advice[0].change]
    assert view.config == preset("llama-3.1-405b")


def test_the_issues_have_the_memory_among_them(plan: PlanPanel) -> None:
    small = with_changes(plan.config, {"zero.release_gathered": False})
    found = {issue.rule: issue for issue in plan.issues(small)}
    assert found["does-not-fit"].fix
    assert "does-not-fit" not in {issue.rule for issue in plan.issues(plan.config)}


def test_generated_files_are_shown_with_the_last_change_marked(plan: PlanPanel) -> None:
    assert tuple(plan.file_names.options) == ("accelerate.yaml", "deepspeed.json", "command")
    plan.file_names.value = "deepspeed.json"
    assert "qz3-new" not in plan.file.value
    plan.show_config(with_changes(plan.config, {"zero.overlap_comm": False}))
    marked = [part for part in plan.file.value.split("<span") if 'class="qz3-new"' in part]
    assert len(marked) == 1
    assert "overlap_comm" in marked[0]
    plan.file_names.value = "command"
    assert "accelerate.commands.launch" in plan.file.value


def test_without_deepspeed_there_is_no_such_file(plan: PlanPanel) -> None:
    plan.file_names.value = "deepspeed.json"
    plan.show_config(with_changes(plan.config, {"zero.zero_stage": 0, "model.load_strategy": "replicated"}))
    assert tuple(plan.file_names.options) == ("accelerate.yaml", "command")
    assert plan.failures == ()


def test_a_machine_without_gpus_can_be_planned_for_too(plan: PlanPanel) -> None:
    plan.where.value = HERE
    assert plan.plan is not None
    assert plan.plan.device == "cpu"
    assert plan._imagined.layout.display == "none"


def test_the_number_of_gpus_follows_the_configuration_until_another_is_imagined(plan: PlanPanel) -> None:
    plan.show_config(with_changes(plan.config, {"launch.num_processes": 16}))
    assert plan.num_gpus.value == 16
    plan.num_gpus.value = 4
    plan._sizes_later.flush()
    assert "Planned for 4 ranks; the configuration has 16" in plan.verdict.value
    plan.show_config(with_changes(plan.config, {"lora.r": 8}))
    assert plan.num_gpus.value == 4


def test_a_shape_that_is_not_known_is_read_when_asked(plan: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_changes(plan.config, {"model.name_or_path": "nobody/knows-this"})
    plan.show_config(config)
    assert "is not known yet" in plan.verdict.value
    assert plan.figure.value == ""
    read = threading.Event()
    monkeypatch.setattr(plan_panel, "can_be_known", lambda config: True)
    monkeypatch.setattr(plan_panel, "model_shape", lambda config: read.set())
    plan.show_config(config)
    assert plan.read_button.layout.display is None
    plan.read_button.click()
    assert read.wait(10)
    _join("qz3-shape")
    assert plan.failures == ()
    assert not plan.read_button.disabled


def test_a_shape_that_cannot_be_read_says_why(plan: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> None:
        raise ValueError("no such model here")

    monkeypatch.setattr(plan_panel, "model_shape", fail)
    plan.read_shape()
    _join("qz3-shape")
    assert "no such model here" in plan.error.value
    assert not plan.read_button.disabled


def test_what_is_chosen_is_remembered(plan: PlanPanel, tmp_path: Path) -> None:
    plan.gib.value, plan.num_gpus.value = 24, 3
    again = PlanPanel(preset("llama-3.1-405b"), runs_dir=tmp_path, machine=imagine(0, 0))
    again.restore(plan.state())
    assert again.state() == plan.state()
    again.restore({"where": "nowhere", "num_gpus": "many"})
    assert again.state() == plan.state()


def test_finished_runs_say_how_far_predictions_are_off(plan: PlanPanel) -> None:
    plan.learn()
    _join("qz3-learn")
    assert plan.failures == ()


@pytest.mark.parametrize("name", ["_make_plan", "_show"])
def test_each_handler_shows_its_fault(plan: PlanPanel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("provoked")

    monkeypatch.setattr(plan, name, fail)
    assert not plan.show_config(plan.config)
    assert not plan.choose_machine()
    assert not plan.apply({"lora.r": 8})
    plan.read_shape()
    _join("qz3-shape")
    assert plan.error.value.count("RuntimeError: provoked") >= 3


def test_a_file_that_cannot_be_shown_says_so(plan: PlanPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_panel.html, "file_text", lambda *args: 1 / 0)
    assert not plan.show_file()
    assert "ZeroDivisionError" in plan.error.value


def test_nothing_grows_when_plans_change(plan: PlanPanel) -> None:
    def change(number: int) -> None:
        plan.gib.value = 20 + number
        plan._sizes_later.flush()
        plan.gib.value = 80
        plan._sizes_later.flush()

    change(0)
    before = len(_instances)
    for number in range(5):
        change(number)
    assert len(_instances) <= before


def test_this_machines_gpus_are_named() -> None:
    view = PlanPanel(preset("llama-3.1-70b"), machine=imagine(2, 80 * GIB))
    assert view.where.options[0][0] == "This machine: 2 × 80.0 GiB"
    assert view.where.value == HERE


def _join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(20)
            assert not thread.is_alive()
