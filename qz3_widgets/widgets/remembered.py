"""What a workbench remembers of itself beside its runs, so that a new kernel comes back to where the old one was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..runs.files import read_json_object, write_json_atomic
from ..runs.secrets import redact_tree
from .panel import Later

_VERSION = 1
_PAUSE_SECONDS = 0.5


class Remembered:
    """``<runs folder>/.workbench/state.json``. The last one that writes is remembered."""

    def __init__(self, runs_dir: Path, collect: Callable[[], Mapping[str, Any]]) -> None:
        """``collect`` gives what is to be remembered, as plain values."""
        self.path = runs_dir.expanduser() / ".workbench" / "state.json"
        self.problem: str | None = None
        self._collect = collect
        self._later = Later(self._write, _PAUSE_SECONDS)
        self._lock = threading.Lock()

    def read(self) -> Mapping[str, Any]:
        """What was remembered; nothing, if there is nothing, or it is damaged or of another version."""
        try:
            content = read_json_object(self.path)
        except ValueError:
            return {}
        return content if content.get("version") == _VERSION else {}

    def note(self) -> None:
        """Something has changed: write it in a moment."""
        self._later.request()

    def flush(self) -> None:
        """Write it now, if something has changed."""
        self._later.flush()

    def _write(self) -> None:
        # A place that can't be written to costs the memory of a session, and nothing else.
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomic(self.path, {"version": _VERSION, **redact_tree(dict(self._collect()))})
            except (OSError, ValueError) as error:
                self.problem = f"what is open is not remembered: {self.path} can't be written ({error})"
            else:
                self.problem = None
