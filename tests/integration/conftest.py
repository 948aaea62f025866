"""One folder of real runs for all tests here: what has run once is looked at by many of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .real_runs import Runs, processes_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Where the runs are, in a path with a space. Whatever is left of them at the end is killed, and an error."""
    folder = tmp_path_factory.mktemp("real runs")
    yield Runs(folder)
    left = processes_of(folder)
    for process in left:
        process.kill()
    assert not left
