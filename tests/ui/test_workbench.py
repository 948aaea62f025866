"""The workbench as somebody uses it: in a real browser, on a real JupyterLab, with real runs of two ranks.

A picture of each state is kept below the folder that pytest's ``--output`` names (``test-results``).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from qz3_widgets.demo import demo_is_prepared, prepare_demo
from qz3_widgets.launch.process import stop
from qz3_widgets.launch.queue_runner import running_here
from qz3_widgets.runs.store import Run, list_runs
from tests.fake_runs import make_run
from tests.ui.conftest import Open
from tests.ui.lab import Notebook

pytestmark = pytest.mark.ui

_RUN_MS = 300_000  # a run's start may have to compile an operator, once on a machine
_STEPS = 400  # it is stopped long before
Picture = Callable[[Page, str], None]


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Picture:
    """Keeps what the window shows under a name."""
    folder = Path(request.config.getoption("--output")) / "workbench"

    def keep(page: Page, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png")

    return keep


@pytest.fixture
def real_runs(tmp_path: Path) -> Iterator[Path]:
    """A folder in which runs are started; none is left going on."""
    if not demo_is_prepared():
        prepare_demo()
    folder = tmp_path / "my runs"
    folder.mkdir()
    yield folder
    for run in running_here(folder):
        stop(run.layout.root, grace_seconds=1.0)
    shutil.rmtree(folder, ignore_errors=True)


def workbench(runs_dir: Path, start: str = "") -> str:
    return f"from qz3_widgets import Workbench\nWorkbench({start}, runs_dir={str(runs_dir)!r})".replace("(, ", "(")


def field(page: Page, path: str) -> Locator:
    """The row of a field."""
    return page.locator(f".qz3-field-{path.replace('.', '-')}")


def type_into(page: Page, path: str, text: str) -> None:
    """Type into a field, letter by letter as people do."""
    control = field(page, path).locator("input").first
    control.fill("")
    control.press_sequentially(text)
    expect(control).to_have_value(text)


def button(page: Page, name: str, *, inside: str = ".qz3-workbench") -> Locator:
    """The visible button of this name."""
    return page.locator(inside).get_by_role("button", name=name, exact=True).locator("visible=true").first


def open_tab(page: Page, name: str) -> None:
    """Show one of the workbench's tabs."""
    page.locator(".qz3-workbench > .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab", has_text=name).click()


def state_chip(page: Page, state: str) -> Locator:
    """The state of the run that is watched."""
    return page.locator(".qz3-monitor .qz3-live-head .qz3-chip", has_text=state)


def wait_for_step(page: Page, number: int) -> None:
    """Wait until the run that is watched has done so many steps."""
    page.wait_for_function(
        """number => Number(document.querySelector('.qz3-monitor .qz3-live-step')?.textContent
             .match(/Step (\\d+)/)?.[1] ?? 0) >= number""",
        arg=number,
        timeout=_RUN_MS,
    )


def test_the_whole_way(open_notebook: Open, real_runs: Path, picture: Picture) -> None:
    """Build a configuration, mend it, launch, watch, lose the kernel, find the run again, stop, compare, export."""
    notebook = open_notebook(workbench(real_runs, "'demo'"))
    page = notebook.page
    notebook.hide_side_bars()
    notebook.run_all()
    expect(page.locator(".qz3-workbench")).to_be_visible()
    build_a_configuration(page, picture)
    launch_and_watch(page, picture)
    (first,) = list_runs(real_runs)
    lose_the_kernel(notebook, page, first, workbench(real_runs), picture)
    stop_the_run(page, first, picture)
    launch_a_short_one(page, real_runs, picture)
    compare_and_export(page, real_runs, picture)


def build_a_configuration(page: Page, picture: Picture) -> None:
    type_into(page, "name", "journey")
    type_into(page, "training.max_steps", str(_STEPS))
    type_into(page, "training.per_device_train_batch_size", "2")
    # A value that no configuration can hold stands at its field; the plan stays as it was.
    plan = page.locator(".qz3-region-figure svg")
    before = plan.get_attribute("aria-label")
    type_into(page, "lora.r", "many")
    wrong = field(page, "lora.r").locator(".qz3-trouble-error")
    expect(wrong).to_contain_text("must be a whole number from 1 to 1024")
    expect(button(page, "Launch")).to_be_disabled()
    picture(page, "1-error-at-its-field")
    type_into(page, "lora.r", "64")
    expect(wrong).to_have_count(0)
    # The plan follows: a larger adapter takes more.
    expect(plan).not_to_have_attribute("aria-label", before or "")
    expect(field(page, "lora.r")).to_contain_text("preset 8")
    # A rule across fields has a button that mends it.
    field(page, "quantization.bnb_4bit_quant_storage").locator("select").select_option("uint8")
    trouble = field(page, "quantization.bnb_4bit_quant_storage").locator(".qz3-trouble")
    expect(trouble).to_be_visible()
    picture(page, "2-issue-with-its-fix")
    expect(trouble).to_contain_text("is uint8")
    trouble.get_by_role("button").click()
    expect(page.get_by_text("is uint8, and")).to_have_count(0)  # what else may be said of it on this machine stays
    # What else this machine wants (a CPU without fast bfloat16, say) is applied at once.
    fix_all = button(page, "Apply all fixes")
    if fix_all.count():
        fix_all.click()
    expect(button(page, "Launch")).to_be_enabled()
    expect(page.locator(".qz3-launch-status").locator("visible=true")).to_contain_text("Ready to start")
    picture(page, "3-ready-to-start")


def launch_and_watch(page: Page, picture: Picture) -> None:
    button(page, "Launch").click()
    expect(state_chip(page, "running")).to_be_visible()
    picture(page, "4-starting")
    wait_for_step(page, 2)
    expect(page.locator(".qz3-live-loss svg.qz3-svg")).to_be_visible()
    ranks = page.locator(".qz3-live-ranks tbody tr")
    expect(ranks).to_have_count(2)
    for rank in (0, 1):
        # Both ranks' memory moves.
        now = ranks.nth(rank).locator("td").nth(1)
        before = now.text_content() or ""
        assert re.fullmatch(r"[\d.]+ MiB", before)
        expect(now).not_to_have_text(before)
    expect(page.locator(".qz3-badge-ok", has_text="ZeRO-3 is on")).to_be_visible()
    expect(page.locator(".qz3-badge-ok", has_text="4-bit is on")).to_be_visible()
    expect(page.locator(".qz3-log-lines")).to_contain_text("step 1 of")
    picture(page, "5-watched")


def lose_the_kernel(notebook: Notebook, page: Page, run: Run, again: str, picture: Picture) -> None:
    notebook.restart_kernel()
    assert run.status.state == "running"
    # Nothing is named: the workbench comes back to what was open.
    page.evaluate(
        """source => window.jupyterapp.shell.currentWidget.content.model.cells.get(0).sharedModel.setSource(source)""",
        again,
    )
    notebook.run_all()
    expect(state_chip(page, "running")).to_be_visible()
    expect(page.locator(".qz3-monitor .qz3-live-title strong")).to_have_text(run.run_id)
    picture(page, "6-found-again")
    notebook.save()
    notebook.reload()
    notebook.hide_side_bars()
    expect(state_chip(page, "running")).to_be_visible()
    expect(page.locator(".qz3-monitor .qz3-live-title strong")).to_have_text(run.run_id)


def stop_the_run(page: Page, run: Run, picture: Picture) -> None:
    button(page, "Stop", inside=".qz3-monitor").click()
    expect(page.get_by_text("Stop this run?")).to_be_visible()
    button(page, "Stop", inside=".qz3-monitor").click()
    expect(state_chip(page, "cancelled")).to_be_visible()
    expect(page.locator(".qz3-monitor .qz3-region-said")).to_contain_text("What it recorded stays")
    assert run.status.state == "cancelled"
    picture(page, "7-stopped")


def launch_a_short_one(page: Page, runs_dir: Path, picture: Picture) -> None:
    open_tab(page, "Configure")
    expect(field(page, "lora.r").locator("input").first).to_have_value("64")  # as it was before the kernel was lost
    type_into(page, "name", "short")
    type_into(page, "training.max_steps", "3")
    field(page, "training.eval_on_start").locator("input").uncheck()
    expect(page.locator(".qz3-launch-status").locator("visible=true")).to_contain_text("Ready to start")
    button(page, "Launch").click()
    expect(page.locator(".qz3-monitor .qz3-live-title strong")).to_have_text(re.compile("^short-"))
    expect(state_chip(page, "succeeded")).to_be_visible(timeout=_RUN_MS)
    assert {run.state for run in list_runs(runs_dir)} == {"cancelled", "succeeded"}
    picture(page, "8-succeeded")


def compare_and_export(page: Page, runs_dir: Path, picture: Picture) -> None:
    open_tab(page, "Runs and compare")
    rows = page.locator(".qz3-runs-body .qz3-runs-row")
    expect(rows).to_have_count(2)
    for number in (0, 1):
        rows.nth(number).locator("input[type=checkbox]").check()
    compared = page.locator(".qz3-compare")
    expect(compared).to_contain_text("Two runs side by side")
    expect(compared).to_contain_text("training.max_steps")
    expect(compared.locator("svg.qz3-svg").first).to_be_visible()
    expect(compared.locator(".qz3-region-memory svg")).to_have_count(1)
    picture(page, "9-compared")
    button(page, "Export HTML", inside=".qz3-compare").click()
    expect(compared.locator(".qz3-region-said")).to_contain_text("Written:")
    (report,) = (runs_dir / "exports").glob("*.html")
    assert "2 runs compared" in report.read_text()


def test_runs_in_the_queue_are_reordered(open_notebook: Open, real_runs: Path, picture: Picture) -> None:
    """Two wait while nothing may start; their order is changed, and one is taken out."""
    notebook = open_notebook(
        f"from qz3_widgets import Queue, Workbench\nQueue({str(real_runs)!r}).pause()\n"
        f"Workbench('demo', runs_dir={str(real_runs)!r})"
    )
    page = notebook.page
    notebook.hide_side_bars()
    notebook.run_all()
    fix_all = button(page, "Apply all fixes")
    if fix_all.count():
        fix_all.click()
    for name in ("one", "two"):
        type_into(page, "name", name)
        expect(page.locator(".qz3-launch-status").locator("visible=true")).to_contain_text("Ready to start")
        button(page, "Queue").click()
        expect(page.locator(".qz3-queue-line")).to_contain_text(f"{1 if name == 'one' else 2} queued")
    open_tab(page, "Launch")
    rows = page.locator(".qz3-queue-rows .qz3-queue-row")
    expect(rows.nth(0)).to_contain_text("one")
    rows.nth(1).get_by_role("button", name="Up").click()
    expect(rows.nth(0)).to_contain_text("two")
    picture(page, "queue")
    rows.nth(0).get_by_role("button", name="Remove").click()
    expect(rows).to_have_count(1)
    expect(rows.nth(0)).to_contain_text("one")


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
@pytest.mark.parametrize("width", [1280, 900])
def test_nothing_overlaps_or_is_cut_off(
    open_notebook: Open, runs_dir: Path, picture: Picture, theme: str, width: int
) -> None:
    """In each tab, in both themes, wide and narrow: controls lie beside each other and within the workbench."""
    for number, state in enumerate(("succeeded", "failed", "succeeded")):
        make_run(runs_dir, run_id=f"made-up-{number}-20260917-12131{number}", state=state, num_steps=12, seed=number)
    notebook = open_notebook(workbench(runs_dir, "'llama-3.1-405b'"))
    page = notebook.page
    page.set_viewport_size({"width": width, "height": 1400})
    notebook.hide_side_bars()
    notebook.set_theme(theme)
    notebook.run_all()
    name = f"{width}-{'dark' if 'Dark' in theme else 'light'}"
    expect(page.locator(".qz3-workbench .qz3-region-figure svg")).to_be_visible()
    for tab in ("Configure", "Launch", "Monitor", "Runs and compare"):
        open_tab(page, tab)
        if tab == "Runs and compare":
            for number in (0, 1):
                page.locator(".qz3-runs-body input[type=checkbox]").nth(number).check()
            expect(page.locator(".qz3-compare .qz3-region-memory svg")).to_be_visible()
        picture(page, f"{name}-{tab.split()[0].lower()}")
        assert page.evaluate(_OVERLAPS) == [], tab


# Visible controls of the workbench that lie over each other, or stick out of it.
_OVERLAPS = """() => {
  const root = document.querySelector('.qz3-workbench');
  const edge = root.getBoundingClientRect();
  const shown = [...root.querySelectorAll('button, input, select, textarea')].filter(each => each.checkVisibility())
    .map(each => [each, each.getBoundingClientRect()]).filter(([, box]) => box.width > 2 && box.height > 2);
  const name = each => each.textContent.trim() || each.getAttribute('title') || each.placeholder || each.tagName;
  const found = shown.filter(([, box]) => box.right > edge.right + 1 || box.left < edge.left - 1)
    .map(([each]) => `${name(each)} sticks out`);
  shown.forEach(([a, x], i) => shown.slice(i + 1).forEach(([b, y]) => {
    const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (wide > 2 && high > 2 && !a.contains(b) && !b.contains(a)) found.push(`${name(a)} over ${name(b)}`);
  }));
  return found;
}"""
