"""Listing and opening runs; :class:`Run` is a read-only view on one run directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import modified, read_json_object, write_json_atomic
from .layout import RunLayout, is_run_directory
from .secrets import redact, redact_tree
from .status import State, Status, read_status, resolve, utc_text

if TYPE_CHECKING:
    import pandas as pd

    from ..config.schema import RunConfig
    from ..trace.reader import MemoryTrace

_BLOCK_BYTES = 64 * 1024


class RunNotFound(ValueError):  # noqa: N818 - reads better where it is caught
    """No run of that name; the message names the nearest ones."""


class Run:
    """What is on disk about one run. Everything is read when it is asked for; a run that is under way changes."""

    def __init__(self, directory: Path | RunLayout) -> None:
        """Opens nothing: see :func:`open_run` for a check that there is a run."""
        self.layout = directory if isinstance(directory, RunLayout) else RunLayout(directory)

    @property
    def run_id(self) -> str:
        """The run's identifier."""
        return self.layout.run_id

    @property
    def status(self) -> Status:
        """The true present state, worked out anew each time."""
        return resolve(self.layout)

    @property
    def state(self) -> State:
        """Short for ``status.state``."""
        return self.status.state

    @cached_property
    def config(self) -> RunConfig:
        """The whole configuration of the run.

        Raises:
            ConfigError: ``run.yaml`` can't be read or does not fit the schema of this version.
        """
        from ..config.io import load_config

        return load_config(self.layout.run_yaml)

    @cached_property
    def _run_yaml(self) -> dict[str, Any]:
        from ..config.yaml_text import parse

        try:
            content, _ = parse(self.layout.run_yaml.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.layout.run_yaml} can't be read: {error}") from error
        return content if isinstance(content, dict) else {}

    @property
    def preset(self) -> str | None:
        """The preset that the configuration was made from."""
        return self._run_yaml.get("preset")

    @property
    def given(self) -> dict[str, Any]:
        """``{section: {field: value}}`` of what differs from the preset, or from the defaults without one."""
        return dict(self._run_yaml.get("given") or {})

    @property
    def manifest(self) -> dict[str, Any]:
        """Provenance: argv, git state, versions, hardware. Raises ``ValueError`` if it can't be read."""
        return read_json_object(self.layout.manifest_json)

    @property
    def plan_json(self) -> dict[str, Any]:
        """What was predicted. Raises ``ValueError`` if it can't be read."""
        return read_json_object(self.layout.plan_json)

    @property
    def created(self) -> datetime:
        """When it was made; the directory's own time if ``status.json`` does not say."""
        try:
            return datetime.fromisoformat(read_status(self.layout).created)
        except ValueError:
            return datetime.fromisoformat(utc_text(modified(self.layout.root)))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is damaged in the directory, one sentence each; empty for a sound one."""
        found = []
        for read in (lambda: read_status(self.layout), lambda: self.config):
            try:
                read()
            except ValueError as error:
                found.append(str(error))
        return tuple(found)

    def memory(self, ranks: Sequence[int] | None = None) -> MemoryTrace:
        """Memory of all ranks, or of ``ranks``, over time."""
        from ..trace.reader import read_memory

        return read_memory(self.layout.root, ranks=ranks)

    def metrics(self) -> pd.DataFrame:
        """One row per optimizer step and evaluation."""
        from ..trace.reader import read_metrics

        return read_metrics(self.layout.root)

    @property
    def adapter_dir(self) -> Path | None:
        """The folder of the trained adapter, or ``None`` if none was saved."""
        return self.layout.adapter_dir if (self.layout.adapter_dir / "adapter_config.json").is_file() else None

    def tail_log(self, rank: int | None = None, *, num_lines: int = 100) -> str:
        """The last lines of a rank's log, or (``rank=None``) of the launcher's; empty if there is none yet."""
        path = self.layout.launcher_log if rank is None else self.layout.rank_log(rank)
        return redact(_tail(path, num_lines))

    @property
    def tags(self) -> tuple[str, ...]:
        """The user's own tags."""
        return tuple(self._notes().get("tags") or ())

    @property
    def notes(self) -> str:
        """The user's own notes."""
        return str(self._notes().get("notes") or "")

    def annotate(self, *, tags: Sequence[str] | None = None, notes: str | None = None) -> None:
        """Replace the tags, the notes or both; they are the only thing about a run that may be changed.

        Raises:
            OSError: the directory can't be written.
        """
        content = {
            "tags": list(dict.fromkeys(self.tags if tags is None else tags)),
            "notes": self.notes if notes is None else notes,
        }
        write_json_atomic(self.layout.notes_json, redact_tree(content))

    def delete(self) -> None:
        """Remove the run directory with everything in it.

        Raises:
            ValueError: the run is still going on, the directory holds no run, or it is a link to another place.
        """
        if self.layout.root.is_symlink():
            target = self.layout.root.readlink()
            raise ValueError(f"{self.run_id} is a link to {target}: remove it by hand, what it leads to is left alone")
        if not is_run_directory(self.layout.root):
            raise ValueError(f"{self.layout.root} holds no run")
        status = self.status
        if not status.has_ended and (status.state == "running" or status.launched_by == "supervisor"):
            raise ValueError(f"{self.run_id} is {status.state}: stop it before you delete it")
        # Hidden first: a removal that is cut short leaves nothing that looks like a run.
        hidden = self.layout.root.with_name(f".{self.run_id}.deleted-{os.getpid()}")
        self.layout.root.rename(hidden)
        shutil.rmtree(hidden)

    def __repr__(self) -> str:
        return f"Run({str(self.layout.root)!r}, {self.state})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.layout.root.absolute() == other.layout.root.absolute()

    def __hash__(self) -> int:
        return hash(self.layout.root.absolute())

    def _repr_html_(self) -> str:
        from .card import run_card

        return run_card(self)

    def _notes(self) -> dict[str, Any]:
        return read_json_object(self.layout.notes_json) if self.layout.notes_json.exists() else {}


def list_runs(runs_dir: str | Path = "runs") -> list[Run]:
    """The runs in ``runs_dir``, newest first. Other folders are skipped; a damaged run is listed with ``problems``.

    A folder that does not exist holds no runs.

    Raises:
        ValueError: ``runs_dir`` is no folder, or can't be read.
    """
    runs = [Run(entry) for entry in list_run_folders(runs_dir)]
    return sorted(runs, key=lambda run: (run.created, run.run_id), reverse=True)


def list_run_folders(runs_dir: str | Path = "runs") -> list[Path]:
    """The run directories in ``runs_dir``, in no order; none, if it does not exist.

    Raises:
        ValueError: ``runs_dir`` is no folder, or can't be read.
    """
    folder = Path(runs_dir).expanduser()
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{folder} can't be read as a folder of runs: {error.strerror or error}") from error
    return [entry for entry in entries if _is_run(entry)]


def open_run(run: str | Path | Run, runs_dir: str | Path = "runs") -> Run:
    """A run by its id, the unique beginning of one, ``latest``, or the path of its directory.

    Raises:
        RunNotFound: none, or several begin so; the message names the nearest.
    """
    if isinstance(run, Run):
        return run
    folder = Path(runs_dir).expanduser()
    name = str(run)
    if os.sep not in name and name not in ("", ".", "..") and _is_run(folder / name):
        return Run(folder / name)
    path = Path(run).expanduser()
    if (os.sep in name or isinstance(run, Path)) and _is_run(path):
        return Run(path.absolute())
    runs = list_runs(folder)
    if not runs:
        raise RunNotFound(f"there is no run {name!r}: {folder} holds none")
    if name == "latest":
        return runs[0]
    ids = [known.run_id for known in runs]
    matching = [known for known in runs if name and known.run_id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        several = ", ".join(known.run_id for known in matching[:5])
        raise RunNotFound(f"{len(matching)} runs in {folder} begin with {name!r}: {several}; write more of the name")
    near = get_close_matches(Path(name).name, ids, n=3, cutoff=0.4) or ids[:3]
    raise RunNotFound(f"there is no run {name!r} in {folder}; the nearest are {', '.join(near)}")


def _is_run(path: Path) -> bool:
    try:
        return is_run_directory(path)
    except OSError:  # not ours to look into
        return False


def _tail(path: Path, num_lines: int) -> str:
    try:
        with open(path, "rb") as file:
            position = file.seek(0, os.SEEK_END)
            data = b""
            # One line break more than lines, so that the first line is whole.
            while position > 0 and data.count(b"\n") <= num_lines:
                begin = max(0, position - _BLOCK_BYTES)
                file.seek(begin)
                data = file.read(position - begin) + data
                position = begin
    except OSError:
        return ""
    lines = data.decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:]) if num_lines > 0 else ""
