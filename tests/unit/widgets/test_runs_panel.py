from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ipywidgets as widgets
import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.analysis.overview import RunRow
from qz3_widgets.runs.store import Run, list_runs
from qz3_widgets.units import GIB, MIB
from qz3_widgets.widgets import runs_panel
from qz3_widgets.widgets.panel import log_file
from qz3_widgets.widgets.runs_html import row_cells, short_names, size_unit
from qz3_widgets.widgets.runs_panel import ROWS_A_PAGE, RunsPanel
from tests.fake_runs import make_run
from tests.unit.launch.conftest import wait_for
from tests.unit.widgets.conftest import text_of

BAD = "<img src=x onerror=alert(1)>"
Make = Callable[..., RunsPanel]


@pytest.fixture(autouse=True)
def own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, runs_dir: Path) -> Iterator[Make]:
    nothing_by_itself(monkeypatch)
    panels: list[RunsPanel] = []

    def made(**arguments: object) -> RunsPanel:
        panels.append(RunsPanel(runs_dir, **arguments))
        while panels[-1].table.fill(60):
            pass
        panels[-1].look()
        return panels[-1]

    yield made
    for panel in panels:
        panel.close()
        panel._thread.join(10)
        assert not panel._thread.is_alive()


def nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_panel, "_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(runs_panel, "_FILL_PAUSE_SECONDS", 3600.0)


def shown(panel: RunsPanel) -> list[str]:
    return [line.name.description for line in panel.lines[: len(panel.body.children)]]


def test_the_table_tells_state_model_peak_loss_speed_and_time(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", num_steps=8)
    panel = make()
    assert shown(panel) == ["a-1"]
    row = text_of(panel.lines[0].cells.value)
    assert row.startswith("✓ succeeded SmolLM2-135M-Instruct ZeRO-3, sharded 319 ")
    assert panel.heads["peak_bytes"].description == "peak, MiB"
    assert " s" in row
    assert panel.empty.value == ""
    assert panel.failures == ()


def test_figures_that_are_not_known_yet_follow(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1")
    nothing_by_itself(monkeypatch)
    panel = RunsPanel(runs_dir)
    assert '<span class="qz3-muted">reading</span>' in panel.lines[0].cells.value
    panel.fill()
    panel.look()
    assert "reading" not in panel.lines[0].cells.value
    panel.close()


def test_it_looks_again_by_itself_until_it_is_closed(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_panel, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(runs_panel, "_FILL_PAUSE_SECONDS", 0.01)
    panel = RunsPanel(runs_dir)
    first = make_run(runs_dir, run_id="a-1")
    wait_for(lambda: panel.lines and "319" in panel.lines[0].cells.value)
    shutil.rmtree(first)
    wait_for(lambda: panel.body.layout.display != "none" and "No runs in" in panel.empty.value)
    panel.close()
    panel._thread.join(10)
    assert not panel._thread.is_alive()


def test_only_what_changed_travels(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name)
    panel = make()
    told: list[tuple[object, str]] = []
    notify = widgets.Widget.notify_change
    monkeypatch.setattr(
        widgets.Widget,
        "notify_change",
        lambda self, change: (told.append((self, change["name"])), notify(self, change)),
    )
    panel.look()
    assert told == []
    Run(runs_dir / "a-1").annotate(tags=["new"])
    panel.look()
    (changed,) = told
    assert changed[1] == "value"
    assert "new" in changed[0].value  # type: ignore[attr-defined]


def test_what_a_run_that_ended_does_not_have_is_none(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", state="failed", fail_phase="load")
    panel = make()
    assert text_of(panel.lines[0].cells.value).count("none") == 2  # neither loss nor tokens


def test_runs_are_told_apart_by_their_time_only_where_needed() -> None:
    again = "demo-20260917-121314", "demo-20260917-121315"
    assert short_names(("alone-20260917-121314", *again, "plain")) == {
        "alone-20260917-121314": "alone",
        **{run_id: run_id for run_id in again},
        "plain": "plain",
    }
    assert short_names(("demo", "demo-20260917-121314")) == {"demo": "demo", "demo-20260917-121314": again[0]}


def test_peaks_are_in_one_unit() -> None:
    rows = [
        RunRow(run_id="a", name="a", state="succeeded", created="", model="m", peak_bytes=size)
        for size in (300 * MIB, 10 * GIB)
    ]
    assert size_unit(rows) == "GiB"
    assert [text_of(row_cells(row, "GiB")).split()[3] for row in rows] == ["0.29", "10.0"]
    assert size_unit(rows[:1]) == "MiB"
    assert text_of(row_cells(rows[0], "MiB")).split()[3] == "300"


def test_without_runs_it_says_what_to_do(make: Make) -> None:
    panel = make()
    assert "No runs in" in panel.empty.value
    assert "qz3 demo" in panel.empty.value
    assert panel.grid.layout.display == "none"


def test_rows_are_filtered_and_sorted(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1", state="failed")
    make_run(runs_dir, run_id="b-1", num_steps=4)
    make_run(runs_dir, run_id="c-1", num_steps=20)
    panel = make()
    panel.heads["run_id"].click()
    assert shown(panel) == ["a-1", "b-1", "c-1"]
    assert panel.heads["run_id"].description == "run ▴"
    panel.heads["run_id"].click()
    assert shown(panel) == ["c-1", "b-1", "a-1"]
    panel.heads["run_id"].click()
    assert "▾" not in panel.heads["run_id"].description
    panel.heads["total_seconds"].click()
    assert shown(panel)[0] == "c-1"
    assert "largest first" in panel.heads["total_seconds"].tooltip
    panel.state.value = "failed"
    assert shown(panel) == ["a-1"]
    panel.state.value = "any state"
    panel.text.value = "b-1"
    panel._filtering.flush()
    assert shown(panel) == ["b-1"]
    panel.text.value = "nothing like it"
    panel._filtering.flush()
    assert "No run matches" in panel.empty.value


def test_chosen_runs_come_first_and_are_told(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1", "c-1"):
        make_run(runs_dir, run_id=name)
    told: list[list[str]] = []
    panel = make(on_compare=lambda runs: told.append([run.run_id for run in runs]))
    panel.heads["run_id"].click()
    panel.lines[2].tick.value = True
    assert shown(panel) == ["c-1", "a-1", "b-1"]
    assert panel.lines[0].tick.value is True
    assert panel.lines[2].tick.value is False
    panel.lines[1].tick.value = True
    assert told == [["c-1"], ["c-1", "a-1"]]
    assert "2 of 3 chosen" in panel.count.value
    assert "qz3-runs-chosen-2" in panel.lines[1].box._dom_classes
    panel.lines[0].tick.value = False
    assert told[-1] == ["a-1"]
    panel.text.value = "b-1"
    panel._filtering.flush()
    assert shown(panel) == ["a-1", "b-1"]  # what is chosen stays in sight


def test_a_run_is_opened_by_its_name_or_when_chosen(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1")
    opened: list[Run] = []
    panel = make(on_open=opened.append)
    panel.lines[0].name.click()
    panel.lines[0].tick.value = True
    panel.open_button.click()
    assert opened == [Run(runs_dir / "a-1")] * 2


def test_tags_and_notes_are_edited_in_place(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name)
    panel = make()
    panel.edit("tags")
    assert "choose a run first" in panel.error.value
    panel.choose(list_runs(runs_dir))
    panel.tag_button.click()
    panel.edit_text.value = " baseline, fits 32 GiB ,"
    panel.save_button.click()
    assert all(run.tags == ("baseline", "fits 32 GiB") for run in list_runs(runs_dir))
    assert "baseline, fits 32 GiB" in panel.lines[0].cells.value
    assert panel.edit_box.layout.display == "none"
    panel.notes_button.click()
    assert panel.edit_text.value == ""
    panel.cancel_button.click()
    assert list_runs(runs_dir)[0].notes == ""


def test_what_is_being_typed_stays_with_its_runs(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1", "c-1"):
        make_run(runs_dir, run_id=name)
    panel = make()
    panel.choose([Run(runs_dir / "a-1"), Run(runs_dir / "b-1")])
    panel.notes_button.click()
    assert panel.edit_text.description == "Notes of 2 runs (a-1, b-1)"
    panel.edit_text.value = "typed"
    panel.choose([Run(runs_dir / "c-1")])
    shutil.rmtree(runs_dir / "b-1")
    panel.look()
    assert panel.edit_text.value == "typed"
    assert panel.edit_box.layout.display is None
    panel.save_button.click()
    assert panel.failures == ()
    assert {run.run_id: run.notes for run in list_runs(runs_dir)} == {"a-1": "typed", "c-1": ""}


def test_tags_that_differ_are_not_lost_unseen(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        Run(make_run(runs_dir, run_id=name)).annotate(tags=[name])
    panel = make()
    panel.choose(list_runs(runs_dir))
    panel.tag_button.click()
    assert panel.edit_text.value == ""
    assert panel.edit_text.placeholder.startswith("they differ")


def test_chosen_runs_are_compared(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name, num_steps=4)
    told: list[Sequence[Run]] = []
    panel = make(on_compare=told.append)
    panel.lines[0].tick.value = True
    assert panel.compare_button.disabled
    assert not panel.compare_chosen()
    assert "choose two runs or more" in panel.error.value
    panel.lines[1].tick.value = True
    panel.compare_button.click()
    assert told[-1] == told[-2] == panel.chosen
    assert panel.failures == ()


def test_a_table_alone_compares_and_opens_nothing(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name, num_steps=4)
    panel = make()
    panel.choose(list_runs(runs_dir))
    assert panel.compared is None
    panel.compare_button.click()
    panel.compare_button.click()
    assert panel.compared is not None
    panel.compared.wait(60)
    assert "Two runs side by side" in panel.compared.title.value
    assert panel.open_button.layout.display == "none"
    assert panel.open_run("a-1")


def test_deleting_asks_and_leaves_what_goes_on(make: Make, runs_dir: Path) -> None:
    for name, state in (("a-1", "succeeded"), ("b-1", "running")):
        make_run(runs_dir, run_id=name, state=state)
    panel = make()
    panel.choose(list_runs(runs_dir))
    panel.delete_button.first.click()
    assert "Delete a-1, with logs" in panel.delete_button.question.value
    assert "b-1 is running and stays" in panel.delete_button.question.value
    panel.delete_button.no.click()
    assert (runs_dir / "a-1").is_dir()
    panel.delete_button.first.click()
    panel.delete_button.yes.click()
    assert not (runs_dir / "a-1").exists()
    assert (runs_dir / "b-1").is_dir()
    assert "b-1 is running: stop it before you delete it" in panel.error.value
    assert [run.run_id for run in panel.chosen] == ["b-1"]
    assert "b-1 is running and stays: stop first" in panel.delete_button.question.value


def test_the_question_names_how_many_and_which(make: Make, runs_dir: Path) -> None:
    for number in range(5):
        make_run(runs_dir, run_id=f"r-{number}", num_steps=1)
    panel = make()
    panel.choose([Run(runs_dir / f"r-{number}") for number in range(5)])
    assert "Delete 5 runs (r-0, r-1, r-2 and 2 more)" in panel.delete_button.question.value
    panel.delete_button.first.click()
    panel.choose([])
    assert panel.delete_button.children == (panel.delete_button.first,)
    panel.choose([Run(runs_dir / "r-0")])
    shutil.rmtree(runs_dir / "r-0")
    assert panel.delete_chosen()  # somebody else was faster
    assert panel.failures == ()


def test_a_delete_never_follows_a_link_out(make: Make, runs_dir: Path, tmp_path: Path) -> None:
    outside = make_run(tmp_path, run_id="outside-1")
    (runs_dir / "linked-1").symlink_to(outside, target_is_directory=True)
    inside = make_run(runs_dir, run_id="a-1")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    (inside / "checkpoints").symlink_to(precious, target_is_directory=True)
    panel = make()
    panel.choose(list_runs(runs_dir))
    panel.delete_chosen()
    assert "linked-1 is a link to" in panel.error.value
    assert (outside / "status.json").is_file()
    assert not inside.exists()
    assert (precious / "file").read_text() == "keep"


def test_a_run_that_vanished_is_chosen_no_more(make: Make, runs_dir: Path) -> None:
    for name in ("a-1", "b-1"):
        make_run(runs_dir, run_id=name)
    told: list[Sequence[Run]] = []
    panel = make(on_compare=told.append)
    panel.choose(list_runs(runs_dir))
    shutil.rmtree(runs_dir / "a-1")
    panel.look()
    assert [run.run_id for run in panel.chosen] == ["b-1"]
    assert len(told[-1]) == 1
    assert panel.failures == ()


def test_many_runs_are_shown_in_pages(make: Make, runs_dir: Path) -> None:
    first = make_run(runs_dir, run_id="r-000", num_steps=1)
    for number in range(1, 60):
        shutil.copytree(first, runs_dir / f"r-{number:03d}")
    panel = make()
    panel.heads["run_id"].click()
    assert len(panel.body.children) == ROWS_A_PAGE
    assert panel.place.value == "1 to 25 of 60"
    panel.forward.click()
    panel.forward.click()
    assert shown(panel)[0] == "r-050"
    assert panel.forward.disabled
    before = len(_instances)
    for _ in range(10):
        panel.back.click()
        panel.forward.click()
        panel.heads["run_id"].click()
    assert len(_instances) == before


def test_text_of_runs_is_escaped(make: Make, runs_dir: Path) -> None:
    run = Run(make_run(runs_dir, run_id="a-1", config={"model": {"name_or_path": f"x{BAD}"}}))
    run.annotate(tags=[BAD], notes=f'"{BAD}')
    broken = make_run(runs_dir, run_id="b-1")
    (broken / "run.yaml").write_text(f"model: {BAD}: {BAD}")
    make_run(runs_dir, run_id="c-1").rename(runs_dir / BAD)
    panel = make()
    assert BAD in shown(panel)  # a button's text is no HTML
    panel.choose([Run(runs_dir / BAD)])
    assert "<img" not in panel.delete_button.question.value
    html = "".join(line.cells.value for line in panel.lines)
    assert "<img" not in html
    assert "&lt;img" in html
    assert 'title="&quot;' in html


def test_two_tables_do_not_disturb_each_other(make: Make, runs_dir: Path) -> None:
    make_run(runs_dir, run_id="a-1")
    one, other = make(), make()
    one.lines[0].tick.value = True
    one.delete_chosen()
    other.lines[0].tick.value = True
    other.look()
    assert other.grid.layout.display == "none"
    assert "No runs in" in other.empty.value
    assert other.failures == ()


def test_a_folder_that_is_none_is_told(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_by_itself(monkeypatch)
    file = runs_dir / "a file"
    file.write_text("")
    panel = RunsPanel(file)
    assert "can&#x27;t be read as a folder of runs" in panel.error.value
    panel.close()


def test_each_handler_shows_its_fault(make: Make, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, run_id="a-1")
    panel = make(on_open=lambda run: 1 / 0)
    panel.lines[0].tick.value = True

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    assert not panel.open_run("a-1")
    assert not panel.open_chosen()
    monkeypatch.setattr(panel, "_show", fail)
    monkeypatch.setattr(panel.table, "fill", fail)
    monkeypatch.setattr(Run, "annotate", fail)
    monkeypatch.setattr(runs_panel, "listed", fail)
    monkeypatch.setattr(runs_panel, "ComparePanel", fail)
    monkeypatch.setattr(panel, "_chosen", ["a-1", "b-1"])
    attempts = {
        "look at the runs": panel.look,
        "work out the figures": panel.fill,
        "show the runs": panel.show_rows,
        "sort the runs": lambda: panel.sort("run_id"),
        "turn the page": lambda: panel.turn(1),
        "edit tags and notes": lambda: panel.edit("tags"),
        "compare the runs": panel.compare_chosen,
        "delete the runs": panel.delete_chosen,
        "choose the runs": lambda: panel.choose([]),
    }
    panel._edited = ("a-1",)
    panel.save_edit()
    for doing, attempt in attempts.items():
        assert attempt() is False, doing
    assert set(attempts) | {"open the run", "save tags and notes"} <= set(panel.failures)
    logged = log_file().read_text()
    assert all(f"runs: could not {doing}" in logged for doing in panel.failures)
