from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import DataSection
from qz3_widgets.config.data_layout import (
    list_data_files,
    looks_like_path,
    num_held_out,
    resolve_layout,
    resolve_source_format,
    suggest_columns,
)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n", encoding="utf-8")


@pytest.mark.parametrize(
    "name,expected",
    [
        ("a.jsonl", "jsonl"),
        ("a.JSON", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
        ("a.txt", "text"),
    ],
)
def test_auto_goes_by_the_ending(tmp_path: Path, name: str, expected: str) -> None:
    touch(tmp_path / name)
    assert resolve_source_format(str(tmp_path / name), "auto") == expected
    assert list_data_files(str(tmp_path / name), "auto") == [tmp_path / name]


def test_what_is_no_path_is_a_hub_dataset() -> None:
    assert resolve_source_format("trl-lib/Capybara", "auto") == "hub"
    assert resolve_source_format("squad", "auto") == "hub"
    assert resolve_source_format("anything.csv", "hub") == "hub"
    with pytest.raises(ValueError, match="hub dataset"):
        list_data_files("trl-lib/Capybara", "auto")


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "~/zz/missing", "/zz/missing", "a/b/c"])
def test_what_looks_like_a_path_must_exist(source: str) -> None:
    assert looks_like_path(source)
    with pytest.raises(ValueError, match="does not exist"):
        resolve_source_format(source, "auto")


def test_a_file_beside_it_is_suggested(tmp_path: Path) -> None:
    touch(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"did you mean .*train\.jsonl\?"):
        resolve_source_format(str(tmp_path / "trian.jsonl"), "auto")


def test_a_name_in_a_folder_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path("models/llama")
    (tmp_path / "models").mkdir()
    assert looks_like_path("models/llama")
    assert looks_like_path("models")


def test_a_given_format_needs_no_ending(tmp_path: Path) -> None:
    touch(tmp_path / "data.log")
    with pytest.raises(ValueError, match=r"the ending \.log says nothing; set data.source_format"):
        resolve_source_format(str(tmp_path / "data.log"), "auto")
    assert resolve_source_format(str(tmp_path / "data.log"), "text") == "text"
    with pytest.raises(ValueError, match="does not exist"):
        resolve_source_format(str(tmp_path / "other.log"), "text")


def test_a_folder_gives_its_files_of_one_format(tmp_path: Path) -> None:
    touch(
        tmp_path / "b.jsonl",
        tmp_path / "a.json",
        tmp_path / ".hidden.jsonl",
        tmp_path / "README.md",
        tmp_path / "s" / "c.jsonl",
    )
    assert resolve_source_format(str(tmp_path), "auto") == "jsonl"
    assert [file.name for file in list_data_files(str(tmp_path), "auto")] == ["a.json", "b.jsonl"]
    touch(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="several formats: set data.source_format to one of jsonl, csv"):
        resolve_source_format(str(tmp_path), "auto")
    assert [file.name for file in list_data_files(str(tmp_path), "csv")] == ["c.csv"]
    with pytest.raises(ValueError, match=r"without files that end in \.parquet"):
        list_data_files(str(tmp_path), "parquet")


def test_a_folder_without_data(tmp_path: Path) -> None:
    touch(tmp_path / "README.md")
    with pytest.raises(ValueError, match="is a folder without data files; they end in"):
        resolve_source_format(str(tmp_path), "auto")


@pytest.mark.parametrize(
    "columns,expected",
    [
        (["messages"], "messages"),
        (["id", "messages", "text"], "messages"),
        (["prompt", "completion", "text"], "prompt_completion"),
        (["prompt", "text"], "text"),
    ],
)
def test_auto_layout(columns: list[str], expected: str) -> None:
    assert resolve_layout(columns, DataSection()) == expected


def test_a_given_layout_needs_its_columns() -> None:
    assert resolve_layout(["messages", "text"], DataSection(layout="text")) == "text"
    section = DataSection(layout="prompt_completion", prompt_column="q", completion_column="a")
    assert resolve_layout(["q", "a"], section) == "prompt_completion"
    with pytest.raises(ValueError, match="layout prompt_completion needs the column a; there are q, text"):
        resolve_layout(["q", "text"], section)


def test_no_layout_lists_the_columns_and_suggests_names() -> None:
    with pytest.raises(
        ValueError, match="no layout fits the columns a, b; one of these is needed: messages; prompt and"
    ):
        resolve_layout(["a", "b"], DataSection())
    with pytest.raises(ValueError, match=r"set data.prompt_column=instruction and data.completion_column=output\?"):
        resolve_layout(["instruction", "input", "output"], DataSection())


@pytest.mark.parametrize(
    "columns,layout,expected",
    [
        (["Question", "Answer"], "auto", {"data.prompt_column": "Question", "data.completion_column": "Answer"}),
        (["conversations"], "messages", {"data.messages_column": "conversations"}),
        (["body"], "auto", {"data.text_column": "body"}),
        (["body"], "messages", {}),
        (["a", "b"], "auto", {}),
    ],
)
def test_suggested_columns(columns: list[str], layout: str, expected: dict[str, Any]) -> None:
    assert suggest_columns(columns, layout) == expected


@pytest.mark.parametrize(
    "num,fraction,expected",
    [(100, 0.05, 5), (100, 0.0, 0), (1, 0.5, 0), (0, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.01, 1)],
)
def test_at_least_one_is_held_out_and_never_all(num: int, fraction: float, expected: int) -> None:
    assert num_held_out(num, fraction) == expected
