"""What a data source is and how its examples are laid out: the checks before a run and the ranks must agree on it.

Standard library only; every rank imports this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .schema import DataSection

SourceFormat = Literal["jsonl", "csv", "parquet", "text", "hub"]
Layout = Literal["messages", "prompt_completion", "text"]

ENDINGS: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Ending of a file's name to its format. A .json file holds one list of objects, or an object a line."""

# Column names of data sets in the wild that hold what we call prompt and completion, or a chat.
_PROMPT_LIKE = ("instruction", "question", "input", "query", "user")
_COMPLETION_LIKE = ("output", "answer", "response", "assistant", "target")
_CHAT_LIKE = ("conversations", "conversation", "chat", "dialogue", "dialog")


def looks_like_path(text: str) -> bool:
    """Whether ``text`` can only be meant as a path, and not as ``user/name`` on the hub.

    So are names that begin with ``.``, ``/`` or ``~``, have a backslash or more than one slash, end like a data file,
    exist, or lie in a folder that exists.
    """
    path = Path(text).expanduser()
    if text[:1] in (".", "/", "~") or "\\" in text or text.count("/") > 1 or re.match(r"[A-Za-z]:", text):
        return True
    if path.suffix.lower() in ENDINGS or path.exists():
        return True
    return "/" in text and path.parent.is_dir()


def resolve_source_format(source: str, source_format: str) -> SourceFormat:
    """The real format of a source: what ``auto`` stands for, by what is on the disk.

    Raises:
        ValueError: the source does not exist, or its format can't be told; the message says what to do.
    """
    if source_format == "hub":
        return "hub"
    path = Path(source).expanduser()
    if not path.exists():
        if source_format == "auto" and not looks_like_path(source):
            return "hub"
        raise ValueError(f"{source} does not exist{_nearest_file(path)}")
    if source_format != "auto":
        return _known_format(source_format)
    if path.is_dir():
        return _format_of_folder(path, source)
    found = ENDINGS.get(path.suffix.lower())
    if found is None:
        raise ValueError(
            f"{source}: the ending {path.suffix or '(none)'} says nothing; set data.source_format, "
            f"or name a file that ends in {', '.join(ENDINGS)}"
        )
    return found


def list_data_files(source: str, source_format: str) -> list[Path]:
    """The files of a local source, sorted by name: the file itself, or those of a folder that have the format's ending.

    Raises:
        ValueError: no such source, or a folder without such files.
    """
    real = resolve_source_format(source, source_format)
    if real == "hub":
        raise ValueError(f"{source} is a hub dataset and has no local files")
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path]
    files = [entry for entry in _data_files(path) if ENDINGS[entry.suffix.lower()] == real]
    if not files:
        endings = ", ".join(ending for ending, name in ENDINGS.items() if name == real)
        raise ValueError(f"{source} is a folder without files that end in {endings}")
    return files


def resolve_layout(columns: Sequence[str], section: DataSection) -> Layout:
    """The layout of examples that have ``columns``: what ``auto`` stands for, or the configured one.

    ``auto`` takes a chat before a prompt with its completion, and that before plain text.

    Raises:
        ValueError: the columns that the layout needs are not there; the message lists those that are.
    """
    have = set(columns)
    order: tuple[Layout, ...] = ("messages", "prompt_completion", "text")
    if section.layout != "auto":
        missing = [name for name in layout_columns(section.layout, section) if name not in have]
        if missing:
            raise ValueError(
                f"layout {section.layout} needs the column {' and '.join(missing)}; there are {_list(columns)}"
                f"{_column_hint(columns, section.layout)}"
            )
        return section.layout
    for layout in order:
        if have.issuperset(layout_columns(layout, section)):
            return layout
    wanted = "; ".join(" and ".join(layout_columns(layout, section)) for layout in order)
    hint = _column_hint(columns, "auto")
    raise ValueError(f"no layout fits the columns {_list(columns)}; one of these is needed: {wanted}{hint}")


def layout_columns(layout: str, section: DataSection) -> tuple[str, ...]:
    """Names of the columns that a layout takes its examples from."""
    return {
        "messages": (section.messages_column,),
        "prompt_completion": (section.prompt_column, section.completion_column),
        "text": (section.text_column,),
    }[layout]


def suggest_columns(columns: Sequence[str], layout: str = "auto") -> dict[str, str]:
    """Changes to the configuration that make ``columns`` fit, by what such columns are usually called; may be empty.

    For example ``{"data.prompt_column": "instruction", "data.completion_column": "output"}``.
    """
    lower = {name.lower(): name for name in columns}
    chat = [lower[name] for name in _CHAT_LIKE if name in lower]
    prompt = [lower[name] for name in ("prompt", *_PROMPT_LIKE) if name in lower]
    completion = [lower[name] for name in ("completion", *_COMPLETION_LIKE) if name in lower]
    if chat and layout in ("auto", "messages"):
        return {"data.messages_column": chat[0]}
    if prompt and completion and layout in ("auto", "prompt_completion"):
        return {"data.prompt_column": prompt[0], "data.completion_column": completion[0]}
    if len(columns) == 1 and layout in ("auto", "text"):
        return {"data.text_column": columns[0]}
    return {}


def num_held_out(num_examples: int, fraction: float) -> int:
    """How many of ``num_examples`` are held out for evaluation: at least one where there are two, never all."""
    if fraction <= 0 or num_examples < 2:
        return 0
    return min(max(1, round(num_examples * fraction)), num_examples - 1)


def _known_format(name: str) -> SourceFormat:
    for known in ENDINGS.values():
        if known == name:
            return known
    raise ValueError(f"source_format {name!r} is none of auto, hub, {', '.join(dict.fromkeys(ENDINGS.values()))}")


def _format_of_folder(folder: Path, source: str) -> SourceFormat:
    formats = dict.fromkeys(ENDINGS[entry.suffix.lower()] for entry in _data_files(folder))
    if len(formats) == 1:
        return next(iter(formats))
    if formats:
        raise ValueError(f"{source} has files of several formats: set data.source_format to one of {_list(formats)}")
    raise ValueError(f"{source} is a folder without data files; they end in {', '.join(ENDINGS)}")


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file() and entry.suffix.lower() in ENDINGS and not entry.name.startswith(".")
    )


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; nor does the folder {path.parent}"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _column_hint(columns: Sequence[str], layout: str) -> str:
    found = suggest_columns(columns, layout)
    return f"; set {' and '.join(f'{path}={name}' for path, name in found.items())}?" if found else ""


def _list(names: Sequence[str] | dict[SourceFormat, None]) -> str:
    return ", ".join(names) or "none"
