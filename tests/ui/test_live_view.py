"""The live view in a real page: a made-up run goes on while a browser looks at it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.fake_runs import make_run
from tests.ui.conftest import Open
from tests.ui.running import RunningRun

pytestmark = pytest.mark.ui

# Milliseconds between changes of an element's text.
_CHANGES = """([selector, count]) => new Promise((resolve, reject) => {
  const read = () => document.querySelector(selector)?.textContent;
  const times = [performance.now()];
  let before = read();
  const timer = setInterval(() => {
    if (read() === before) return;
    before = read();
    times.push(performance.now());
    if (times.length > count + 1) { clearInterval(timer); resolve(times.slice(2).map((t, i) => t - times[i + 1])); }
  }, 20);
  setTimeout(() => { clearInterval(timer); reject(new Error(`${times.length - 1} changes of ${selector}`)); }, 30000);
})"""

# Every text in the view whose contrast with what is behind it is below 4.5 to 1: "text: ratio".
_UNREADABLE = """root => {
  const channels = text => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c; };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = channels(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || element.closest('style') || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = channels(element.closest('svg') ? style.fill : style.color);
    const [high, low] = [luminance(ink), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${text}: ${ratio.toFixed(1)}`);
  }
  return found;
}"""


def watch_cells(runs_dir: Path) -> list[str]:
    return ["import qz3_widgets as qz3", f"live = qz3.watch('latest', runs_dir={str(runs_dir)!r})\nlive"]


def step_of(page: Page) -> int:
    match = re.match(r"Step (\d+) of", page.locator(".qz3-live-step").text_content() or "")
    assert match is not None
    return int(match.group(1))


def svg_widths(page: Page) -> list[float]:
    return [svg.evaluate("e => e.getBoundingClientRect().width") for svg in page.locator(".qz3-live svg.qz3-svg").all()]


def test_it_follows_a_run_and_outlives_a_reload(open_notebook: Open, page: Page, tmp_path: Path) -> None:
    run = RunningRun(tmp_path)
    notebook = open_notebook(*watch_cells(tmp_path))
    with run.going_on(0.2):
        notebook.run_all()
        expect(page.locator(".qz3-live-head")).to_contain_text("● running")
        expect(page.locator(".qz3-live-progress [role=progressbar]")).to_have_attribute("aria-valuemax", "4000")
        expect(page.locator(".qz3-live-ranks tbody tr")).to_have_count(2)
        expect(page.locator(".qz3-live svg.qz3-svg")).to_have_count(2)
        assert min(svg_widths(page)) > 300
        gaps: list[float] = page.evaluate(_CHANGES, [".qz3-live-step", 5])
        # It lives; how often it changes on an idle machine is measured by live_cost.py, not by a test on a busy one.
        assert sorted(gaps)[2] < 10_000, gaps
        drawing = page.locator(".qz3-live-memory")
        before = drawing.inner_html()
        page.wait_for_function("html => document.querySelector('.qz3-live-memory').innerHTML !== html", arg=before)

        notebook.save()
        notebook.reload()
        expect(page.locator(".qz3-live-head")).to_contain_text("● running")
        expect(page.locator(".qz3-live svg.qz3-svg")).to_have_count(2)
        page.evaluate(_CHANGES, [".qz3-live-step", 2])
        assert notebook.errors() == []
    run.end("succeeded")
    expect(page.locator(".qz3-live-head")).to_contain_text("✓ succeeded")
    expect(page.locator(".qz3-live-cause")).to_contain_text("Succeeded")
    assert step_of(page) == run.step


def test_a_page_that_is_loaded_while_a_cell_waits(open_notebook: Open, page: Page, tmp_path: Path) -> None:
    # A kernel answers no page while a cell runs: the view comes back when the cell is over.
    run = RunningRun(tmp_path)
    notebook = open_notebook(*watch_cells(tmp_path), "live.wait().state")
    with run.going_on(0.2):
        notebook.start_all()
        expect(page.locator(".qz3-live-head")).to_contain_text("● running")
        page.evaluate(_CHANGES, [".qz3-live-step", 2])
        notebook.save()
        page.reload()
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady")
    run.end("succeeded")
    expect(page.locator(".qz3-live-head")).to_contain_text("✓ succeeded")
    assert step_of(page) == run.step


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_all_text_is_readable(open_notebook: Open, page: Page, tmp_path: Path, theme: str) -> None:
    make_run(tmp_path, run_id="failed-20260917-121314", state="failed", error="RuntimeError: boom")
    run = RunningRun(tmp_path, world_size=4, missing_ranks=(3,))
    run.append_step()
    notebook = open_notebook(*watch_cells(tmp_path), f"qz3.watch('failed', runs_dir={str(tmp_path)!r})")
    notebook.run_all()
    notebook.set_theme(theme)
    views = page.locator(".qz3-live")
    expect(views).to_have_count(2)
    expect(views.nth(1).locator(".qz3-live-cause [role=alert]")).to_contain_text("Rank 1 failed in step 12")
    for view in views.all():
        expect(view.locator("svg.qz3-svg")).to_have_count(2)
        view.locator(".jupyter-widget-Collapse-header").click()
        expect(view.locator(".qz3-live-log .qz3-log-lines")).to_contain_text("starting")
        assert view.evaluate(_UNREADABLE) == []


@pytest.mark.parametrize("width", [900, 1280])
def test_it_fits_its_window(open_notebook: Open, page: Page, tmp_path: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    make_run(tmp_path, run_id=f"{'a-long-name-' * 4}20260917-121314", world_size=8)
    notebook = open_notebook(*watch_cells(tmp_path))
    notebook.hide_side_bars()
    notebook.run_all()
    expect(page.locator(".qz3-live svg.qz3-svg")).to_have_count(2)
    view: dict[str, Any] = page.locator(".qz3-live").evaluate(
        """root => ({
          too_wide: [...root.querySelectorAll('.qz3-card, svg.qz3-svg, .qz3-note')].filter(
            e => e.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).length,
          overflow: root.scrollWidth - root.clientWidth,
          loss: root.querySelector('.qz3-live-loss').getBoundingClientRect(),
          ranks: root.querySelector('.qz3-live-ranks').getBoundingClientRect(),
        })"""
    )
    assert view["too_wide"] == 0
    assert view["overflow"] <= 1
    below = view["ranks"]["y"] >= view["loss"]["y"] + view["loss"]["height"]
    assert below == (width == 900)
