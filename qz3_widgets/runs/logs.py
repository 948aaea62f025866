"""The lines of a run's logs for whoever reads them: by rank, level and text, the newest last.

All ranks together are the launcher's log, which has their lines in the order in which they came, each with its rank; a
rank's own log also has what the programs below it printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .secrets import redact
from .store import Run

Level = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")
_MOST_BYTES = 2_000_000  # from the end of a log: more than anybody scrolls through

_RANK = re.compile(r"\[rank (\d+)\] ?")
_ERROR = re.compile(
    r"\b(error|exception|traceback|fatal|critical|proof failed|out of memory|sig(kill|segv|abrt))\b", re.IGNORECASE
)
_NAMED_ERROR = re.compile(r"\b\w+(Error|Exception)\b")
_WARNING = re.compile(r"\b(warn|warning|deprecated|failed to)\b|Warning\b", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class LogLine:
    """One line of a log."""

    rank: int | None
    """``None``: the launcher itself."""
    level: Level
    text: str
    number: int | None
    """Of the line in its file, from 1; ``None`` where only the end of a long file was read."""
    file: str
    """Name of the file in the run's folder of logs."""


def read_log(
    run: Run,
    *,
    rank: int | Literal["all"] = "all",
    level: Level = "info",
    text: str = "",
    num_lines: int = 200,
    most_bytes: int = _MOST_BYTES,
) -> list[LogLine]:
    """The last lines of a run's log that are wanted, redacted; none, if there is no log yet.

    Args:
        run: The run.
        rank: One rank's own log, or ``"all"``: the launcher's, with all ranks'.
        level: This level, and worse ones.
        text: Must stand in the line, in upper or lower case.
        num_lines: At most so many.
        most_bytes: Of the file's end that are looked at.
    """
    path = log_path(run, rank)
    lines, first = _tail(path, most_bytes)
    least, wanted = LEVELS.index(level), text.lower()
    own = None if rank == "all" else int(rank)
    found = [
        line
        for line in _judged(lines, first, path.name, own)
        if LEVELS.index(line.level) >= least and wanted in line.text.lower()
    ]
    # Last, for it takes longer than all the rest.
    return [replace(line, text=redact(line.text)) for line in (found[-num_lines:] if num_lines > 0 else [])]


def log_path(run: Run, rank: int | Literal["all"]) -> Path:
    """The file that :func:`read_log` reads."""
    return run.layout.launcher_log if rank == "all" else run.layout.rank_log(int(rank))


def _judged(lines: Iterable[str], first: int | None, file: str, own: int | None) -> Iterable[LogLine]:
    """The lines with rank and level, not redacted yet."""
    in_traceback: set[int | None] = set()  # by rank: their lines come mixed
    for number, raw in enumerate(lines):
        # A progress bar draws over itself: what stands last is what was seen.
        shown = raw.rstrip("\r").rsplit("\r", 1)[-1].rstrip()
        match = _RANK.match(shown) if own is None else None
        rank = int(match.group(1)) if match else own
        shown = shown[match.end() :] if match else shown
        if not shown:
            continue
        level = _level(shown)
        if _TRACEBACK in shown:
            in_traceback.add(rank)
        elif rank in in_traceback:
            level = "error"
            if not shown.startswith((" ", "\t")):  # the error itself ends it
                in_traceback.discard(rank)
        yield LogLine(rank, level, shown, None if first is None else first + number, file)


def _level(text: str) -> Level:
    if _ERROR.search(text) or _NAMED_ERROR.search(text):
        return "error"
    return "warning" if _WARNING.search(text) else "info"


def _tail(path: Path, most_bytes: int) -> tuple[list[str], int | None]:
    """The whole lines in the file's last bytes, and the number of the first one, if the file was read whole."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            begin = max(0, size - most_bytes)
            file.seek(begin)
            data = file.read(most_bytes)
    except OSError:
        return [], 1
    lines = data.decode("utf-8", errors="replace").split("\n")
    return (lines[1:], None) if begin else (lines, 1)
