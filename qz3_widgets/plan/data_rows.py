"""Rows of a data file, one after the other, with the place of each and of whatever can't be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..units import MIB

MAX_LINES = 200_000
MAX_BYTES = 64 * MIB
MAX_PARQUET_ROWS = 2_000
"""How much of one source is looked at: what lies beyond is left to the run."""


@dataclass(frozen=True)
class Row:
    """One example as it stands in the file."""

    place: str  # "line 17", "item 17", "row 17"; from 1
    values: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A place that can't be read; an empty ``place`` is the whole file."""

    place: str
    message: str


@dataclass
class Budget:
    """What may still be read of a source. ``complete`` turns false when something was left out."""

    lines: int = MAX_LINES
    size: int = MAX_BYTES
    complete: bool = True

    def spend(self, num_bytes: int) -> bool:
        """Take one line of ``num_bytes`` from the budget; false if it is used up."""
        self.lines -= 1
        self.size -= num_bytes
        if self.lines < 0 or self.size < 0:
            self.complete = False
        return self.complete


def read_rows(path: Path, source_format: str, budget: Budget) -> Iterator[Row | Fault]:
    """Rows of a ``jsonl``, ``csv``, ``parquet`` or ``text`` file, as far as ``budget`` goes."""
    readers: dict[str, Callable[[Path, Budget], Iterator[Row | Fault]]] = {
        "jsonl": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "text": _read_text,
    }
    try:
        yield from readers[source_format](path, budget)
    except _UndecodableError as error:
        yield Fault(error.place, str(error))
    except OSError as error:
        yield Fault("", f"can't be read: {error.strerror or error}")


class _UndecodableError(ValueError):
    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def _lines(path: Path, budget: Budget) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers, line ends kept."""
    with open(path, "rb") as file:
        number = 0
        # A limit, so that a file without line breaks is not read whole.
        while data := file.readline(MAX_BYTES + 1):
            number += 1
            if not budget.spend(len(data)):
                return
            if number == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise _UndecodableError("", "is UTF-16; save it as UTF-8")
            try:
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _UndecodableError(
                    f"line {number}",
                    f"is not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start + 1}); "
                    "save the file as UTF-8",
                ) from error


def _read_text(path: Path, budget: Budget) -> Iterator[Row | Fault]:
    for number, line in _lines(path, budget):
        if line.strip():
            yield Row(f"line {number}", {"text": line.rstrip("\r\n")})


def _read_json(path: Path, budget: Budget) -> Iterator[Row | Fault]:
    with open(path, "rb") as file:
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    if is_list:
        yield from _read_json_list(path, budget)
        return
    for number, line in _lines(path, budget):
        if line.strip():
            place = f"line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Fault(place, _json_message(error, line))
            else:
                yield _object(place, value, line)


def _read_json_list(path: Path, budget: Budget) -> Iterator[Row | Fault]:
    if path.stat().st_size > budget.size:
        budget.complete = False
        return
    text = "".join(line for _, line in _lines(path, budget))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        yield Fault(place, _json_message(error, ""))
        return
    for number, value in enumerate(values, start=1):
        yield _object(f"item {number}", value, json.dumps(value))


def _object(place: str, value: Any, text: str) -> Row | Fault:
    if not isinstance(value, dict):
        return Fault(place, f"is {kind_of(value)}, not an object with named values: {{...}}")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault(place, "holds half a character (a single \\ud8xx escape), which is no Unicode text")
    return Row(place, value)


def _json_message(error: Exception, line: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error})"
    hint = ""
    if line.strip() in ("{", "[", "{ "):
        hint = "; each example must stand on one line"
    elif line.lstrip()[:2] in ("{'", "{ "):
        hint = '; JSON wants double quotes: {"text": "..."}'
    return f"is not valid JSON: {error.msg} at column {error.colno}{hint}"


def _read_csv(path: Path, budget: Budget) -> Iterator[Row | Fault]:
    before = csv.field_size_limit(MAX_BYTES)
    try:
        reader = csv.reader((line for _, line in _lines(path, budget)), strict=True)
        header: list[str] | None = None
        begin = 1
        try:
            for values in reader:
                place, begin = f"line {begin}", reader.line_num + 1
                if not values:
                    continue
                if header is None:
                    header = values
                    twice = sorted({name for name in header if header.count(name) > 1})
                    if twice:
                        yield Fault(place, f"the column {', '.join(twice)} stands twice")
                        return
                elif len(values) != len(header):
                    yield Fault(
                        place,
                        f"has {len(values)} values, but the header names {len(header)} columns; "
                        "a value that holds a comma or a line break goes in double quotes",
                    )
                else:
                    yield Row(place, dict(zip(header, values, strict=True)))
        except csv.Error as error:
            open_quote = "unexpected end of data" in str(error)
            message = 'a double quote (") is not closed' if open_quote else f"is not valid CSV: {error}"
            yield Fault(f"line {begin}", message)
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, _budget: Budget) -> Iterator[Row | Fault]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
                if number >= MAX_PARQUET_ROWS:
                    return
    except pa.ArrowException as error:
        yield Fault("", f"can't be read as Parquet: {str(error).splitlines()[0]}")


def count_parquet_rows(path: Path) -> int | None:
    """Rows of a Parquet file, from its footer; ``None`` if it can't be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None


def kind_of(value: Any) -> str:
    """What a value is, in words: ``"a number"``, ``"a list"``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    for kind, word in ((str, "text"), (int | float, "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return word
    return f"a {type(value).__name__}"
