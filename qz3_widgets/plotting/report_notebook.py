"""A comparison as a notebook that draws it anew: for whoever wants to go on from it in code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..runs.files import write_text_atomic
from ..runs.store import Run


def export_notebook(runs: Run | Sequence[Run], path: Path | str) -> Path:
    """Write a notebook that opens the runs and shows them, and how they compare; returns the path.

    Args:
        runs: A run, or several in the order in which they get their colours.
        path: A file ending in ``.ipynb``; an existing one is replaced.

    Raises:
        ValueError: no runs, one of them twice, or the file can't be written; the message names it.
    """
    chosen = [runs] if isinstance(runs, Run) else list(runs)
    target = Path(path).expanduser()
    if not chosen:
        raise ValueError("a notebook needs one run or more")
    run_ids = [run.run_id for run in chosen]
    if twice := [run_id for run_id in dict.fromkeys(run_ids) if run_ids.count(run_id) > 1]:
        raise ValueError(f"{target}: {', '.join(twice)} is named more than once")
    if target.suffix.lower() != ".ipynb":
        raise ValueError(f"{target}: a notebook is written to a file that ends in .ipynb")
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name a file")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist: make it first")
    document = {
        "cells": list(_cells(chosen, target.parent.absolute())),
        "metadata": {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    try:
        write_text_atomic(target, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ValueError(f"{target} can't be written: {error.strerror or error}") from error
    return target


def _cells(runs: Sequence[Run], folder: Path) -> Iterator[dict[str, Any]]:
    places = [os.path.relpath(run.layout.root.absolute(), folder) for run in runs]
    # With a separator in it, a text is a path and not the name of a run.
    listed = "".join(f"    qz3.open_run({os.path.join('.', place)!r}),\n" for place in places)  # noqa: PTH118
    several = len(runs) > 1
    texts = [
        ("markdown", f"# {len(runs)} runs compared" if several else f"# {runs[0].run_id}"),
        ("code", f"import qz3_widgets as qz3\n\nruns = [\n{listed}]\nruns"),
    ]
    if several:
        texts += [("markdown", "## What differs, and what came of it"), ("code", "qz3.compare(runs)")]
    texts += [("markdown", "## Loss"), ("code", "qz3.plot_loss(runs)"), ("markdown", "## Memory")]
    if several:
        texts.append(("code", "qz3.plot_memory_compare(runs)"))
    for number in range(len(runs)):
        texts.append(("code", f"qz3.plot_memory(runs[{number}], index={number})"))
        texts.append(("code", f"qz3.plot_peaks(runs[{number}], index={number})"))
    texts.append(("markdown", "## Expected against measured"))
    texts += [("code", f"qz3.plot_truth(runs[{number}])") for number in range(len(runs))]
    texts += [("markdown", "## Where the time of a step goes"), ("code", "qz3.plot_time(runs)")]
    for number, (kind, text) in enumerate(texts):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"report-{number:02d}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        yield {**cell, "source": text.splitlines(keepends=True)}
