"""What tests of several folders share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before anything imports a library that reads them, and inherited by the runs that tests start: no test may depend
# on a model hub being there, and nobody's own settings may change a result.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"  # or jupyter_core warns about its next version
for _name in ("QZ3_RUNS_DIR", "QZ3_PYTHON", "QZ3_RANKS_PER_GPU"):
    os.environ.pop(_name, None)

REPOSITORY = Path(__file__).resolve().parent.parent
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Qz3 = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """An empty runs folder of this test, in a path with a space."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def qz3() -> Qz3:
    """Runs the ``qz3`` command in a process of its own: ``qz3("show", run_id, "--json", cwd=folder, timeout=60)``."""

    def run(
        *arguments: str | Path, cwd: Path | None = None, timeout: float = 120.0, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        code = "import sys; from qz3_widgets.cli import main; sys.exit(main())"
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            check=check,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser program that ``launchers/test`` found or installed."""
    found = os.environ.get("QZ3_CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)
    if not found:
        pytest.fail("no Chromium: run launchers/test, or name one in QZ3_CHROMIUM")
    return found
