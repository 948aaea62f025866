from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.config.presets import preset
from qz3_widgets.plan.plan import Plan
from qz3_widgets.runs.store import Run, list_runs
from qz3_widgets.widgets import launch_panel, live, monitor_panel, runs_panel, workbench
from qz3_widgets.widgets.workbench import TABS, Workbench
from tests.fake_runs import make_run

Open = Callable[..., Workbench]


@pytest.fixture
def open_it(monkeypatch: pytest.MonkeyPatch, runs_dir: Path) -> Iterator[Open]:
    for module, name in (
        (monitor_panel, "_LOOK_SECONDS"),
        (runs_panel, "_LOOK_SECONDS"),
        (live, "POLL_SECONDS"),
        (workbench, "_TICK_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 3600.0)
    opened: list[Workbench] = []

    def opens(start: Any = None) -> Workbench:
        opened.append(Workbench(start, runs_dir=runs_dir))
        return opened[-1]

    yield opens
    for each in opened:
        each.close()
        each._thread.join(10)


def all_failures(bench: Workbench) -> list[str]:
    panels = (bench, bench.config, bench.plan, bench.launch, bench.monitor, bench.runs, bench.compare)
    return [failure for panel in panels for failure in panel.failures]


def test_a_change_in_the_form_changes_plan_files_and_launch(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    assert bench.plan.found is not None
    before = bench.plan.figure.value, bench.plan.found.fit.forecast.peak_bytes
    bench.config.choose("zero.release_gathered", False)
    assert bench.plan.found.fit.forecast.peak_bytes > before[1]
    assert bench.plan.figure.value != before[0]
    assert bench.verdict_line.value == bench.plan.verdict.value
    assert bench.launch.config == bench.config.config
    row = bench.config._rows["zero.release_gathered"]
    assert "Does not fit" in row.box.children[-1].children[0].value
    row.box.children[-1].children[1].click()
    assert bench.plan.found.fit.fits
    assert all_failures(bench) == []


def test_advice_and_all_fixes_go_to_the_form(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    bench.plan.advice.children[0].click()
    assert "training.per_device_train_batch_size" in bench.config.draft.changed
    bench.config.choose("quantization.bnb_4bit_quant_storage", "float32")
    bench.launch.fix_button.click()
    assert bench.config.config.quantization.bnb_4bit_quant_storage == "bfloat16"
    assert all_failures(bench) == []


def test_an_invalid_value_keeps_the_last_plan_dimmed(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    bench.config._rows["lora.r"].control.value = "lots"
    bench.config.settle()
    assert "qz3-plan-old" in bench.plan._dom_classes
    assert "1 field to mend" in bench.plan.limits.value
    assert bench.launch.launch_button.disabled
    bench.config._rows["lora.r"].control.value = "8"
    bench.config.settle()
    assert "qz3-plan-old" not in bench.plan._dom_classes
    assert "to mend" not in bench.plan.limits.value


def test_another_machine_brings_other_issues(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    assert bench.config.errors == ()
    bench.plan.gib.value = 24
    bench.plan._sizes_later.flush()
    assert any("Does not fit" in message for _, message in bench.config.errors)


def test_another_preset_is_planned_for_its_own_gpus(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    bench.config.preset.value = "llama-3.1-8b"
    assert (bench.plan.num_gpus.value, bench.plan.gib.value) == (2, 24)
    assert bench.launch.preset == "llama-3.1-8b"


def test_a_run_that_was_started_is_watched(open_it: Open, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_it("demo")
    monkeypatch.setattr(Plan, "raise_if_blocked", lambda self: None)
    monkeypatch.setattr(launch_panel.LaunchPanel, "_refuse_blocked", lambda self: None)

    def start(plan: Plan, *, runs_dir: Path, preset: str | None) -> Run:
        return Run(make_run(Path(runs_dir), run_id="demo-1", num_steps=2))

    monkeypatch.setattr(launch_panel, "start", start)
    bench.launch.launch()
    assert bench.monitor.run == Run(runs_dir / "demo-1")
    assert bench.tabs.selected_index == TABS.index("Monitor")
    assert all_failures(bench) == []


def test_runs_are_opened_and_compared(open_it: Open, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name, num_steps=4)
    bench = open_it()
    bench.runs.choose(list_runs(runs_dir))
    bench.compare.wait(60)
    assert "Two runs side by side" in bench.compare.title.value
    bench.runs.open_run("a-1")
    assert bench.monitor.run == Run(runs_dir / "a-1")
    assert bench.tabs.selected_index == TABS.index("Monitor")
    assert all_failures(bench) == []


def test_a_runs_configuration_is_taken_with_a_change(open_it: Open) -> None:
    bench = open_it()
    bench.take(preset("llama-3.1-70b"), {"lora.r": 64})
    assert bench.config.draft.changed == ("lora.r",)
    assert bench.config.config.name == "llama-3.1-70b-qlora"
    assert bench.tabs.selected_index == TABS.index("Configure")


def test_a_new_kernel_shows_what_was_open(open_it: Open, runs_dir: Path) -> None:
    for name in ("a-1", "b-1", "c-1"):
        make_run(runs_dir, run_id=name, num_steps=4)
    bench = open_it("llama-3.1-405b")
    bench.config._rows["lora.r"].control.value = "64"
    bench.config.settle()
    bench.plan.gib.value = 141
    bench.plan._sizes_later.flush()
    bench.monitor.show_run(Run(runs_dir / "a-1"))
    bench.runs.choose([Run(runs_dir / "c-1"), Run(runs_dir / "a-1")])
    bench.tabs.selected_index = TABS.index("Runs and compare")
    bench.close()
    again = open_it()
    assert again.config.draft.changed == ("lora.r",)
    assert again.config.preset.value == "llama-3.1-405b"
    assert again.plan.gib.value == 141
    assert again.monitor.run == Run(runs_dir / "a-1")
    assert [run.run_id for run in again.runs.chosen] == ["c-1", "a-1"]
    assert again.tabs.selected_index == TABS.index("Runs and compare")
    assert all_failures(again) == []


@pytest.mark.parametrize(
    "content",
    ["{", '{"version": 1, "draft": {"preset": "gone"}}', '{"version": 1, "tab": 99, "draft": 3, "chosen": 5}'],
)
def test_a_damaged_memory_is_no_obstacle(open_it: Open, runs_dir: Path, content: str) -> None:
    (runs_dir / ".workbench").mkdir()
    (runs_dir / ".workbench" / "state.json").write_text(content)
    bench = open_it()
    assert bench.config.config.name == "demo"
    assert bench.tabs.selected_index == 0


def test_what_was_asked_for_goes_before_what_was_remembered(open_it: Open) -> None:
    bench = open_it("llama-3.1-405b")
    bench.config.apply({"lora.r": 64})
    bench.close()
    assert open_it("demo").config.config == preset("demo")


def test_a_folder_that_cannot_be_written_is_said(open_it: Open, runs_dir: Path) -> None:
    (runs_dir / ".workbench").write_text("a file where the folder should be")
    bench = open_it()
    bench.config.apply({"lora.r": 64})
    bench._remembered.flush()
    bench.tick()
    assert "not remembered" in bench.queue_line.value


def test_secrets_are_not_remembered(open_it: Open, runs_dir: Path) -> None:
    bench = open_it()
    bench.config.apply({"data.source": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"})
    bench._remembered.flush()
    assert "hf_abcdefghijklmnop" not in (runs_dir / ".workbench" / "state.json").read_text()


def test_each_handler_shows_its_fault(open_it: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_it()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    monkeypatch.setattr(bench.monitor, "show_run", fail)
    monkeypatch.setattr(bench.compare, "show_runs", fail)
    monkeypatch.setattr(bench.config, "apply", fail)
    monkeypatch.setattr(bench.config, "load", fail)
    monkeypatch.setattr(bench.launch.queue_box, "refresh", fail)
    assert not bench.watch(Run(Path("x")))
    assert not bench.compare_runs([])
    assert not bench.apply({})
    assert not bench.take(preset("demo"), {})
    assert not bench.tick()
    assert len(bench.failures) == 5
    assert "RuntimeError: provoked" in bench.error.value


def test_state_is_plain(open_it: Open, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    json.dumps(open_it().state())


def test_a_new_one_takes_the_place_of_the_one_before(open_it: Open, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=2)
    open_it()
    open_it()
    before, threads = len(_instances), _threads()
    for _ in range(3):
        latest = open_it()
    assert len(_instances) <= before
    # Those of the ones before end at their next look.
    deadline = time.monotonic() + 30
    while _threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _threads() <= threads
    assert all_failures(latest) == []


def _threads() -> int:
    gc.collect()
    return sum(thread.name.startswith("qz3-") for thread in threading.enumerate())
