"""How the launchers install: what uv is told, when pip takes over, and what is said where neither can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# A Python that is the real one but for ``-m pip install``, which it only notes; and a uv that does as it is told.
_PYTHON = """#!/usr/bin/env bash
if [[ "$*" == "-m pip install "* ]]; then printf '%s\\n' "pip:${*:4}" >>"$CALLS"; echo "$PIP_SAYS"; exit "$PIP_EXIT"; fi
exec "$REAL_PYTHON" "$@"
"""
_UV = """#!/usr/bin/env bash
printf 'uv:%s\\n' "$*" "$SSL_CERT_FILE" "$UV_HTTP_TIMEOUT" >>"$CALLS"
echo "$UV_SAYS"
exit "$UV_EXIT"
"""


class Launcher:
    """Commands in the shell of a launcher, whose environment holds the two programs above."""

    def __init__(self, folder: Path, *, has_uv: bool = True) -> None:
        self.venv = folder / "my venv"
        (self.venv / "bin").mkdir(parents=True)
        self.calls = folder / "calls"
        for name, content in {"python": _PYTHON, **({"uv": _UV} if has_uv else {})}.items():
            program = self.venv / "bin" / name
            program.write_text(content, encoding="utf-8")
            program.chmod(0o755)
        (self.venv / "setup.log").touch()
        pip_settings = {name for name in os.environ if name.startswith("PIP_")}
        self.environment = {name: value for name, value in os.environ.items() if name not in pip_settings} | {
            "QZ3_VENV": str(self.venv), "CALLS": str(self.calls), "REAL_PYTHON": sys.executable, "UV_SAYS": "",
            "UV_EXIT": "0", "PIP_SAYS": "", "PIP_EXIT": "0", "PIP_CONFIG_FILE": os.devnull, "SSL_CERT_FILE": "",
            "UV_HTTP_TIMEOUT": "",
        }  # fmt: skip

    def __call__(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"source launchers/setup_env.sh; {command}"],
            cwd=REPOSITORY,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self) -> list[str]:
        return self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_uv_is_told_what_pip_is_told(launcher: Launcher, tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nindex-url = https://mirror.invalid/simple\nextra-index-url = https://one.invalid https://two.invalid\n"
        "trusted-host = mirror.invalid\ncert = /my certificates/all.pem\ntimeout = 20\n"
        "[install]\nno-index = false\nfind-links = /wheels\n[list]\nformat = json\n"
    )
    done = launcher("pip_settings_for_uv", PIP_CONFIG_FILE=str(settings), PIP_TIMEOUT="77", PIP_FIND_LINKS="/a /b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for word in (
        "--default-index=https://mirror.invalid/simple", "--index=https://one.invalid", "--index=https://two.invalid",
        "--allow-insecure-host=mirror.invalid", "SSL_CERT_FILE=/my certificates/all.pem",
        "UV_HTTP_TIMEOUT=77", "--find-links=/a", "--find-links=/b",
    ):  # fmt: skip
        assert lines.count(word) == 1, word
    assert not {"UV_HTTP_TIMEOUT=20", "--find-links=/wheels", "--no-index"} & set(lines)
    assert "--no-index" in launcher("pip_settings_for_uv", PIP_NO_INDEX="1").stdout.splitlines()


def test_uv_installs(launcher: Launcher) -> None:
    done = launcher("install 'installing it' --no-deps thing", PIP_INDEX_URL="https://mirror.invalid", PIP_CERT="/a b")
    assert done.returncode == 0, done.stderr
    command, certificate, _ = launcher.called()
    assert command.startswith(f"uv:pip install --python {launcher.venv}/bin/python ")
    assert " --default-index=https://mirror.invalid " in command
    assert command.endswith(f" -c {REPOSITORY}/launchers/constraints.txt --no-deps thing")
    assert certificate == "uv:/a b"
    assert "  installing it " in done.stdout


def test_pip_does_what_uv_can_not(launcher: Launcher) -> None:
    words = {"UV_EXIT": "2", "UV_SAYS": "error: 401 Unauthorized", "PIP_SAYS": "No matching distribution found"}
    done = launcher("install 'installing it' thing", **words)
    assert done.returncode == 0, done.stderr
    assert launcher.called()[-1].startswith("pip:--no-input ")
    assert launcher.called()[-1].endswith("constraints.txt thing")
    assert "  uv could not do it (see " in done.stdout
    assert "401 Unauthorized" in (launcher.venv / "setup.log").read_text()
    done = launcher("install 'installing it' thing", **words, PIP_EXIT="1")
    assert done.returncode == 1
    assert "This step failed: installing it\nA package has no build" in done.stderr


def test_without_uv(tmp_path: Path) -> None:
    """There is no wheel of uv for every machine."""
    launcher = Launcher(tmp_path, has_uv=False)
    done = launcher("install 'installing it' thing")
    assert done.returncode == 0, done.stderr
    assert [call.partition(":")[0] for call in launcher.called()] == ["pip"]
    done = launcher("install_uv; echo on", PIP_EXIT="1", PIP_SAYS="ERROR: No matching distribution found for uv")
    assert done.returncode == 0, done.stderr
    assert "pip installs the rest" in done.stdout
    done = launcher("install_uv; echo on", PIP_EXIT="1", PIP_SAYS="NewConnectionError: Network is unreachable")
    assert (done.returncode, "on\n" in done.stdout) == (1, False)
    assert "The package index can't be reached." in done.stderr


@pytest.mark.parametrize(
    "said, hint",
    [
        ("  cause: error sending request for url (https://mirror.invalid/simple/foo/)", "index can't be reached"),
        ("  cause: dns error\n  cause: error resolving DNS", "index can't be reached"),
        ("  cause: invalid peer certificate: UnknownIssuer", "certificate is not trusted here"),
        ("  cause: failed to write to file `/a/b`: No space left on device (os error 28)", "The disk is full"),
        ("error: No solution found when resolving dependencies", "no build for this Python or platform"),
        ("WARNING: Retrying: NewConnectionError: Name or service not known", "index can't be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==99", "no build for this Python or platform"),
        ("error: something else", "The whole story is in"),
    ],
)
def test_a_failure_is_explained(launcher: Launcher, said: str, hint: str) -> None:
    done = launcher("step 'installing it' pip_install thing", PIP_EXIT="1", PIP_SAYS=said)
    assert done.returncode == 1
    assert "This step failed: installing it" in done.stderr
    assert hint in done.stderr
    assert said.splitlines()[0].strip() in done.stderr
