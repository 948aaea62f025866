"""Two or more runs against each other: what differs in their configurations, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..config.io import diff
from ..config.schema import RunConfig, field_paths
from ..runs.store import Run
from ..trace.reader import MemoryTrace
from .compare_html import comparison_html
from .measures import MEASURES, Measure, may_judge, metrics_of
from .names import config_of, label_runs
from .summary import summarize
from .wording import comparison_sentence

_CHANGES_LOSS = (
    "model.name_or_path", "model.revision", "model.tokenizer_name_or_path", "data.source", "data.source_format",
    "data.hub_config", "data.split", "data.layout", "data.messages_column", "data.prompt_column",
    "data.completion_column", "data.text_column", "data.chat_template", "data.max_length", "data.packing",
    "data.loss_on", "data.eval_source", "data.eval_fraction", "data.max_examples", "training.seed",
)  # fmt: skip
"""Fields that change what a loss is taken over: with another text, tokenizer or held-out part, losses don't compare."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, in the order given; a failed run is there with what it has."""

    run_ids: tuple[str, ...]
    labels: Mapping[str, str]
    """Run id to a short name."""
    config_diff: Mapping[str, Mapping[str, Any]]
    """``section.field`` to the value in each run; fields that are the same in all runs, and ``name``, are left out."""
    metrics: Mapping[str, Mapping[str, Any]]
    """Run id to metric to value (bytes, seconds, losses; ``None`` where there is none), and ``state``."""
    summaries: Mapping[str, Mapping[str, Any]]
    num_fields: int

    @property
    def directions(self) -> dict[str, str]:
        """Metric to ``"lower"`` or ``"higher"``, whichever is better; without those that are no better either way."""
        return {measure.name: measure.direction for measure in MEASURES if measure.direction is not None}

    @property
    def fields_of_loss(self) -> list[str]:
        """Differing fields that change what a loss is taken over."""
        return [path for path in self.config_diff if path in _CHANGES_LOSS]

    @property
    def losses_compare(self) -> bool:
        """Whether all runs take their losses over the same text in the same tokens."""
        return not self.fields_of_loss

    @property
    def notes(self) -> list[str]:
        """What to keep in mind when reading the table."""
        found = []
        if not self.losses_compare:
            fields = self.fields_of_loss
            verb = "differs" if len(fields) == 1 else "differ"
            found.append(f"The losses don't compare, no better one is marked: {', '.join(fields)} {verb}.")
        devices = {str(summary["device_name"]) for summary in self.summaries.values() if summary["device_name"]}
        if len(devices) > 1:
            found.append(f"Measured on different devices: {', '.join(sorted(devices))}.")
        for run_id in self.run_ids:
            state = self.metrics[run_id]["state"]
            if state != "succeeded":
                steps = self.metrics[run_id]["num_steps"]
                after = (
                    f" after {steps} steps" if state in ("failed", "lost", "cancelled") else f", {steps} steps so far"
                )
                found.append(f"{self.labels[run_id]}: {state}{after}; what it did not reach is not judged.")
        return found

    def better(self, metric: str) -> frozenset[str]:
        """Ids of the runs that are best by this metric; empty where it has no direction, or where all are alike.

        Runs that did not get far enough are not judged, nor are losses over different texts.

        Raises:
            ValueError: there is no such metric.
        """
        measure = next((measure for measure in MEASURES if measure.name == metric), None)
        if measure is None:
            raise ValueError(f"no metric {metric!r}; there are {', '.join(measure.name for measure in MEASURES)}")
        values = self.judged(measure)
        if measure.direction is None or len(values) < 2 or (measure.kind == "loss" and not self.losses_compare):
            return frozenset()
        best = min(values.values()) if measure.direction == "lower" else max(values.values())
        leaders = frozenset(run_id for run_id, value in values.items() if measure.same(value, best))
        return frozenset() if len(leaders) == len(values) else leaders

    def judged(self, measure: Measure) -> dict[str, float]:
        """Run id to value, of the runs that went far enough for it."""
        return {
            run_id: value
            for run_id in self.run_ids
            if (value := self.metrics[run_id][measure.name]) is not None and may_judge(measure, self.summaries[run_id])
        }

    def table(self) -> pd.DataFrame:
        """Metrics by run: a row for each metric that any run has, a column for each run id, values unformatted."""
        rows = {
            measure.name: [self.metrics[run_id][measure.name] for run_id in self.run_ids]
            for measure in MEASURES
            if any(self.metrics[run_id][measure.name] is not None for run_id in self.run_ids)
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(self.run_ids), dtype="float64")

    @property
    def sentence(self) -> str:
        """What this means, in a sentence."""
        return comparison_sentence(self)

    def to_json(self) -> dict[str, Any]:
        """What ``qz3 compare --json`` prints."""
        return {
            "config_diff": {path: dict(values) for path, values in self.config_diff.items()},
            "metrics": {run_id: dict(values) for run_id, values in self.metrics.items()},
            "directions": self.directions,
        }

    def _repr_html_(self) -> str:
        return comparison_html(self)


def compare(runs: Sequence[Run], *, traces: Mapping[str, MemoryTrace] | None = None) -> Comparison:
    """Compare runs, in the order given.

    Args:
        runs: Two or more.
        traces: Run id to its memory, for runs whose memory was read already.

    Raises:
        ValueError: fewer than two runs, or one of them twice.
    """
    run_ids = [run.run_id for run in runs]
    if len(runs) < 2:
        raise ValueError(f"compare takes two runs or more, not {len(runs)}")
    if twice := [run_id for run_id in dict.fromkeys(run_ids) if run_ids.count(run_id) > 1]:
        raise ValueError(f"compare: {', '.join(twice)} is named more than once")
    summaries = {run.run_id: summarize(run, trace=(traces or {}).get(run.run_id)) for run in runs}
    return Comparison(
        run_ids=tuple(run_ids),
        labels=label_runs(runs),
        config_diff=_config_diff({run.run_id: config_of(run) for run in runs}),
        metrics={run_id: {"state": summary["state"], **metrics_of(summary)} for run_id, summary in summaries.items()},
        summaries=summaries,
        num_fields=len(field_paths()) - 1,
    )


def _config_diff(configs: Mapping[str, RunConfig | None]) -> dict[str, dict[str, Any]]:
    """A run whose configuration can't be read has ``None`` everywhere."""
    known = [config for config in configs.values() if config is not None]
    if len(known) < 2:
        return {}
    differing = {path for config in known[1:] for path in diff(known[0], config)} - {"name"}
    plain = {run_id: None if config is None else config.model_dump(mode="json") for run_id, config in configs.items()}
    found: dict[str, dict[str, Any]] = {}
    for path in field_paths():
        if path in differing:
            section, field = path.split(".")
            found[path] = {
                run_id: None if values is None else values[section][field] for run_id, values in plain.items()
            }
    return found
