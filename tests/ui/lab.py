"""A real JupyterLab, and what a test does with a notebook in it. All waits are for conditions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Page

from tests.conftest import REPOSITORY

SERVER_CONFIG = Path(__file__).parent / "jupyter_server_config.py"
BROWSER_ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
_START_SECONDS = 90
_SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Without this, cells outside the window are not in the page.
    "notebook-extension/tracker": {"windowingMode": "none"},
    # A test's notebook is thrown away: no time is spent on saving it.
    "docmanager-extension/plugin": {"autosave": False},
}
_CELLS = """() => {
  const model = window.jupyterapp.shell.currentWidget.content.model;
  return [...Array(model.cells.length).keys()].map(i => model.cells.get(i)).filter(cell => cell.type === 'code')
    .map(cell => ({ count: cell.executionCount, outputs: cell.outputs.toJSON() }));
}"""


@dataclass(frozen=True)
class Lab:
    """A running server."""

    url: str
    root: Path

    def api(self, method: str, path: str) -> Any:
        """One call of the server's own interface."""
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def end_sessions(self) -> None:
        """Kernels outlive their pages: end them, so that the next test starts without."""
        for session in self.api("GET", "sessions"):
            self.api("DELETE", f"sessions/{session['id']}")


@contextmanager
def running_lab(folder: Path, root: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Lab]:
    """A server on the notebooks in ``root``; its settings, run time files and log lie in ``folder``."""
    for name in ("config", "runtime", "ipython", "data", "settings", "tmp"):
        (folder / name).mkdir(parents=True)
    for plugin, content in _SETTINGS.items():
        package, name = plugin.split("/")
        file = folder / "settings" / "@jupyterlab" / package / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    port = _free_port()
    log = folder / "lab.log"
    command = [sys.executable, "-m", "jupyter", "lab", "--config", str(SERVER_CONFIG)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "QZ3_TEST_PORT": str(port),
                "JUPYTERLAB_GALATA_ROOT_DIR": str(root),
                "JUPYTER_CONFIG_DIR": str(folder / "config"),
                "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
                "JUPYTER_DATA_DIR": str(folder / "data"),
                "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
                "IPYTHONDIR": str(folder / "ipython"),
                "TMPDIR": str(folder / "tmp"),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
                **(environment or {}),
            },
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_server(server, url, log)
        lab = Lab(url, root)
        yield lab
        lab.end_sessions()
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Notebook:
    """A notebook that is open in a page."""

    def __init__(self, page: Page, lab: Lab, name: str, cells: list[str] | None = None) -> None:
        """Open ``name``, which is written first if ``cells`` are given."""
        self.page, self.lab, self.name = page, lab, name
        if cells is not None:
            write_notebook(lab.root / name, cells)
        self.open()

    def open(self) -> None:
        """Load the page and wait until notebook and kernel are ready."""
        self.page.goto(f"{self.lab.url}/lab/tree/{self.name}?reset")
        self._wait_until_ready()

    def reload(self) -> None:
        """Load the page again, as a reader does."""
        self.page.reload()
        self._wait_until_ready()

    def run_all(self) -> None:
        """Run all cells, and wait until the last one has ended."""
        self.start_all()
        self.wait_for_cells()

    def start_all(self) -> None:
        """Begin to run all cells."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")

    def run_cell(self, index: int) -> None:
        """Begin to run one cell, by its place among all cells."""
        self.page.evaluate(
            """index => {
              window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
              window.jupyterapp.commands.execute('notebook:run-cell');
            }""",
            index,
        )

    def wait_for_cells(self, timeout_seconds: float = 60) -> None:
        """Wait until every code cell has ended, or one has failed."""
        self.page.wait_for_function(
            f"""() => {{
              const cells = ({_CELLS})();
              return cells.every(cell => cell.count) || cells.some(
                cell => cell.outputs.some(output => output.output_type === 'error'));
            }}""",
            timeout=timeout_seconds * 1000,
        )

    def restart_kernel(self) -> None:
        """Restart the kernel, and wait until the new one answers."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'"
        )

    def outputs(self) -> list[dict[str, Any]]:
        """All outputs of all cells."""
        return [output for cell in self.page.evaluate(_CELLS) for output in cell["outputs"]]

    def errors(self) -> list[str]:
        """Errors of cells, and what stands in the error regions of our own widgets."""
        found = ["\n".join(output["traceback"]) for output in self.outputs() if output["output_type"] == "error"]
        regions = self.page.locator(".qz3-live-error, .qz3-region-error").all()
        return found + [text for region in regions if (text := (region.text_content() or "").strip())]

    def set_theme(self, theme: str) -> None:
        """``"JupyterLab Light"`` or ``"JupyterLab Dark"``."""
        self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        light = "false" if "Dark" in theme else "true"
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{light}'")

    def hide_side_bars(self) -> None:
        """Close the file browser, so that the notebook has the window for itself."""
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")

    def save(self) -> None:
        """Save it, as Lab does by itself every other minute: a page that is loaded again starts from the file."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")

    def _wait_until_ready(self) -> None:
        self.page.wait_for_function(
            """() => {
              const widget = window.jupyterapp?.shell.currentWidget;
              const kernel = widget?.sessionContext?.session?.kernel;
              return widget?.context?.isReady && widget.sessionContext.isReady
                && ['idle', 'busy'].includes(kernel?.status);
            }""",
            timeout=60_000,
        )


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in cells]
    nbformat.write(notebook, path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-4000:]}")
        try:
            urllib.request.urlopen(f"{url}/api/status", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)  # the server can't tell when it is there
