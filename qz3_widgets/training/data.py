"""From the configured source to what TRL's trainer takes: ``messages``, ``prompt`` and ``completion``, or ``text``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset, Features, Value, load_dataset

from ..config.data_layout import list_data_files, num_held_out, resolve_layout, resolve_source_format
from ..config.schema import DataSection, RunConfig

_BUILDERS = {"jsonl": "json", "csv": "csv", "parquet": "parquet", "text": "text"}


def load_examples(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation examples; no evaluation where the configuration holds nothing out.

    Raises:
        ValueError: a source that can't be read, has no rows, or lacks the layout's columns.
    """
    data = config.data
    # One process prepares the cache files, the others read them.
    with PartialState().main_process_first():
        train = _read(data.source, data)
        if data.eval_source is not None:
            held_out = _read(data.eval_source, data)
        elif data.eval_fraction > 0 and len(train) > 1:
            count = num_held_out(len(train), data.eval_fraction)
            parts = train.train_test_split(test_size=count, seed=config.training.seed)
            train, held_out = parts["train"], parts["test"]
        else:
            held_out = None
    return train, held_out


def _read(source: str, data: DataSection) -> Dataset:
    source_format = resolve_source_format(source, data.source_format)
    rows: Dataset
    if source_format == "hub":
        rows = load_dataset(source, data.hub_config, split=data.split)
    else:
        files = [str(path) for path in list_data_files(source, source_format)]
        try:
            options = _csv_options(files[0]) if source_format == "csv" else {}
            rows = load_dataset(_BUILDERS[source_format], data_files=files, split="train", **options)
        except Exception as error:  # the readers of `datasets` raise their own kinds; all mean an unreadable file
            raise ValueError(f"data.source: {source}: {type(error).__name__}: {error}") from error
    if len(rows) == 0:
        raise ValueError(f"data.source: {source} has no rows")
    if data.max_examples is not None:
        rows = rows.select(range(min(data.max_examples, len(rows))))
    return _shape(rows, data, source)


def _csv_options(file: str) -> dict[str, Any]:
    """Cells are text: by default "NA" would be a missing value, and a column of digits a column of numbers."""
    with open(file, encoding="utf-8-sig", newline="") as opened:
        columns = next(csv.reader(opened), [])
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in columns})}


def _shape(rows: Dataset, data: DataSection, source: str) -> Dataset:
    layout = resolve_layout(rows.column_names, data)
    wanted = {
        "messages": {data.messages_column: "messages"},
        "prompt_completion": {data.prompt_column: "prompt", data.completion_column: "completion"},
        "text": {data.text_column: "text"},
    }[layout]
    missing = [name for name in wanted if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"data.source: {Path(source).name} has no column {', '.join(missing)}; "
            f"it has {', '.join(rows.column_names)}"
        )
    rows = rows.select_columns(list(wanted)).rename_columns({old: new for old, new in wanted.items() if old != new})
    if layout == "messages" and data.loss_on == "completion":
        # The last turn is the completion, all before it the prompt.
        rows = rows.map(_split_last_turn, remove_columns="messages")
    return rows


def _split_last_turn(example: dict[str, Any]) -> dict[str, Any]:
    messages = cast("list[dict[str, str]]", example["messages"])
    return {"prompt": messages[:-1], "completion": messages[-1:]}
