"""Takes the README's picture: the workbench in a real JupyterLab, a configuration being built beside its plan.

    python -m tests.ui.take_screenshot                    # writes notebooks/workbench.png
    python -m tests.ui.take_screenshot --more pictures    # and pictures of the first notebook's outputs; some minutes

The browser is Chromium, as for the tests (QZ3_CHROMIUM names another program).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from tests.conftest import REPOSITORY
from tests.ui.lab import BROWSER_ARGS, Notebook, running_lab

NOTEBOOK = REPOSITORY / "notebooks" / "00_start_here.ipynb"
PICTURE = REPOSITORY / "notebooks" / "workbench.png"
CELL = "from qz3_widgets import Workbench\n\nWorkbench('llama-3.1-405b')"
_WIDTH, _HEIGHT, _SCALE = 1280, 1080, 2
_LATE = 4  # the step from which on the curves have something to show
_RUN_MS = 600_000


def main() -> None:
    """Take the picture, and on demand those of the first notebook."""
    parser = argparse.ArgumentParser(description="The README's picture.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--more", type=Path, help="a folder for pictures of every output of the first notebook")
    chosen = parser.parse_args()
    browser_program = os.environ.get("QZ3_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        root = Path(name) / "notebooks"
        root.mkdir()
        shutil.copy(NOTEBOOK, root)
        with running_lab(Path(name) / "server", root) as lab:
            browser = playwright.chromium.launch(executable_path=browser_program, args=BROWSER_ARGS)
            size = {"width": _WIDTH, "height": _HEIGHT}
            page = browser.new_page(viewport=size, device_scale_factor=_SCALE)
            page.set_default_timeout(_RUN_MS)
            the_workbench(Notebook(page, lab, "workbench.ipynb", [CELL]), chosen.output)
            if chosen.more:
                chosen.more.mkdir(parents=True, exist_ok=True)
                lab.end_sessions()
                the_first_notebook(Notebook(page, lab, NOTEBOOK.name), chosen.more)
            browser.close()


def the_workbench(notebook: Notebook, output: Path) -> None:
    """A few fields changed, and the plan that follows."""
    page = notebook.page
    notebook.hide_side_bars()
    notebook.run_all()
    for path, value in (("lora.r", "64"), ("training.gradient_accumulation_steps", "8")):
        control = page.locator(f".qz3-field-{path.replace('.', '-')} input")
        control.fill(value)
        expect(page.locator(f".qz3-field-{path.replace('.', '-')}")).to_contain_text("preset")
    page.get_by_role("button", name="deepspeed.json").click()
    expect(page.locator("pre.qz3-file")).to_contain_text("zero_optimization")
    page.locator(".qz3-section-quantization .jupyter-widget-Collapse-header").click()
    show(page, ".jp-Cell:has(.qz3-workbench)", above=4)
    if errors := notebook.errors():
        raise SystemExit("\n".join(errors))
    save(page, output)


def the_first_notebook(notebook: Notebook, folder: Path) -> None:
    """Its live view while a run is under way, and every output."""
    page = notebook.page
    notebook.start_all()
    while_it_runs(page, folder / "live.png")
    notebook.set_theme("JupyterLab Dark")
    save(page, folder / "live-dark.png")
    notebook.set_theme("JupyterLab Light")
    notebook.wait_for_cells(_RUN_MS / 1000)
    if errors := notebook.errors():
        raise SystemExit("\n".join(errors))
    every_output(notebook, folder)


def while_it_runs(page: Page, output: Path) -> None:
    """The first run's view, once its curves show something, from the line that opened it."""
    view = page.locator(".qz3-live").first
    late = rf"Step [{_LATE}-9] of"
    page.wait_for_function(
        "text => new RegExp(text).test(document.querySelector('.qz3-live-step')?.textContent)", arg=late
    )
    # The loss is drawn after the step is told.
    expect(view.locator(".qz3-live-loss svg.qz3-svg")).to_be_visible(timeout=_RUN_MS)
    page.wait_for_function(
        r"""late => Number(document.querySelector('.qz3-live-loss svg').getAttribute('aria-label')
               .match(/in (\d+) steps/)?.[1]) >= late""",
        arg=_LATE,
    )
    show(page, ".jp-Cell:has(.qz3-live)", above=4)
    save(page, output)


def every_output(notebook: Notebook, folder: Path) -> None:
    """All outputs, one picture each, and the whole notebook in other themes and widths."""
    page = notebook.page
    for width, theme in ((1280, "Light"), (1280, "Dark"), (900, "Light")):
        page.set_viewport_size({"width": width, "height": _HEIGHT})
        notebook.set_theme(f"JupyterLab {theme}")
        for i, cell in enumerate(page.locator(".jp-Cell:has(.jp-OutputArea-output)").all()):
            cell.scroll_into_view_if_needed()
            cell.screenshot(path=folder / f"{width}-{theme.lower()}-{i:02d}.png")


def show(page: Page, selector: str, *, above: int) -> None:
    """Scroll the notebook so that an element begins ``above`` pixels below its upper edge."""
    page.evaluate(
        """([selector, above]) => {
          const cell = document.querySelector(selector);
          const window = cell.closest('.jp-WindowedPanel-outer') ?? cell.closest('.jp-Notebook');
          window.scrollTop += cell.getBoundingClientRect().top - window.getBoundingClientRect().top - above;
        }""",
        [selector, above],
    )


def save(page: Page, path: Path) -> None:
    """Write what the window shows, in few colours: it is a drawing, and the repository keeps it."""
    page.evaluate("() => document.fonts.ready.then(() => null)")
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
