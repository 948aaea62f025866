from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qz3_widgets.config.schema import RunConfig
from qz3_widgets.plan.capabilities import Capabilities, Gpu
from qz3_widgets.plan.plan import Plan
from qz3_widgets.runs.provenance import git_state, manifest, package_versions

SECRET = "hf_Planted0Secret0Planted0Secret"


def _plan() -> Plan:
    machine = Capabilities("here", 2, 2**34, gpus=(Gpu(0, "H100", 2**36),), versions={"torch": "9"})
    return Plan(RunConfig(), machine, (), "cpu", 2, 2, True, 1, "2026-01-01T00:00:00+00:00")


def test_manifest_tells_what_a_run_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qz3", "--token", SECRET])
    content = manifest(_plan(), ["python", "train.py", f"--hub-token={SECRET}"], cwd=tmp_path)
    text = json.dumps(content)
    assert "Planted" not in text
    assert content["argv"] == ["python", "train.py", "--hub-token=***"]
    assert content["cwd"] == str(tmp_path)
    assert content["hardware"]["gpus"][0]["name"] == "H100"
    assert content["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["packages"]["pydantic"]
    assert content["git"] is None


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert package_versions(["pydantic", "no-such-package"]).keys() == {"pydantic"}


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init", "-b", "main")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean["commit"]), clean["branch"], clean["dirty"]) == (40, "main", False)
    (tmp_path / "a").write_text("2")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty["dirty"] is True
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_state(tmp_path) is None
