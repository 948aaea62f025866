"""Takes the README's picture: the first notebook, executed in a real JupyterLab, while its first run is under way.

    python -m tests.ui.take_screenshot                    # writes notebooks/start_here.png; some minutes
    python -m tests.ui.take_screenshot --more pictures    # and a picture of each output, light, dark and narrow

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
PICTURE = REPOSITORY / "notebooks" / "start_here.png"
_WIDTH, _HEIGHT, _SCALE = 1280, 1080, 2
_LATE = 4  # the step from which on the curves have something to show
_RUN_MS = 600_000


def main() -> None:
    """Run the notebook, and write the pictures."""
    parser = argparse.ArgumentParser(description="The README's picture.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--more", type=Path, help="a folder for pictures of every output, to look at")
    chosen = parser.parse_args()
    if chosen.more:
        chosen.more.mkdir(parents=True, exist_ok=True)
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
            notebook = Notebook(page, lab, NOTEBOOK.name)
            notebook.hide_side_bars()
            notebook.start_all()
            while_it_runs(page, chosen.output)
            if chosen.more:
                save(page, chosen.more / "live.png")
                notebook.set_theme("JupyterLab Dark")
                save(page, chosen.more / "live-dark.png")
                notebook.set_theme("JupyterLab Light")
            notebook.wait_for_cells(_RUN_MS / 1000)
            if errors := notebook.errors():
                raise SystemExit("\n".join(errors))
            if chosen.more:
                every_output(notebook, chosen.more)
            browser.close()


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
