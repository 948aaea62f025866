"""A build that was cut short must not stop those that come after it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from qz3_widgets.training import operators
from qz3_widgets.training.operators import alone
from tests.conftest import REPOSITORY

_HOLD = """
import sys, time
from pathlib import Path
from qz3_widgets.training.operators import alone
folder = Path(sys.argv[1])
with alone(folder):
    (folder / "lock").touch()
    print("building", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "native" / "operators" / "shm"
    folder.mkdir(parents=True)
    return folder


def test_a_killed_build_leaves_no_lock(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.communicate()
    assert (folder / "lock").exists()
    begin = time.monotonic()
    with alone(folder):
        assert not (folder / "lock").exists()
    assert time.monotonic() - begin < 5.0


def test_a_lock_in_a_folder_of_the_users_own_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "elsewhere"))
    (folder / "lock").touch()
    with alone(folder):
        assert (folder / "lock").exists()


def test_a_path_with_a_space_is_quoted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Again and again in one process, it would double with each call."""
    folder = tmp_path / "a b" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(folder))
    monkeypatch.setattr(operators, "_builder", lambda: None)
    for _ in range(3):
        operators.prepare_cpu_operators(announce=False)
    assert f"'{folder}'" == cpp_extension.TORCH_LIB_PATH
