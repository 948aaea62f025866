"""The runs of a folder as a table: cheap enough to be looked at every second, also with hundreds of runs.

What a directory tells at a glance (state, times, tags) is read at once. Figures that need its traces are worked out
apart, in pieces (:meth:`RunTable.fill`), and kept beside the runs, so that they are worked out once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config.schema import RunConfig
from ..config.strategy import resolve_load_strategy
from ..runs.files import read_json_object, size_of, write_json_atomic
from ..runs.secrets import redact
from ..runs.status import Status, read_status
from ..runs.store import Run, list_run_folders
from ..trace.tail import TailReader, give_back_memory, is_reading_long_run
from .loss import speed, summarize_loss
from .memory import fullest, peaks
from .names import config_of
from .summary import times

_VERSION = 2
_RECORDS = 2_000  # of a rank: peaks survive the thinning, and curves are not drawn from them
_AGAIN_SECONDS = 10.0  # between two looks at the traces of a run that goes on
_SAVE_SECONDS = 5.0
_LONG_BYTES = 4 * 2**20  # of one rank's trace: reading it is noticed

COLUMNS = (
    "run_id",
    "state",
    "model",
    "strategy",
    "peak_bytes",
    "last_loss",
    "tokens_per_second",
    "total_seconds",
    "tags",
)
"""What a table is sorted by."""


@dataclass(frozen=True)
class RunRow:
    """One run in the table; ``None`` is what was not measured or is not known yet."""

    run_id: str
    name: str
    state: str
    created: str
    model: str | None = None
    """The last part of its path."""
    strategy: str | None = None
    num_ranks: int | None = None
    peak_bytes: int | None = None
    """Of the fullest rank, in any phase."""
    last_loss: float | None = None
    """Smoothed, as everywhere."""
    tokens_per_second: float | None = None
    total_seconds: float | None = None
    tags: tuple[str, ...] = ()
    notes: str = ""
    problem: str | None = None
    """What is damaged in the directory."""
    complete: bool = False
    """Whether the figures are known."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in ("pending", "running")


@dataclass
class _Known:
    """What was worked out of one run, and when its files were like that."""

    key: tuple[int, ...]
    figures: dict[str, Any]
    at: float = 0.0
    kept: bool = True
    """Whether it is worth keeping on the disk: the run has ended, and could be read."""


class RunTable:
    """The runs of one folder. Any thread may ask."""

    def __init__(self, runs_dir: str | Path = "runs") -> None:
        """Reads nothing yet."""
        self.runs_dir = Path(runs_dir).expanduser()
        self.kept = self.runs_dir / ".workbench" / "runs.json"
        self._lock = threading.RLock()
        self._one_fills = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._rows: dict[str, tuple[tuple[int, ...], RunRow]] = {}
        self._tails: dict[str, TailReader] = {}
        self._loaded = False
        self._unsaved = False
        self._saved_at = 0.0

    def rows(self) -> list[RunRow]:
        """All runs, the newest first.

        Raises:
            ValueError: the folder is none, or can't be read.
        """
        with self._lock:
            self._load()
            found = [self._row(folder) for folder in list_run_folders(self.runs_dir)]
            there = {row.run_id for row in found}
            for gone in self._known.keys() - there:
                del self._known[gone]
                self._unsaved = True
            for cache in (self._rows, self._tails):
                for gone in list(cache.keys() - there):
                    cache.pop(gone, None)  # a thread that fills may have taken it
            return sorted(found, key=lambda row: (row.created, row.run_id), reverse=True)

    def fill(self, budget_seconds: float = 0.2) -> bool:
        """Work out missing figures, of the newest runs first and of long ones last; returns whether some are missing.

        Args:
            budget_seconds: After so long it stops between two runs.
        """
        with self._one_fills:
            return self._fill(time.monotonic() + budget_seconds)

    def _fill(self, end: float) -> bool:
        missing = [row for row in self.rows() if not row.complete and row.problem is None]
        for row in sorted(missing, key=self._is_long):
            if time.monotonic() > end or is_reading_long_run():
                self._save()
                return True
            known = self._known.get(row.run_id)
            if not row.has_ended and known is not None and time.monotonic() - known.at < _AGAIN_SECONDS:
                continue
            self._work_out(self.runs_dir / row.run_id)
        # Also with nothing missing: what was worked out last came too soon after the last time it was saved.
        self._save()
        if missing:
            give_back_memory()
        return False

    def _is_long(self, row: RunRow) -> bool:
        return size_of(Run(self.runs_dir / row.run_id).layout.memory_trace(0)) > _LONG_BYTES

    def _row(self, folder: Path) -> RunRow:
        run = Run(folder)
        figures_key = _key(run)
        key = (*figures_key, *_stamp(run.layout.notes_json))
        before = self._rows.get(run.run_id)
        known = self._known.get(run.run_id)
        same = before is not None and before[0] == key and before[1].has_ended
        if before is not None and same and before[1].complete == (known is not None and known.key == figures_key):
            return before[1]
        row = self._make_row(run, figures_key)
        self._rows[run.run_id] = (key, row)
        return row

    def _make_row(self, run: Run, key: tuple[int, ...]) -> RunRow:
        try:
            status = read_status(run.layout)
            problem = None
        except ValueError as error:
            status, problem = run.status, redact(str(error))
        # Only what has not ended needs a look at processes, and what was started again by hand.
        if not status.has_ended or _restarted(run, status):
            status = run.status
        known = self._known.get(run.run_id)
        figures = {} if known is None else known.figures
        fresh = known is not None and known.key == key
        try:
            tags, notes = run.tags, run.notes
        except (ValueError, OSError):
            tags, notes = (), ""
        return RunRow(
            run_id=run.run_id,
            name=str(figures.get("name") or run.run_id),
            state=status.state,
            created=status.created,
            model=figures.get("model"),
            strategy=figures.get("strategy"),
            num_ranks=figures.get("num_ranks") or status.num_ranks,
            peak_bytes=figures.get("peak_bytes"),
            last_loss=figures.get("last_loss"),
            tokens_per_second=figures.get("tokens_per_second"),
            total_seconds=_seconds(status) if status.has_ended else _seconds_so_far(status),
            tags=tuple(map(str, tags)),
            notes=notes,
            problem=problem or (figures.get("problem") if fresh else None),
            complete=fresh and status.has_ended,
        )

    def _work_out(self, folder: Path) -> None:
        run = Run(folder)
        key = _key(run)
        try:
            figures, has_ended = self._figures(run)
        except (ValueError, OSError, KeyError) as error:
            figures, has_ended = {"problem": redact(str(error))}, True
        # What was damaged, or written by another version, may be read tomorrow.
        kept = has_ended and figures["problem"] is None
        with self._lock:
            self._known[run.run_id] = _Known(key, figures, time.monotonic(), kept)
            self._unsaved |= kept

    def _figures(self, run: Run) -> tuple[dict[str, Any], bool]:
        """The figures, and whether they are those of a run that has ended."""
        status = run.status
        tail = self._tails.pop(run.run_id, None) or TailReader(run.layout.root, max_records=_RECORDS)
        tail.poll()
        if not status.has_ended:
            self._tails[run.run_id] = tail
        trace, metrics = tail.memory(), tail.metrics()
        table = peaks(trace)
        top = fullest(table)
        loss, pace = summarize_loss(metrics), speed(metrics)
        config = config_of(run)
        rehearsal = any(bool(header.get("rehearsal")) for header in trace.headers.values())
        figures = {
            **({} if config is None else _of_config(config, rehearsal=rehearsal)),
            "num_ranks": trace.world_size or (None if config is None else config.launch.num_processes),
            "peak_bytes": None if top is None else int(top[2]),
            "last_loss": _finite(loss.last_smoothed),
            "tokens_per_second": _finite(pace.tokens_per_second),
            "total_seconds": _finite(times(status, trace, table)["total_seconds"]),
            "problem": None if config is not None else "its run.yaml can't be read",
        }
        return figures, status.has_ended

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        try:
            content = read_json_object(self.kept)
        except ValueError:
            return
        if content.get("version") != _VERSION or not isinstance(content.get("runs"), Mapping):
            return
        for run_id, kept in content["runs"].items():
            with contextlib.suppress(TypeError, KeyError, ValueError):
                self._known[str(run_id)] = _Known(tuple(map(int, kept["key"])), dict(kept["figures"]))

    def _save(self) -> None:
        with self._lock:
            if not self._unsaved or time.monotonic() - self._saved_at < _SAVE_SECONDS:
                return
            self._unsaved, self._saved_at = False, time.monotonic()
            kept = {run_id: known for run_id, known in self._known.items() if known.kept}
            runs = {run_id: {"key": known.key, "figures": known.figures} for run_id, known in kept.items()}
            # A folder that can't be written to costs the work of the next time, and nothing else.
            with contextlib.suppress(OSError):
                self.kept.parent.mkdir(exist_ok=True)
                write_json_atomic(self.kept, {"version": _VERSION, "runs": runs})


def sort_rows(rows: Iterable[RunRow], column: str, *, descending: bool = False) -> list[RunRow]:
    """Rows by one of :data:`COLUMNS` (or ``created``); what is not known comes last either way.

    Raises:
        ValueError: no such column.
    """
    if column not in {field.name for field in dataclasses.fields(RunRow)}:
        raise ValueError(f"there is no column {column!r}; runs are sorted by {', '.join(COLUMNS)}")
    known: list[RunRow] = []
    unknown: list[RunRow] = []
    for row in rows:
        value = getattr(row, column)
        (unknown if value in (None, "", ()) else known).append(row)
    known.sort(key=lambda row: _sortable(getattr(row, column)), reverse=descending)
    return known + unknown


def filter_rows(rows: Iterable[RunRow], text: str = "", state: str | None = None) -> list[RunRow]:
    """Rows in which every word of ``text`` stands somewhere, in that ``state`` if one is given."""
    words = text.lower().split()
    found = []
    for row in rows:
        if state is not None and row.state != state:
            continue
        where = " ".join(filter(None, (row.run_id, row.name, row.model, row.strategy, *row.tags, row.notes))).lower()
        if all(word in where for word in words):
            found.append(row)
    return found


def strategy_words(config: RunConfig, *, rehearsal: bool = False) -> str:
    """How a configuration spreads its model, in a few words."""
    load, stage = resolve_load_strategy(config), config.zero.zero_stage
    if load == "device_map":
        words = 'device_map="auto"'
    elif stage == 0:
        words = "data parallel"
    elif stage == 3:
        words = f"ZeRO-3, {load}" + (", in host memory" if config.zero.offload_param_device == "cpu" else "")
    else:
        words = f"ZeRO-{stage}"
    if not config.quantization.load_in_4bit:
        words += ", 16 bit"
    return f"rehearsal: {words}" if rehearsal else words


def _of_config(config: RunConfig, *, rehearsal: bool) -> dict[str, Any]:
    model = config.model.name_or_path.rstrip("/").rsplit("/", 1)[-1]
    return {
        "name": config.name,
        "model": redact(model.removeprefix("random:")),
        "strategy": strategy_words(config, rehearsal=rehearsal),
    }


def _key(run: Run) -> tuple[int, ...]:
    """Changes when a run's figures do, as far as a few looks at the disk tell; tags and notes are not among them."""
    layout = run.layout
    watched = (layout.run_yaml, layout.status_json, layout.memory_trace(0), layout.metrics)
    return tuple(number for path in watched for number in _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    """When a file was written to, and its bytes."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _restarted(run: Run, status: Status) -> bool:
    """Whether a rank has written after the end that the status tells of."""
    ended = _moment(status.ended)
    try:
        return ended is not None and run.layout.memory_trace(0).stat().st_mtime > ended + 0.001
    except OSError:
        return False


def _seconds(status: Status) -> float | None:
    started, ended = _moment(status.started), _moment(status.ended)
    return None if started is None or ended is None else ended - started


def _seconds_so_far(status: Status) -> float | None:
    started = _moment(status.started)
    return None if started is None or status.state != "running" else max(0.0, time.time() - started)


def _moment(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value or value in (float("inf"), float("-inf")) else float(value)


def _sortable(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
