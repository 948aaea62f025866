"""Making a run directory from a plan: complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import site
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.changes import changed_fields
from ..config.presets import preset as preset_config
from ..config.schema import RunConfig
from ..config.yaml_text import dump
from ..runs.files import write_json_atomic
from ..runs.layout import RunLayout, is_run_directory
from ..runs.provenance import manifest
from ..runs.secrets import redact
from ..runs.status import Launcher, Status, resolve, utc_now, write_status
from ..units import format_bytes
from .command import render

if TYPE_CHECKING:
    from ..plan.plan import Plan

MIN_FREE_BYTES = 200 * 2**20
"""Less free space than this in the runs folder, and nothing is started: traces, logs and an adapter need some."""


def find_launcher(name: str) -> Path:
    """A script that runs as a process of its own: beside the package in a checkout, inside it where it is installed.

    Raises:
        ValueError: it is in neither place; the installation is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package.parent / "launchers" / name, package / "_launchers" / name)
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{name} is neither at {places[0]} nor at {places[1]}; install the package again")


def find_train_script() -> Path:
    """What every rank executes; see :func:`find_launcher`."""
    return find_launcher("train_qlora.py")


def package_root() -> Path | None:
    """The folder to put on ``PYTHONPATH`` so that a new Python finds this package; ``None`` if it is installed."""
    root = Path(__file__).resolve().parents[2]
    installed = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
    return None if root in installed else root


def child_environment() -> dict[str, str]:
    """This process's environment, in which a new Python finds this package too."""
    environment = dict(os.environ)
    root = package_root()
    if root is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    return environment


def create(plan: Plan, runs_dir: Path, *, port: int, preset: str | None = None) -> RunLayout:
    """A new run directory in ``runs_dir``, named after the run and the time; it appears at once and complete.

    Raises:
        ValueError: ``runs_dir`` can't be written or has no room, or the configuration holds a secret.
    """
    folder = runs_dir.expanduser().absolute()
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder)
        final, partial = _reserve(folder, plan.config.name)
        try:
            _fill(plan, final, RunLayout(partial), port=port, preset=preset, launched_by="supervisor")
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return RunLayout(final)


def render_into(plan: Plan, directory: Path, *, port: int = 0, preset: str | None = None) -> RunLayout:
    """Make ``directory`` a run directory that nobody has started: ``bash launch.sh`` in it does.

    Raises:
        ValueError: it holds something else, or a run that has been started; it can't be written.
    """
    layout = RunLayout(directory.expanduser().absolute())
    with _explained(layout.root):
        if layout.root.exists() and any(layout.root.iterdir()):
            if not is_run_directory(layout.root):
                raise ValueError(f"{layout.root} is not empty and holds no run; name a new folder")
            if resolve(layout).state != "pending":
                raise ValueError(f"{layout.root} holds a run that has been started; name a new folder")
        existed = layout.root.exists()
        try:
            layout.root.mkdir(parents=True, exist_ok=True)
            _check_space(layout.root)
            _fill(plan, layout.root, layout, port=port, preset=preset, launched_by="launch.sh")
        except BaseException:
            if not existed:
                shutil.rmtree(layout.root, ignore_errors=True)
            raise
    return layout


def refuse_secrets(config: RunConfig) -> None:
    """Raise ``ValueError`` if a field holds what looks like a secret: the run directory would hold it too."""
    for path, value in _leaves(config.model_dump(mode="json")):
        if isinstance(value, str) and redact(value) != value:
            raise ValueError(
                f"{path}: the value looks like it holds a secret ({redact(value)}), and it would be written to the run "
                "directory; put it into your environment instead, the ranks inherit it"
            )


def _fill(plan: Plan, final: Path, layout: RunLayout, *, port: int, preset: str | None, launched_by: Launcher) -> None:
    """Write every file of the run that will be at ``final`` into ``layout``; ``status.json`` comes last."""
    config = plan.config
    refuse_secrets(config)
    working_dir = Path.cwd()
    rendered = render(
        plan, final, port=port, python=sys.executable, train_script=find_train_script(), working_dir=working_dir,
        package_root=package_root(),
    )  # fmt: skip
    layout.make_folders()
    layout.run_yaml.write_text(run_yaml(config, preset), encoding="utf-8")
    write_json_atomic(layout.plan_json, plan.to_json())
    write_json_atomic(layout.manifest_json, manifest(plan, rendered.argv, cwd=working_dir))
    layout.accelerate_yaml.write_text(rendered.accelerate_yaml, encoding="utf-8")
    if rendered.deepspeed_json is not None:
        layout.deepspeed_json.write_text(rendered.deepspeed_json, encoding="utf-8")
    layout.launch_sh.write_text(rendered.launch_sh, encoding="utf-8")
    layout.launch_sh.chmod(0o755)
    status = Status(
        run_id=final.name,
        state="pending",
        created=utc_now(),
        launched_by=launched_by,
        num_ranks=plan.local_ranks,
        rehearsal=plan.rehearsal is not None,
    )
    write_status(layout, status)


def run_yaml(config: RunConfig, preset: str | None = None) -> str:
    """The content of ``run.yaml``: what differs from the preset (or from the defaults), and the whole."""
    base = preset_config(preset) if preset is not None else None
    content = {
        "preset": preset,
        "given": changed_fields(config, base),
        "resolved": config.model_dump(mode="json"),
    }
    return dump(content)


def _reserve(folder: Path, name: str) -> tuple[Path, Path]:
    """A free name for a run, and a hidden folder that keeps it from others until the two are swapped."""
    stem = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    number = 1
    while True:
        run_id = stem if number == 1 else f"{stem}-{number}"
        final, partial = folder / run_id, folder / f".{run_id}.partial"
        number += 1
        try:
            partial.mkdir()  # fails if somebody else is making a run of this name now
        except FileExistsError:
            continue
        if not final.exists():
            return final, partial
        partial.rmdir()


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise ValueError(
            f"{folder} has {format_bytes(free)} free, and a run needs {format_bytes(MIN_FREE_BYTES)} at least; "
            "make room, or choose another folder with --runs-dir"
        )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the system refuses, as a ``ValueError`` that says which folder and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = "the disk is full; make room"
        else:
            reason = f"it can't be written ({error.strerror or error})"
        raise ValueError(f"{folder}: {reason}, or choose another folder with --runs-dir or QZ3_RUNS_DIR") from error


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value
