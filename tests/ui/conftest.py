"""A browser and a JupyterLab for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.ui.lab import BROWSER_ARGS, Lab, Notebook, running_lab

Open = Callable[..., Notebook]

_PATIENCE_MS = 60_000  # a condition that comes true ends the wait at once; a slow machine needs no other tests
expect.set_options(timeout=_PATIENCE_MS)


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any], chromium: str) -> dict[str, Any]:
    return {**browser_type_launch_args, "executable_path": chromium, "args": BROWSER_ARGS}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args: dict[str, Any]) -> dict[str, Any]:
    return {**browser_context_args, "viewport": {"width": 1280, "height": 1000}}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    root = folder / "my notebooks"
    root.mkdir()
    with running_lab(folder / "server", root) as server:
        yield server


@pytest.fixture
def open_notebook(lab: Lab, page: Page, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a notebook made of cells; at the end of the test, no page error and no error in any output is allowed."""
    page_errors: list[str] = []
    page.on("pageerror", lambda error: page_errors.append(str(error)))
    page.set_default_timeout(_PATIENCE_MS)
    opened: list[Notebook] = []

    def open_it(*cells: str) -> Notebook:
        name = f"{request.node.name.replace('[', '-').replace(']', '')}.ipynb"
        opened.append(Notebook(page, lab, name, list(cells)))
        return opened[-1]

    yield open_it
    errors = [error for notebook in opened for error in notebook.errors()]
    lab.end_sessions()
    assert errors == []
    assert page_errors == []
