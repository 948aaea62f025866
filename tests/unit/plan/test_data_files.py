from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import RunConfig, with_changes
from qz3_widgets.plan import Issue, data_rows
from qz3_widgets.plan.data_files import DataFacts, inspect_source

from .conftest import CHAT, WriteLines

PAIR = {"prompt": "a", "completion": "b"}
CHAT_PAIR = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}


def look(source: str | Path, **changes: Any) -> DataFacts:
    data = with_changes(RunConfig(), {f"data.{name}": value for name, value in changes.items()}).data
    return inspect_source("data.source", str(source), data)


def only(facts: DataFacts, rule: str, severity: str = "error") -> Issue:
    assert [(issue.rule, issue.severity, issue.field) for issue in facts.issues] == [(rule, severity, "data.source")]
    return facts.issues[0]


# Sources that are fine


@pytest.mark.parametrize(
    "row,layout,is_chat",
    [
        (CHAT, "messages", True),
        (PAIR, "prompt_completion", False),
        (CHAT_PAIR, "prompt_completion", True),
        ({"text": "a", "id": 1}, "text", False),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages", True),
    ],
)
def test_json_lines(write_lines: WriteLines, row: dict[str, Any], layout: str, is_chat: bool) -> None:
    assert look(write_lines(row, "", row)) == DataFacts(layout=layout, is_chat=is_chat, num_examples=2)  # type: ignore[arg-type]


def test_a_list_in_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([CHAT, CHAT], indent=2), encoding="utf-8")
    assert look(file).num_examples == 2
    file.write_text("\ufeff " + json.dumps([CHAT, CHAT, CHAT]), encoding="utf-8")
    assert look(file) == DataFacts(layout="messages", is_chat=True, num_examples=3)


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('prompt,completion\n"a, b","c\nd"\n\ne,f\n', encoding="utf-8-sig")
    assert look(file) == DataFacts(layout="prompt_completion", is_chat=False, num_examples=2)


def test_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("one\n\ntwo", encoding="utf-8")
    assert look(file) == DataFacts(layout="text", is_chat=False, num_examples=2)


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), file)


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    write_parquet(file, {"messages": [CHAT["messages"]] * 5000})
    assert look(file) == DataFacts(layout="messages", is_chat=True, num_examples=5000)


def test_a_folder(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    assert look(tmp_path).num_examples == 2


def test_a_hub_dataset_is_not_looked_up() -> None:
    assert look("user/data") == DataFacts(is_local=False)
    assert look("user/data", layout="messages") == DataFacts(layout="messages", is_chat=True, is_local=False)
    assert look("user/data", layout="text") == DataFacts(layout="text", is_local=False)


# Sources that can't be found or read


def test_missing(tmp_path: Path) -> None:
    assert "does not exist" in only(look(tmp_path / "data.jsonl"), "data-not-found").message


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.txt"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert only(look(tmp_path / name), "data-empty").message == f"{name} is empty: it has no examples"


def test_empty_lists_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-8")
    (tmp_path / "a.csv").write_text("prompt,completion\n", encoding="utf-8")
    write_parquet(tmp_path / "a.parquet", {"text": []})
    for name in ("a.json", "a.csv", "a.parquet"):
        only(look(tmp_path / name), "data-empty")


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.txt"])
def test_not_utf_8(tmp_path: Path, name: str) -> None:
    good = {"data.jsonl": b'{"text": "a"}\n', "data.csv": b"text,id\n", "data.txt": b"a\n"}[name]
    (tmp_path / name).write_bytes(good * 16 + b'{"text": "caf\xe9"}\n' + good)
    message = only(look(tmp_path / name), "data-malformed").message
    assert message.startswith(f"{name}, line 17: is not UTF-8 text (byte 0xe9 at position 14)")


def test_utf_16(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text\na\n", encoding="utf-16")
    assert "is UTF-16; save it as UTF-8" in only(look(tmp_path / "data.csv"), "data-malformed").message


@pytest.mark.parametrize(
    "line,words",
    [
        ('{"text": "a"', "is not valid JSON: Expecting ',' delimiter at column 1"),
        ("{'text': 'a'}", "JSON wants double quotes"),
        ("{", "each example must stand on one line"),
        ("[1]", "is a list, not an object"),
        ("3", "is a number, not an object"),
        ('"a"', "is text, not an object"),
        ("null", "is null, not an object"),
        ("hello", "is not valid JSON"),
        (r'{"text": "\ud800"}', "half a character"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(write_lines: WriteLines, line: str, words: str) -> None:
    rows: list[Any] = [{"text": "a"}] * 16
    message = only(look(write_lines(*rows, line, *rows)), "data-malformed").message
    assert message.startswith("data.jsonl, line 17: ")
    assert words in message


def test_all_malformed_lines_are_counted(write_lines: WriteLines) -> None:
    good = {"text": "a"}
    message = only(look(write_lines(good, "x", good, "y", "z", "w", "v")), "data-malformed").message
    assert message.startswith("data.jsonl, line 2: ")
    assert message.endswith("4 more places are wrong (line 4, line 5, line 6, ...)")
    assert "1 more place is wrong" in only(look(write_lines(good, "x", "y")), "data-malformed").message


def test_malformed_lists(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('[\n{"text": "a"},\n{"text": }\n]', encoding="utf-8")
    assert only(look(file), "data-malformed").message.startswith("data.json, line 3: is not valid JSON")
    file.write_text('[{"text": "a"}, 3]', encoding="utf-8")
    assert only(look(file), "data-malformed").message.startswith("data.json, item 2: is a number")


@pytest.mark.parametrize(
    "text,words",
    [
        ("prompt,completion\na,b\nc\n", "line 3: has 1 values, but the header names 2 columns"),
        ("prompt,completion\na,b,c\n", "line 2: has 3 values, but the header names 2 columns"),
        ('prompt,completion\n"a\nb",c\nd,e,f\n', "line 4: has 3 values"),
        ('prompt,completion\na,"b\nc\n', 'line 2: a double quote (") is not closed'),
        ('prompt,completion\n"a"b,c\n', "line 2: is not valid CSV"),
        ("text,text\na,b\n", "line 1: the column text stands twice"),
    ],
)
def test_malformed_csv(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text, encoding="utf-8")
    assert f"data.csv, {words}" in only(look(file), "data-malformed").message


def test_malformed_parquet(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1 and nothing else")
    assert "data.parquet: can't be read as Parquet" in only(look(file), "data-malformed").message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(write_lines: WriteLines) -> None:
    file = write_lines(CHAT)
    file.chmod(0)
    assert "can't be read: Permission denied" in only(look(file), "data-malformed").message


# Rows that do not fit the layout


def test_no_layout_fits_and_a_change_is_offered(write_lines: WriteLines) -> None:
    issue = only(look(write_lines({"instruction": "a", "output": "b"})), "data-columns")
    assert "no layout fits the columns instruction, output" in issue.message
    assert issue.fix == {"data.prompt_column": "instruction", "data.completion_column": "output"}
    fixed = look(
        write_lines({"instruction": "a", "output": "b"}), prompt_column="instruction", completion_column="output"
    )
    assert fixed.issues == ()
    assert only(look(write_lines({"a": 1, "b": 2})), "data-columns").fix is None


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_missing_columns_in_tables(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("csv"):
        file.write_text("prompt,answr\na,b\n", encoding="utf-8")
    else:
        write_parquet(file, {"prompt": ["a"], "answr": ["b"]})
    message = only(look(file, layout="prompt_completion"), "data-columns").message
    assert "needs the column completion; there are prompt, answr" in message


def test_mixed_layouts(write_lines: WriteLines) -> None:
    message = only(look(write_lines(CHAT, CHAT, {"text": "a"}, PAIR)), "data-layout").message
    assert message.startswith("data.jsonl, line 3: has no messages, but text; every example needs the same layout")
    assert "1 more place is wrong (line 4)" in message


@pytest.mark.parametrize(
    "value,words",
    [
        ("hello", "is text, not a list of messages"),
        ([], "is an empty list"),
        (["hello"], "has text as message 1"),
        ([{"role": "user"}], "has no content in message 1"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "has no role in message 2"),
        ([{"role": "user", "content": ["a"]}], "has a list as content of message 1, not text"),
        ([{"role": 1, "content": "a"}], "has a number as role of message 1"),
        ([{"role": "user", "content": None}], "has no content in message 1"),
        ([{"from": "human", "value": "a"}], "has messages of {from, value}; rename them to {role, content}"),
    ],
)
def test_chats_of_the_wrong_form(write_lines: WriteLines, value: Any, words: str) -> None:
    message = only(look(write_lines(CHAT, {"messages": value})), "data-layout").message
    assert message.startswith(f"data.jsonl, line 2: messages {words}")


def test_chats_in_csv(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('messages\n"[{}]"\n', encoding="utf-8")
    assert "a CSV file can't hold chats" in only(look(tmp_path / "data.csv"), "data-layout").message


@pytest.mark.parametrize(
    "row,words",
    [
        ({"prompt": 1, "completion": "b"}, "prompt is a number"),
        ({"prompt": "a", "completion": ["b"]}, "completion is a list where"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "completion is text where"),
        ({"prompt": "a", "completion": None}, "has no completion, but prompt"),
    ],
)
def test_pairs_of_the_wrong_form(write_lines: WriteLines, row: Any, words: str) -> None:
    assert words in only(look(write_lines(row)), "data-layout").message


def test_pairs_must_all_be_alike(write_lines: WriteLines) -> None:
    assert "line 2: prompt is a list where" in only(look(write_lines(PAIR, CHAT_PAIR)), "data-layout").message
    assert "line 2: prompt is text where" in only(look(write_lines(CHAT_PAIR, PAIR)), "data-layout").message
    broken = {"prompt": [{"role": "user"}], "completion": CHAT_PAIR["completion"]}
    assert "prompt has no content in message 1" in only(look(write_lines(broken)), "data-layout").message


def test_text_that_is_none(write_lines: WriteLines) -> None:
    assert (
        "line 2: text is a number, not text"
        in only(look(write_lines({"text": "a"}, {"text": 3})), "data-layout").message
    )


def test_examples_with_nothing_to_learn(write_lines: WriteLines) -> None:
    issue = only(look(write_lines({"text": "a"}, {"text": " "}, {"text": ""})), "data-empty-examples", "warning")
    assert issue.message == "2 of 3 examples have nothing to learn from; the first is data.jsonl, line 2"
    only(look(write_lines(PAIR, {"prompt": "a", "completion": ""})), "data-empty-examples", "warning")


def test_what_the_loss_counts_must_be_there(write_lines: WriteLines) -> None:
    user = {"messages": [{"role": "user", "content": "a"}]}
    message = only(look(write_lines(CHAT, user), loss_on="assistant"), "data-layout").message
    assert "line 2: has no turn of the assistant" in message
    assert (
        "line 2: has a single turn" in only(look(write_lines(CHAT, user), loss_on="completion"), "data-layout").message
    )
    ends = {"messages": [*CHAT["messages"], {"role": "user", "content": "Bye"}]}
    issue = only(look(write_lines(CHAT, ends), loss_on="completion"), "data-last-turn", "warning")
    assert "in 1 chats" in issue.message
    assert look(write_lines(CHAT, user, ends)).issues == ()


# Size and memory


def test_big_sources_are_checked_in_part(
    write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        data_rows.Budget, "__init__", lambda self: self.__dict__.update(lines=10, size=10_000, complete=True)
    )
    facts = look(write_lines(*[{"text": "a"}] * 10, "broken", name="a.jsonl"))
    assert (facts.issues, facts.layout, facts.num_examples) == ((), "text", None)
    assert look(write_lines({"text": "a" * 20_000}, name="b.jsonl")).issues == ()
    (tmp_path / "c.json").write_text(json.dumps([{"text": "a" * 20_000}]), encoding="utf-8")
    assert look(tmp_path / "c.json").issues == ()


def test_a_source_is_read_again_only_when_it_changes(write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(CHAT)
    assert look(file).num_examples == 1
    from qz3_widgets.plan import data_files

    reads: list[Path] = []
    real = data_files.read_rows
    monkeypatch.setattr(data_files, "read_rows", lambda path, *rest: (reads.append(path), real(path, *rest))[1])
    assert look(file).num_examples == 1
    assert reads == []
    write_lines(CHAT, CHAT)
    assert look(file).num_examples == 2
    assert reads == [file]
