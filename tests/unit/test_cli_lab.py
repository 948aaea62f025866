from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qz3_widgets import cli_lab
from qz3_widgets.cli import app
from tests.conftest import REPOSITORY


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


def test_the_app_serves_the_workbench_and_nothing_of_its_source(served: list[tuple[list[str], Path]]) -> None:
    result = CliRunner().invoke(app, ["app", "--no-browser"])
    assert result.exit_code == 0
    ((command, _),) = served
    assert "--strip_sources=True" in command
    assert "--Voila.ip=localhost" in command
    assert any("default-src 'self'" in word for word in command)


def test_without_voila_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_lab.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["app"])
    assert "pip install 'qz3_widgets[app]'" in str(result.exception)
