"""``qz3 lab`` opens the notebooks in JupyterLab; ``qz3 app`` serves the workbench alone as a page."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

_err = Console(stderr=True, highlight=False)
_TOUR = "01_workbench.ipynb"
_CELL = "import os\n\nos.chdir(os.environ['QZ3_APP_DIR'])\nfrom qz3_widgets import Workbench\n\nWorkbench()"
# Nothing from anywhere else: a page that shows what lies on a training machine asks no other server. And in no other
# site's frame: it replaces the policy that Jupyter's servers have by themselves.
_POLICY = (
    "default-src 'self'; frame-ancestors 'self'; base-uri 'self'; object-src 'none'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' ws: wss: data: blob:; "
    "worker-src 'self' blob:"
)

RunsDir = Annotated[Path, typer.Option(envvar="QZ3_RUNS_DIR", help="Folder of the run directories.")]
Port = Annotated[int | None, typer.Option(help="Port to serve on; a free one, if empty.")]
Ip = Annotated[str, typer.Option(help="Address to serve on.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")]


def lab(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NOTEBOOK] [-- OPTION...]",
            help="Notebook to open (the workbench's tour, if empty), and after -- options of jupyter lab's own.",
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    port: Port = None,
    ip: Ip = "localhost",
    browser: Browser = True,
) -> None:
    """Open JupyterLab on the workbench's notebook, or on another one."""
    options = list(words or [])
    target = Path(options.pop(0)) if options and not options[0].startswith("-") else _tour()
    if not target.exists():
        raise ValueError(f"{target} does not exist; name a notebook")
    command = [sys.executable, "-m", "jupyter", "lab", str(target), f"--ServerApp.ip={ip}"]
    command += [f"--ServerApp.port={port}"] if port is not None else []
    command += [] if browser else ["--no-browser"]
    raise typer.Exit(_serve(command + options, runs_dir))


def app(
    runs_dir: RunsDir = Path("runs"),
    port: Port = None,
    ip: Ip = "localhost",
    browser: Browser = True,
    token: Annotated[
        bool, typer.Option("--token/--no-token", help="Let in only whoever has the token in the printed address.")
    ] = True,
) -> None:
    """Serve the workbench alone as a page, through Voila. Whoever gets in can start runs here, and so run any code."""
    if importlib.util.find_spec("voila") is None:
        raise ValueError("qz3 app needs Voila, which is not installed; install it with: pip install 'qz3_widgets[app]'")
    with tempfile.TemporaryDirectory(prefix="qz3-app-") as folder:
        target = Path(folder) / "workbench.ipynb"
        target.write_text(_notebook(_CELL), encoding="utf-8")
        headers = repr({"headers": {"Content-Security-Policy": _POLICY}})
        command = [
            sys.executable, "-m", "voila", str(target), f"--Voila.ip={ip}", "--strip_sources=True",
            f"--Voila.auto_token={token}", f"--Voila.tornado_settings={headers}",
        ]  # fmt: skip
        command += [f"--port={port}"] if port is not None else []
        command += [] if browser else ["--no-browser"]
        raise typer.Exit(_serve(command, runs_dir, {"QZ3_APP_DIR": str(Path.cwd())}))


def _tour() -> Path:
    """The tour in a checkout; where the package is installed, a notebook in the present folder."""
    tour = Path(__file__).resolve().parents[1] / "notebooks" / _TOUR
    if tour.exists():
        return tour
    target = Path("workbench.ipynb")
    if not target.exists():
        try:
            target.write_text(_notebook("from qz3_widgets import Workbench\n\nWorkbench()"), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{target.absolute()} can't be written: {error.strerror or error}") from error
        _err.print(f"wrote {escape(str(target))}", soft_wrap=True)
    return target


def _notebook(code: str) -> str:
    """A notebook of one cell."""
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "workbench",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
    }
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    document = {
        "cells": [{**cell, "source": code.splitlines(keepends=True)}],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, indent=1) + "\n"


def _serve(command: list[str], runs_dir: Path, more: Mapping[str, str] | None = None) -> int:
    """Run a server until it ends. What asks this process to end (Ctrl-C too) ends it; asked again, at once."""
    from .launch.directory import child_environment

    environment = {**child_environment(), "QZ3_RUNS_DIR": str(runs_dir.expanduser().absolute()), **(more or {})}
    servers: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def end(number: int, _: object) -> None:
        asked.append(number)
        for server in servers:
            server.terminate() if len(asked) == 1 else server.kill()

    # By themselves these would end this process alone, and leave the server and its kernels behind. What is ignored
    # stays so: that is how nohup works.
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
    try:
        with subprocess.Popen(command, env=environment) as server:
            servers.append(server)
            if asked:
                server.terminate()
            ended = server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked else ended
