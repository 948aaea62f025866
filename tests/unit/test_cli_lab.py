from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qz3_widgets import cli_lab
from qz3_widgets.cli import app
from tests.conftest import REPOSITORY

SERVER = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def end(number, _):
    (place / "ended").write_text("by SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path]]:
    """What would have been started, and the notebook's text at that moment."""
    found: list[tuple[list[str], Path]] = []

    def serve(command: list[str], runs_dir: Path, more: object = None) -> int:
        notebook = next(Path(word) for word in command if word.endswith(".ipynb"))
        assert json.loads(notebook.read_text())["nbformat"] == 4
        found.append((command, runs_dir))
        return 0

    monkeypatch.setattr(cli_lab, "_serve", serve)
    return found


def test_lab_opens_the_tour(served: list[tuple[list[str], Path]]) -> None:
    result = CliRunner().invoke(app, ["lab", "--no-browser", "--port", "9000", "--runs-dir", "mine"])
    assert result.exit_code == 0
    ((command, runs_dir),) = served
    assert str(REPOSITORY / "notebooks" / "01_workbench.ipynb") in command
    assert {"--no-browser", "--ServerApp.port=9000", "--ServerApp.ip=localhost"} <= set(command)
    assert runs_dir == Path("mine")


def test_lab_of_an_installed_package_writes_a_notebook_once(
    served: list[tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_lab, "__file__", str(tmp_path / "site" / "qz3_widgets" / "cli_lab.py"))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert CliRunner().invoke(app, ["lab", "--no-browser"]).exit_code == 0
        text = Path("workbench.ipynb").read_text()
        assert "Workbench()" in text
        Path("workbench.ipynb").write_text(text + " ")  # whatever was done in it stays
    assert Path("workbench.ipynb").read_text().endswith("\n  ")


def test_a_notebook_that_does_not_exist_is_named(served: list[tuple[list[str], Path]]) -> None:
    result = CliRunner().invoke(app, ["lab", "nowhere.ipynb"])
    assert isinstance(result.exception, ValueError)
    assert "nowhere.ipynb does not exist" in str(result.exception)
    assert served == []


def test_what_stands_after_two_dashes_goes_to_jupyter(served: list[tuple[list[str], Path]], tmp_path: Path) -> None:
    own = tmp_path / "own.ipynb"
    own.write_text('{"nbformat": 4}')
    for words in (["lab", "--", "--collaborative"], ["lab", str(own), "--", "--collaborative"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    commands = [command for command, _ in served]
    assert [command[-1] for command in commands] == ["--collaborative"] * 2
    assert [Path(command[4]).name for command in commands] == ["01_workbench.ipynb", "own.ipynb"]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_whatever_ends_the_command_ends_the_server(tmp_path: Path, asked: signal.Signals) -> None:
    # Tests may run where signals are ignored, as under nohup, and what is ignored stays so.
    code = (
        "import signal, sys; from pathlib import Path; from qz3_widgets.cli_lab import _serve; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        f"sys.exit(_serve([sys.executable, '-c', {SERVER!r}, {str(tmp_path)!r}], Path('runs')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as command:
        try:
            assert command.stdout is not None
            assert command.stdout.readline() == b"up\n"
            command.send_signal(asked)
            assert command.wait(60) == 128 + asked
        finally:
            command.kill()
    assert (tmp_path / "ended").read_text() == "by SIGTERM"


def test_a_server_that_ends_by_itself_tells_how(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert cli_lab._serve([sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_the_app_serves_the_workbench_and_nothing_of_its_source(served: list[tuple[list[str], Path]]) -> None:
    result = CliRunner().invoke(app, ["app", "--no-browser"])
    assert result.exit_code == 0
    ((command, _),) = served
    assert "--strip_sources=True" in command
    assert "--Voila.ip=localhost" in command
    (policy,) = (word for word in command if "Content-Security-Policy" in word)
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'self'" in policy
    assert "--Voila.auto_token=True" in command


def test_the_app_can_do_without_a_token(served: list[tuple[list[str], Path]]) -> None:
    assert CliRunner().invoke(app, ["app", "--no-browser", "--no-token"]).exit_code == 0
    assert "--Voila.auto_token=False" in served[0][0]


def test_without_voila_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_lab.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["app"])
    assert "pip install 'qz3_widgets[app]'" in str(result.exception)
