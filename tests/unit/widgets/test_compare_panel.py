from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.plotting import plot_loss
from qz3_widgets.runs.store import Run
from qz3_widgets.widgets import compare_panel
from qz3_widgets.widgets.compare_panel import ComparePanel
from qz3_widgets.widgets.panel import log_file
from tests.fake_runs import make_run
from tests.unit.widgets.conftest import text_of

BAD = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def runs(runs_dir: Path) -> list[Run]:
    stock = {"model": {"load_strategy": "stock"}}
    return [
        Run(make_run(runs_dir, run_id="sharded-r2-20260917-121314", num_steps=12)),
        Run(make_run(runs_dir, run_id="stock-r2-20260917-121315", num_steps=12, config=stock)),
    ]


@pytest.fixture
def panel(runs: list[Run], runs_dir: Path) -> ComparePanel:
    made = ComparePanel(runs, runs_dir=runs_dir)
    made.wait(60)
    return made


def test_only_what_differs_is_listed_and_the_better_is_marked(panel: ComparePanel) -> None:
    assert panel.failures == ()
    assert "Two runs side by side" in panel.title.value
    configuration = text_of(panel.configuration.value)
    assert "1 of 93 fields differ" in configuration
    assert "model.load_strategy auto stock" in configuration
    assert "✓ marks the better one" in text_of(panel.measures.value)
    assert "Same model, data and seed" in text_of(panel.sentence.value)
    assert panel.loss.value.count("<svg") == 1
    assert panel.memory.value.count("<svg") == 1


def test_curves_are_drawn_by_what_is_chosen(panel: ComparePanel) -> None:
    before = panel.loss.value, panel.memory.value
    seen = {before}
    for loss, memory in (("tokens", "step"), ("time", "time")):
        panel.loss_by.value, panel.memory_by.value = loss, memory
        assert f"Memory by {memory}" in panel.memory.value
        seen.add((panel.loss.value, panel.memory.value))
    assert len({first for first, _ in seen}) == len({second for _, second in seen}) == 3
    assert panel.failures == ()


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_runs_say_how_to_choose(panel: ComparePanel, runs: list[Run], number: int) -> None:
    panel.show_runs(runs[:number])
    assert "Choose two runs or more" in panel.empty.value
    assert panel.body.layout.display == panel.head.layout.display == "none"


def test_many_runs_are_compared(panel: ComparePanel, runs: list[Run], runs_dir: Path) -> None:
    more = [Run(make_run(runs_dir, run_id=f"more-{number}", num_steps=6, seed=number)) for number in range(4)]
    panel.show_runs([*runs, *more])
    panel.wait(60)
    assert "6 runs side by side" in panel.title.value
    assert panel.failures == ()


def test_a_failed_and_an_unfinished_run_are_compared(panel: ComparePanel, runs: list[Run], runs_dir: Path) -> None:
    failed = Run(make_run(runs_dir, run_id="failed-1", state="failed", fail_phase="load"))
    running = Run(make_run(runs_dir, run_id="running-1", state="running"))
    panel.show_runs([runs[0], failed, running])
    panel.wait(60)
    assert panel.failures == ()
    assert "failed" in text_of(panel.measures.value)


def test_a_run_that_was_deleted_is_named(panel: ComparePanel, runs: list[Run]) -> None:
    shutil.rmtree(runs[1].layout.root)
    panel.refresh()
    panel.wait(60)
    assert "stock-r2-20260917-121315 was deleted" in panel.error.value
    panel.show_runs([runs[0]])
    assert "Choose two" in panel.empty.value


def test_the_last_choice_wins(panel: ComparePanel, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    read, others = compare_panel._read_runs, iter(([runs[1], runs[0]],))

    def read_slowly(chosen: list[Run]) -> object:
        for other in others:  # meanwhile, another choice
            panel.show_runs(other)
        return read(chosen)

    monkeypatch.setattr(compare_panel, "_read_runs", read_slowly)
    panel.show_runs(runs)
    panel.wait(60)
    assert panel._thread is None
    assert panel._read is not None
    assert [run.run_id for run in panel._read.runs] == [runs[1].run_id, runs[0].run_id]


def test_it_is_exported_and_never_over_something_else(panel: ComparePanel, runs_dir: Path) -> None:
    panel.html_button.click()
    panel.html_button.click()
    panel.notebook_button.click()
    panel.figures_button.click()
    assert panel.failures == ()
    names = sorted(path.name for path in (runs_dir / "exports").iterdir())
    stem = "sharded-r2-and-stock-r2"
    assert f"{stem}.html" in names
    assert f"{stem}-2.html" in names
    assert f"{stem}.ipynb" in names
    assert {f"{stem}-{figure}{kind}" for figure in ("loss", "memory") for kind in (".svg", ".png", ".csv")} <= set(
        names
    )
    assert "Written: 6 files in" in text_of(panel.said.value)
    assert f"{stem}-loss .svg, .png, .csv" in text_of(panel.said.value)
    notebook = json.loads((runs_dir / "exports" / f"{stem}.ipynb").read_text())
    code = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert "./../sharded-r2-20260917-121314" in code
    assert str(runs_dir) not in code


def test_the_name_of_an_export_is_typed(panel: ComparePanel, runs_dir: Path) -> None:
    exports = (runs_dir / "exports").resolve()
    for typed, name in (("mine.html", "mine.html"), ("mine", "mine-2.html"), ("../../out <b>", "out-b.html")):
        panel.name.value = typed
        panel.html_button.click()
        assert (exports / name).is_file(), typed
        assert f"{name}</code>" in panel.said.value
    assert {path.parent.resolve() for path in exports.rglob("*.html")} == {exports}


def test_figures_are_not_saved_before_there_are_any(panel: ComparePanel) -> None:
    panel._read = None
    assert not panel.save_figures()
    assert "not read yet" in panel.error.value


def test_a_panel_closed_while_it_reads_shows_nothing_more(
    panel: ComparePanel, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = compare_panel._read_runs
    before = panel.title.value

    def close_and_read(chosen: list[Run]) -> object:
        panel.close()
        return read(chosen)

    monkeypatch.setattr(compare_panel, "_read_runs", close_and_read)
    panel.show_runs(runs[::-1])
    panel.wait(60)
    assert panel._thread is None
    assert panel.title.value != before
    assert "reading" in panel.title.value


def test_expected_is_shown_against_measured(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_run(runs_dir, run_id="a-1", num_steps=4))
    other = Run(make_run(runs_dir, run_id="b-1", num_steps=4))
    view = plot_loss(run)
    monkeypatch.setattr(compare_panel, "_truths", lambda read: {"b-1": view})
    panel = ComparePanel([run, other], runs_dir=runs_dir)
    panel.wait(60)
    assert "Expected against measured" in panel.truth.value
    assert panel.truth.value.count("<svg") == 1
    assert "qz3-run-2" in panel.truth.value  # the colour of its place


def test_text_of_runs_is_escaped(panel: ComparePanel, runs: list[Run], runs_dir: Path) -> None:
    bad = Run(make_run(runs_dir, run_id="bad-1", num_steps=4, config={"data": {"source": BAD}}))
    panel.show_runs([runs[0], bad])
    panel.wait(60)
    regions = (panel.configuration, panel.measures, panel.sentence, panel.loss, panel.memory, panel.title)
    assert "<img" not in "".join(region.value for region in regions)
    assert "&lt;img" in panel.configuration.value
    named = Run(make_run(runs_dir, run_id="c-1", num_steps=4, state="failed").rename(runs_dir / BAD))
    (named.layout.run_yaml).write_text("{")  # its name can't be read: it is called by its directory
    panel.show_runs([runs[0], named])
    panel.wait(60)
    regions = (*regions, panel.loss_head, panel.memory_head, panel.time, panel.truth, panel.said, panel.error)
    assert "<img" not in "".join(region.value for region in regions)
    assert "&lt;img" in panel.measures.value
    shutil.rmtree(named.layout.root)
    panel.refresh()
    panel.wait(60)
    assert "was deleted" in panel.error.value
    assert "<img" not in panel.error.value


def test_each_handler_shows_its_fault(panel: ComparePanel, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    names = ("export_html", "export_notebook", "keep_figures", "plot_loss", "compare_memory", "plot_time", "_truths")
    for name in names:
        monkeypatch.setattr(compare_panel, name, fail)
    monkeypatch.setattr(compare_panel, "_is_timed", lambda read: True)
    for attempt in (
        panel.export_report,
        panel.export_as_notebook,
        panel.save_figures,
        panel.draw_loss,
        panel.draw_memory,
    ):
        assert attempt() is False
    panel.refresh()
    panel.wait(60)
    assert "side by side</h3>" in panel.title.value  # tables without figures are better than nothing
    assert {"draw the time of a step", "draw what was expected"} < set(panel.failures)
    monkeypatch.setattr(compare_panel, "_read_runs", fail)
    panel.refresh()
    panel.wait(60)
    assert "not read" in panel.title.value
    assert len(panel.failures) == 8
    logged = log_file().read_text()
    assert all(f"compare: could not {doing}" in logged for doing in panel.failures)
    monkeypatch.undo()
    panel.refresh()
    panel.wait(60)
    left = {"export the report", "export the notebook", "save the figures"}
    assert set(panel.failures) == left


def test_nothing_grows_when_other_runs_are_shown(panel: ComparePanel, runs: list[Run]) -> None:
    before = len(_instances)
    for _ in range(3):
        panel.show_runs(runs[::-1])
        panel.wait(60)
        panel.show_runs([])
    assert len(_instances) == before
