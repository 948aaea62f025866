"""Checks of everything that a run reads: the model's files, the tokenizer with its chat template, the data."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import RunConfig
from .data_files import DataFacts, inspect_source
from .issue import Issue
from .model_files import check_model
from .tokenizer_files import check_template, check_tokenizer, find_template


@dataclass(frozen=True)
class Inputs:
    """What the files of a run have shown, and what is wrong with them."""

    issues: tuple[Issue, ...]
    data: DataFacts
    eval_data: DataFacts | None  # None: no source of its own


def inspect_inputs(config: RunConfig) -> Inputs:
    """Look at every local file that the run will read. Hub names are not looked up."""
    issues = [*check_model(config), *check_tokenizer(config)]
    data = inspect_source("data.source", config.data.source, config.data)
    issues += data.issues
    eval_data = None
    if config.data.eval_source is not None:
        eval_data = inspect_source("data.eval_source", config.data.eval_source, config.data)
        issues += eval_data.issues
        if data.layout and eval_data.layout and data.layout != eval_data.layout:
            issues.append(
                Issue(
                    "eval-layout",
                    "error",
                    "data.eval_source",
                    f"has the layout {eval_data.layout}, and data.source has {data.layout}; they must agree",
                )
            )
    template, template_issues = find_template(config)
    issues += [*template_issues, *check_template(config, template, is_chat=data.is_chat)]
    return Inputs(tuple(issues), data, eval_data)
