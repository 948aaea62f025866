"""The README: two commands and no others to set up, commands that exist, and a file tree that is the repository's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

import qz3_widgets
from qz3_widgets.cli import app
from qz3_widgets.config.presets import PRESETS
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README has no section {title!r}"
    return found[1]


def visible_files() -> set[str]:
    """What git tracks or would add, as paths with forward slashes; in an unpacked archive, what is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return {name for name in done.stdout.splitlines() if (REPOSITORY / name).exists()}
    return {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.rglob("*") if path.is_file()}


def tree_entries() -> list[str]:
    """The paths that the tree shows, folders with a slash at their end."""
    (text,) = [body for language, body in BLOCKS if language == "tree"]
    entries: list[str] = []
    folder = ""
    for line in text.splitlines():
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        assert indent in {0, 2}, line
        if indent == 0:
            folder = name if name.endswith("/") else ""
            entries.append(name)
        else:
            assert folder, f"{line!r} stands in no folder"
            entries.append(folder + name)
    return entries


def test_two_commands_set_up() -> None:
    commands = re.findall(r"^```bash\n(.*?)^```$", section("Set up"), re.DOTALL | re.MULTILINE)
    assert [text.strip() for text in commands] == ["launchers/quickstart", "launchers/test"]


def test_nothing_else_sets_up() -> None:
    assert not re.search(r"\b(pip|uv|conda|apt|apt-get|brew|npm|docker)3? install\b|-m venv", README)


def test_tree_shows_what_is_there() -> None:
    entries = tree_entries()
    assert len(entries) == len(set(entries))
    for entry in entries:
        path = REPOSITORY / entry
        assert path.is_dir() if entry.endswith("/") else path.is_file(), f"the README's tree has {entry}"


def test_tree_leaves_nothing_out() -> None:
    """Everything at the top, and everything in each folder whose contents are shown."""
    entries = set(tree_entries())
    parents = {entry.rstrip("/").rpartition("/")[0] for entry in entries}
    shown = {f"{parent}/" if parent else "" for parent in parents}
    assert {"launchers/", "qz3_widgets/", "tests/"} <= shown
    for name in visible_files():
        parts = name.split("/")
        if parts[0].startswith(".") or parts[-1] == "__init__.py":
            continue
        for depth in range(len(parts)):
            folder = "".join(f"{part}/" for part in parts[:depth])
            if folder in shown:
                entry = folder + parts[depth] + ("/" if depth < len(parts) - 1 else "")
                assert entry in entries, f"the README's tree leaves out {entry}"


def test_every_line_of_the_tree_says_something() -> None:
    (text,) = [body for language, body in BLOCKS if language == "tree"]
    silent = [line.strip() for line in text.splitlines() if len(line.split()) == 1]
    assert silent == ["qz3_widgets/", "tests/", "LICENSE", "README.md"]


def test_commands_are_those_that_exist() -> None:
    (text,) = [body for language, body in BLOCKS if language == "bash" and "qz3 " in body]
    command = get_command(app)
    existing = set(getattr(command, "commands", {}))
    assert set(re.findall(r"^qz3 (\w+)", text, re.MULTILINE)) == existing
    assert set(re.findall(r"^qz3 init (\S+)", text, re.MULTILINE)) <= set(PRESETS)


def test_python_example_uses_what_is_public() -> None:
    (text,) = [body for language, body in BLOCKS if language == "python"]
    compile(text, "README.md", "exec")
    names = set(re.findall(r"\bqz3\.(\w+)", text))
    assert len(names) >= 5
    assert names <= set(qz3_widgets.__all__)
    assert set(re.findall(r'preset\("([^"]+)"\)', text)) <= set(PRESETS)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert "://" in target or (REPOSITORY / Path(target)).exists()
