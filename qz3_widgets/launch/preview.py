"""The files and the command of a run that is not made yet, as a form shows them. Nothing is written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .command import render
from .directory import find_train_script, package_root

if TYPE_CHECKING:
    from ..plan.plan import Plan


def preview(plan: Plan, runs_dir: str | Path = "runs") -> Mapping[str, str]:
    """Name to text of what would be executed, in a run directory named after the run: its time is added at the start.

    Raises:
        ValueError: several machines without a port, or a secret in ``launch.environment``.
    """
    run_dir = Path(runs_dir).expanduser().absolute() / plan.config.name
    found = render(
        plan,
        run_dir,
        port=plan.config.launch.main_process_port or 0,
        python=sys.executable,
        train_script=find_train_script(),
        working_dir=Path.cwd(),
        package_root=package_root(),
    )
    files = {"accelerate.yaml": found.accelerate_yaml}
    if found.deepspeed_json is not None:
        files["deepspeed.json"] = found.deepspeed_json
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.environment.items())
    files["command"] = f"{exports}\n{_fold(found.argv)}\n"
    return files


def _fold(argv: tuple[str, ...]) -> str:
    """One option with its value on each line, so that it is read without scrolling."""
    lines: list[list[str]] = [[]]
    for word in argv:
        if word.startswith("--") or (word.endswith(".py") and len(lines) > 1):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)
