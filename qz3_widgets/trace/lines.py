"""JSON Lines into columns: fast where the lines are whole, tolerant where they are not.

The fast way is Arrow's reader with an explicit schema, in pieces of some megabytes. A piece that it refuses is read
line by line, and what can't be read is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

PIECE_BYTES = 16 * 2**20
_BLOCK_BYTES = 2**20


@dataclass
class Batch:
    """What one piece of a file holds."""

    records: pa.Table
    """Records of the wanted kind, in file order, columns as in the schema."""
    others: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Headers and end records: how many records of this piece stand before it, and the line itself."""
    num_damaged: int = 0
    """Lines that are no record: torn, overwritten, of wrong types."""


def read_pieces(path: Path, offset: int = 0, *, whole_file: bool = True) -> Iterator[tuple[bytes, int]]:
    """Yield ``(data, offset behind it)``; each piece ends with a newline.

    What stands behind the last newline is yielded only if ``whole_file`` and it is a whole JSON object: a writer may be
    in the middle of it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        rest = b""
        while piece := file.read(PIECE_BYTES):
            # To the end of the line, so that nothing has to be cut and copied.
            data = piece if piece.endswith(b"\n") else b"".join((piece, file.readline()))
            if not data.endswith(b"\n"):  # the last line, without its end
                cut = data.rfind(b"\n") + 1
                data, rest = data[:cut], data[cut:]
            if data:
                offset += len(data)
                yield data, offset
    if whole_file and rest.startswith(b"{") and _objects(rest) is not None:
        yield rest + b"\n", offset + len(rest)


def parse(data: bytes, kind: str, schema: pa.Schema) -> Batch:
    """Read whole lines.

    Args:
        data: Lines, the last one with its newline.
        kind: Value of ``kind`` in the records that are wanted as rows.
        schema: Columns to read; ``kind`` is among them. Further keys are ignored.
    """
    batch = _parse_fast(data, kind, schema)
    if batch is not None:
        return batch
    parts = [_parse_fast(block, kind, schema) or _parse_block(block, kind, schema) for block in _blocks(data)]
    joined = Batch(pa.concat_tables([part.records for part in parts]))
    before = 0
    for part in parts:
        joined.others += [(before + at, line) for at, line in part.others]
        joined.num_damaged += part.num_damaged
        before += part.records.num_rows
    return joined


def _parse_fast(data: bytes, kind: str, schema: pa.Schema) -> Batch | None:
    # Arrow takes a line "null" for an empty row, and crashes (pyarrow 26) if a block holds nothing else.
    if not data.startswith(b"{") or b"\nnull" in data:
        return None
    try:
        table = pa.json.read_json(
            pa.BufferReader(data),
            read_options=pa.json.ReadOptions(block_size=4 * 2**20),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            memory_pool=pa.system_memory_pool(),  # others keep what they had: a long run would fill a notebook's kernel
        )
        for column in schema:
            if pa.types.is_string(column.type):
                pc.unique(table[column.name]).to_pylist()  # Arrow does not look whether its strings are UTF-8
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    kinds = table["kind"]
    if kinds.null_count:
        return None
    wanted = pc.equal(kinds, kind)
    other_rows = np.flatnonzero(~wanted.to_numpy())
    if len(other_rows) == 0:
        return Batch(table)
    lines = _lines_at(data, other_rows, table.num_rows)
    if lines is None:
        return None
    others = [(int(row) - i, line) for i, (row, line) in enumerate(zip(other_rows, lines, strict=True))]
    return Batch(table.filter(wanted), [(at, line) for at, line in others if line["kind"] in ("header", "end")])


def _lines_at(data: bytes, rows: np.ndarray[Any, np.dtype[np.intp]], num_rows: int) -> list[dict[str, Any]] | None:
    """The JSON objects in the given rows, or ``None`` where rows are not lines one to one."""
    if set(rows.tolist()) <= {0, num_rows - 1}:  # the usual file: a header, records, an end
        first = data[: data.index(b"\n")]
        last = data[data.rfind(b"\n", 0, len(data) - 1) + 1 :]
        texts = [first if row == 0 else last for row in rows.tolist()]
    else:
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        if len(ends) != num_rows:
            return None
        starts = np.concatenate([[0], ends[:-1] + 1])
        texts = [data[starts[row] : ends[row]] for row in rows.tolist()]
    lines = [objects[0] for text in texts if (objects := _objects(text)) and isinstance(objects[0].get("kind"), str)]
    return lines if len(lines) == len(texts) else None


def _parse_block(data: bytes, kind: str, schema: pa.Schema) -> Batch:
    """Sort out the lines that are no JSON, and read the others fast if that goes."""
    good: list[bytes] = []
    num_damaged = 0
    for line in data.split(b"\n"):
        if _is_object(line):
            good.append(line.strip())
        elif objects := _objects(line):
            good += [json.dumps(value).encode() for value in objects]
        elif line.strip():
            num_damaged += 1
    batch = _parse_fast(b"\n".join([*good, b""]), kind, schema) if good else None
    if batch is None:
        return _parse_lines(data, kind, schema)
    batch.num_damaged = num_damaged
    return batch


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_lines(data: bytes, kind: str, schema: pa.Schema) -> Batch:
    rows: list[dict[str, Any]] = []
    batch = Batch(schema.empty_table())
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        objects = _objects(line)
        if objects is None:
            batch.num_damaged += 1
            continue
        for value in objects:
            if value.get("kind") == kind:
                row = _row(value, schema)
                if row is None:
                    batch.num_damaged += 1
                else:
                    rows.append(row)
            elif value.get("kind") in ("header", "end"):
                batch.others.append((len(rows), value))
            elif not isinstance(value.get("kind"), str):
                batch.num_damaged += 1
    if rows:
        batch.records = pa.Table.from_pylist(rows, schema=schema)
    return batch


def _objects(text: bytes) -> list[dict[str, Any]] | None:
    """All JSON objects of one line (two, where a newline was lost); ``None`` if there is anything else in it."""
    decoder, found, at = json.JSONDecoder(), [], 0
    try:
        line = text.decode().strip()
        while at < len(line):
            value, at = decoder.raw_decode(line, at)
            if not isinstance(value, dict):
                return None
            found.append(value)
    except (ValueError, RecursionError):
        return None
    return found


def _row(value: dict[str, Any], schema: pa.Schema) -> dict[str, Any] | None:
    """The columns of ``schema``, or ``None`` if one has the wrong type."""
    row: dict[str, Any] = {}
    for column in schema:
        item = value.get(column.name)
        if item is None:
            continue
        if pa.types.is_string(column.type):
            fits = isinstance(item, str) and item.isprintable()
        else:
            fits = isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 2**63
            if fits and pa.types.is_integer(column.type):
                fits = float(item).is_integer()
                item = int(item)
        if not fits:
            return None
        row[column.name] = item
    return row


def _blocks(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + _BLOCK_BYTES) + 1
        yield data[start : end or None]
        start = end or len(data)
