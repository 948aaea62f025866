"""A real run of two ranks goes on while the kernel that started it is restarted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from qz3_widgets.runs.store import list_runs
from tests.ui.conftest import Open
from tests.ui.test_live_view import step_of

pytestmark = [pytest.mark.ui, pytest.mark.integration]

_START = """
from qz3_widgets import RunConfig, make_plan, start, with_changes

config = with_changes(RunConfig(), {{
    "name": "restarted", "model.name_or_path": "random:tiny-llama", "lora.r": 4, "data.source": {data!r},
    "data.max_length": 32, "data.eval_fraction": 0.0, "training.max_steps": 150, "launch.device": "cpu",
}})
run = start(make_plan(config), runs_dir={runs_dir!r})
"""


def test_the_run_goes_on_and_a_new_kernel_shows_it(open_notebook: Open, page: Page, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Text number {i}, to learn from."}) + "\n" for i in range(64)))
    runs_dir = tmp_path / "runs"
    notebook = open_notebook(
        _START.format(data=str(data), runs_dir=str(runs_dir)),
        f"import qz3_widgets as qz3\nlive = qz3.watch('latest', runs_dir={str(runs_dir)!r})\nlive",
        "assert live.wait(120).state == 'succeeded'",
    )
    notebook.run_cell(0)
    notebook.run_cell(1)
    step = page.locator(".qz3-live-step")
    expect(step).to_contain_text("of 150", timeout=120_000)
    [run] = list_runs(runs_dir)

    notebook.restart_kernel()
    assert run.state == "running"
    before = step_of(page)
    notebook.run_cell(1)
    # Only the new kernel can read on: the old view stands still.
    page.wait_for_function(
        r"before => Number(document.querySelector('.qz3-live-step')?.textContent.match(/\d+/)?.[0]) > before",
        arg=before,
    )
    expect(page.locator(".qz3-live")).to_have_count(1)
    expect(page.locator(".qz3-live-head")).to_contain_text("● running")
    expect(page.locator(".qz3-live-memory svg.qz3-svg")).to_have_count(1)
    notebook.run_cell(2)
    expect(page.locator(".qz3-live-head")).to_contain_text("✓ succeeded", timeout=120_000)
    assert step_of(page) == 150
    assert run.status.exit_code == 0
    # Memory, loss, and where the time of a step goes.
    expect(page.locator(".qz3-live svg.qz3-svg")).to_have_count(3)
