"""What the trainer is given, from every kind of source and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.training.data import load_examples

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config(source: Path, **changes: Any) -> RunConfig:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return with_changes(RunConfig(), {"data.source": str(source), "data.eval_fraction": 0.0, **fields})


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_chat(tmp_path: Path) -> None:
    train, held_out = load_examples(config(jsonl(tmp_path / "d.jsonl", [{"messages": CHAT, "id": 1}] * 3)))
    assert held_out is None
    assert train.column_names == ["messages"]
    assert train[0]["messages"] == CHAT


def test_csv_pair_with_columns_of_other_names(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    pd.DataFrame({"q": ["a", "b"], "a": ["c", "d"], "x": [1, 2]}).to_csv(file, index=False)
    train, _ = load_examples(
        config(file, data__layout="prompt_completion", data__prompt_column="q", data__completion_column="a")
    )
    assert train[1] == {"prompt": "b", "completion": "d"}


def test_parquet_text_column(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pd.DataFrame({"body": ["one", "two"]}).to_parquet(file)
    train, _ = load_examples(config(file, data__text_column="body", data__layout="text"))
    assert train[0] == {"text": "one"}


def test_messages_column(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [{"chat": CHAT}])
    train, _ = load_examples(config(file, data__messages_column="chat"))
    assert train[0] == {"messages": CHAT}


def test_plain_text_by_lines_and_a_format_given_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("one\ntwo\n", encoding="utf-8")
    train, _ = load_examples(config(file, data__source_format="text"))
    assert [row["text"] for row in train] == ["one", "two"]


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "many files"
    folder.mkdir()
    for name in ("a", "b"):
        jsonl(folder / f"{name}.jsonl", [{"text": name}])
    train, _ = load_examples(config(folder))
    assert sorted(row["text"] for row in train) == ["a", "b"]


def test_completion_loss_on_a_chat_splits_off_the_last_turn(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}])
    train, _ = load_examples(config(file, data__loss_on="completion"))
    assert train[0] == {"prompt": CHAT[:1], "completion": CHAT[1:]}


def test_first_examples_only(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [{"text": str(number)} for number in range(9)])
    train, _ = load_examples(config(file, data__max_examples=4))
    assert [row["text"] for row in train] == ["0", "1", "2", "3"]


def test_held_out_part_is_disjoint_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [{"text": str(number)} for number in range(40)])
    made = config(file, data__eval_fraction=0.25)
    train, held_out = load_examples(made)
    assert held_out is not None
    assert len(held_out) == 10
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert load_examples(made)[1]["text"] == held_out["text"]
    assert load_examples(with_changes(made, {"training.seed": 7}))[1]["text"] != held_out["text"]


def test_an_evaluation_source_of_its_own(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [{"text": "t"}] * 4)
    other = jsonl(tmp_path / "e.jsonl", [{"text": "e"}])
    train, held_out = load_examples(config(file, data__eval_source=str(other)))
    assert (len(train), held_out["text"]) == (4, ["e"])


@pytest.mark.parametrize(
    "content, message",
    [("", "no rows|no data|d.jsonl"), ('{"text": "a"}\n{"text": 1, "b"\n', "data.source"), ('{"x": 1}\n', "column")],
)
def test_what_can_not_be_read_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(config(file))


def test_csv_cells_are_text(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("prompt,completion\nNA,1\nnull,2\n", encoding="utf-8")
    train, _ = load_examples(config(file))
    assert [dict(row) for row in train] == [
        {"prompt": "NA", "completion": "1"},
        {"prompt": "null", "completion": "2"},
    ]
