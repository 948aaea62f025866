"""Whether a data source can be trained on: it is there, it can be read, and every example has the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.data_layout import (
    Layout,
    layout_columns,
    list_data_files,
    resolve_layout,
    resolve_source_format,
    suggest_columns,
)
from ..config.schema import DataSection
from .data_rows import Budget, Fault, Row, count_parquet_rows, kind_of, read_rows
from .issue import Issue
from .model_files import demo_hint


@dataclass(frozen=True)
class DataFacts:
    """What is known of one source. ``None`` means unknown: a hub dataset, or a source with faults."""

    issues: tuple[Issue, ...] = ()
    layout: Layout | None = None
    is_chat: bool | None = None  # examples are messages, and go through the chat template
    num_examples: int | None = None
    is_local: bool = True


def inspect_source(name: str, source: str, data: DataSection) -> DataFacts:
    """Read a source, as far as it takes (see :mod:`.data_rows`), and check its examples.

    What was read is remembered as long as the files stay as they are, so that a form can ask at every change.

    Args:
        name: the field that names the source, for the issues: ``"data.source"`` or ``"data.eval_source"``.
        source: the field's value.
        data: layout, columns and what the loss counts.
    """
    try:
        source_format = resolve_source_format(source, data.source_format)
        if source_format == "hub":
            known: Layout | None = None if data.layout == "auto" else data.layout
            return DataFacts(layout=known, is_chat=True if known == "messages" else None, is_local=False)
        files = tuple(list_data_files(source, source_format))
        stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except (ValueError, OSError) as error:
        return DataFacts((Issue("data-not-found", "error", name, f"{error}{demo_hint(source)}"),))
    return _inspect(name, files, source_format, data, stamps)


@dataclass
class _Findings:
    """What the rows of one source have shown so far."""

    layout: Layout | None = None
    is_chat: bool | None = None
    num_rows: int = 0
    no_layout: str = ""
    columns: tuple[str, ...] = ()
    broken: list[tuple[str, str]] = field(default_factory=list)  # place in a file, what is wrong
    unfit: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    last_not_assistant: list[str] = field(default_factory=list)


@lru_cache(maxsize=16)
def _inspect(
    name: str,
    files: tuple[Path, ...],
    source_format: str,
    data: DataSection,
    stamps: tuple[tuple[int, int], ...],  # noqa: ARG001 - a file that has changed has another, and is read again
) -> DataFacts:
    found = _Findings()
    budget = Budget()
    rows = ((file, item) for file in files if budget.complete for item in read_rows(file, source_format, budget))
    for file, item in rows:
        place = f"{file.name}, {item.place}" if item.place else file.name
        if isinstance(item, Fault):
            found.broken.append((place, item.message))
        elif not _check_row(place, item, data, source_format, found):
            break
    issues = _issues(name, data, found)
    if found.num_rows == 0 and not found.broken and budget.complete:
        issues.append(Issue("data-empty", "error", name, f"{_name(files)} is empty: it has no examples"))
    num_examples: int | None = found.num_rows if budget.complete and not found.broken and not found.no_layout else None
    if source_format == "parquet" and num_examples is not None:
        counts = [count_parquet_rows(file) for file in files]
        num_examples = None if None in counts else sum(count or 0 for count in counts)
    return DataFacts(tuple(issues), found.layout, found.is_chat, num_examples)


def _check_row(place: str, row: Row, data: DataSection, source_format: str, found: _Findings) -> bool:
    """Look at one example; false if there is no use in looking at more."""
    found.num_rows += 1
    if found.layout is None:
        found.columns = tuple(row.values)
        try:
            found.layout = resolve_layout(found.columns, data)
        except ValueError as error:
            found.no_layout = f"{place}: {error}"
            return False
    names = layout_columns(found.layout, data)
    missing = [column for column in names if row.values.get(column) is None]
    if missing:
        present = ", ".join(key for key, value in row.values.items() if value is not None) or "nothing"
        found.unfit.append(
            (place, f"has no {' and '.join(missing)}, but {present}; every example needs the same layout")
        )
        return True
    check = {"messages": _check_chat, "prompt_completion": _check_pair, "text": _check_text}[found.layout]
    message = check(row, data, found, place)
    if message and source_format == "csv" and found.layout == "messages":
        message += "; a CSV file can't hold chats, use JSON Lines"
    if message:
        found.unfit.append((place, message))
    return True


def _check_text(row: Row, data: DataSection, found: _Findings, place: str) -> str:
    found.is_chat = False
    value = row.values[data.text_column]
    if not isinstance(value, str):
        return f"{data.text_column} is {kind_of(value)}, not text"
    if not value.strip():
        found.empty.append(place)
    return ""


def _check_pair(row: Row, data: DataSection, found: _Findings, place: str) -> str:
    prompt, completion = row.values[data.prompt_column], row.values[data.completion_column]
    is_chat = isinstance(prompt, list)
    if found.is_chat is None:
        found.is_chat = is_chat
    for column, value in ((data.prompt_column, prompt), (data.completion_column, completion)):
        if isinstance(value, str):
            if is_chat or found.is_chat:
                return f"{column} is text where other examples or the other column have lists of messages"
        elif not isinstance(value, list):
            return f"{column} is {kind_of(value)}, neither text nor a list of messages"
        elif not found.is_chat:
            return f"{column} is a list where other examples or the other column have text"
        elif fault := message_fault(value):
            return f"{column} {fault}"
    if isinstance(completion, str) and not completion.strip():
        found.empty.append(place)
    return ""


def _check_chat(row: Row, data: DataSection, found: _Findings, place: str) -> str:
    found.is_chat = True
    value = row.values[data.messages_column]
    if fault := message_fault(value):
        return f"{data.messages_column} {fault}"
    roles = [message["role"] for message in value]
    if data.loss_on == "assistant" and "assistant" not in roles:
        return (
            f"has no turn of the assistant, so loss_on=assistant leaves nothing to learn; its roles are {_join(roles)}"
        )
    if data.loss_on == "completion":
        if len(roles) < 2:
            return "has a single turn; with loss_on=completion the last turn is learned from those before it"
        if roles[-1] != "assistant":
            found.last_not_assistant.append(place)
    return ""


def message_fault(value: Any) -> str:
    """What is wrong with a list of messages, or an empty text."""
    if not isinstance(value, list):
        return f"is {kind_of(value)}, not a list of messages: [{{role, content}}, ...]"
    if not value:
        return "is an empty list"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            return f"has {kind_of(message)} as message {number}, not an object with role and content"
        if "role" not in message and {"from", "value"} <= message.keys():
            return (
                "has messages of {from, value}; rename them to {role, content}, and human and gpt to user and assistant"
            )
        for key in ("role", "content"):
            # A turn that only calls a tool has no text.
            if key == "content" and message.get("tool_calls"):
                continue
            if key not in message or message[key] is None:
                return f"has no {key} in message {number}"
            if not isinstance(message[key], str):
                return f"has {kind_of(message[key])} as {key} of message {number}, not text"
    return ""


def _issues(name: str, data: DataSection, found: _Findings) -> list[Issue]:
    issues = []
    if found.broken:
        issues.append(Issue("data-malformed", "error", name, _several(found.broken)))
    if found.no_layout:
        fix = suggest_columns(found.columns, data.layout) or None
        issues.append(Issue("data-columns", "error", name, found.no_layout, fix))
    if found.unfit:
        issues.append(Issue("data-layout", "error", name, _several(found.unfit)))
    warnings: tuple[tuple[str, list[str], Callable[[int], str]], ...] = (
        ("data-empty-examples", found.empty, lambda n: f"{n} of {found.num_rows} examples have nothing to learn from"),
        (
            "data-last-turn",
            found.last_not_assistant,
            lambda n: f"with loss_on=completion the last turn is learned, and in {n} chats that is not the assistant's",
        ),
    )
    for rule, places, words in warnings:
        if places:
            issues.append(Issue(rule, "warning", name, f"{words(len(places))}; the first is {places[0]}"))
    return issues


def _name(files: tuple[Path, ...]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].parent.name}/"


def _several(faults: list[tuple[str, str]]) -> str:
    place, message = faults[0]
    same_file = place.partition(", ")[0] + ", "
    rest = [other.removeprefix(same_file) for other, _ in faults[1:]]
    if not rest:
        return f"{place}: {message}"
    more = ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else "")
    return f"{place}: {message}; {len(rest)} more {'place is' if len(rest) == 1 else 'places are'} wrong ({more})"


def _join(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))
