"""Losses and speed, out of a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

_LONGEST_SPAN = 8


def default_span(num_steps: int) -> int:
    """Steps to smooth a loss over: 8, and fewer in a short run, where an average would lag far behind a steep fall."""
    return min(_LONGEST_SPAN, 1 + num_steps // 8)


@dataclass(frozen=True)
class LossSummary:
    """The losses worth telling; ``None`` where there is none, NaN where the loss was not a number."""

    num_steps: int
    max_steps: int | None
    num_tokens: int | None
    first: float | None
    last: float | None
    last_smoothed: float | None
    eval_before: float | None
    """Evaluated before the first step."""
    eval_after: float | None
    """The last evaluation after a step."""
    eval_best: float | None
    first_nan_step: int | None
    """First step whose loss was not a number."""


STEP_PARTS = ("data", "forward", "backward", "optimizer")
"""In their order in time; ``data`` comes before the step begins."""


@dataclass(frozen=True)
class Speed:
    """Medians over the steps after the first, which warms up; over all steps if there is only one."""

    step_seconds: float | None
    tokens_per_second: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of ``data``, ``forward``, ``backward`` and ``optimizer``, as far as they are on record."""
    gather_wait_seconds: float | None = None
    """Within forward and backward, waiting for gathered weights; of the steps in which it was sampled."""


def loss_curve(metrics: pd.DataFrame, *, span: int | None = None) -> pd.DataFrame:
    """One row per optimizer step, in order, with ``smoothed`` beside ``loss`` (over ``span`` steps).

    Steps that a resumed run did again count as it did them last. Other columns: ``step``, ``num_tokens``,
    ``learning_rate``, ``grad_norm``, ``step_seconds``, ``tokens_per_second``, ``time_seconds``, ``attempt``.
    """
    steps = _latest(metrics, "step")
    columns = [
        "step", "num_tokens", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second",
        "time_seconds", "attempt",
    ]  # fmt: skip
    curve = steps[columns].reset_index(drop=True)
    curve.insert(
        3, "smoothed", smooth(curve["loss"].to_numpy(np.float64), default_span(len(curve)) if span is None else span)
    )
    return curve


def eval_curve(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per evaluation: ``step``, ``num_tokens`` seen by then (0 before the first step), ``eval_loss``,
    ``eval_seconds``.
    """  # noqa: D205 - a list of columns
    found = _latest(metrics, "eval")[["step", "eval_loss", "eval_seconds"]].reset_index(drop=True)
    steps = _latest(metrics, "step")
    known = steps["step"].to_numpy(np.float64, na_value=np.nan)
    tokens = np.concatenate([[0.0], steps["num_tokens"].to_numpy(np.float64, na_value=np.nan)])
    at = np.searchsorted(known, found["step"].to_numpy(np.float64, na_value=np.nan), side="right")
    found.insert(1, "num_tokens", pd.Series(tokens[at]).astype("Int64"))
    return found


def smooth(values: np.ndarray[Any, np.dtype[np.float64]], span: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Exponential moving average with the weight of ``span`` steps, unbiased at its start.

    Where a value is not a number the result is not one either, and the average goes on behind it.

    Raises:
        ValueError: ``span`` is below 1.
    """
    if span < 1:
        raise ValueError(f"span is {span}: a loss is smoothed over 1 step or more")
    average = pd.Series(values).ewm(span=span, adjust=True, ignore_na=True).mean().to_numpy()
    return np.where(np.isnan(values), np.nan, average)


def summarize_loss(metrics: pd.DataFrame, *, span: int | None = None) -> LossSummary:
    """First and last losses, of training and of evaluation."""
    curve, evals = loss_curve(metrics, span=span), eval_curve(metrics)
    losses = curve["loss"].to_numpy(np.float64)
    bad = np.flatnonzero(np.isnan(losses))
    before = evals[evals["step"] == 0]["eval_loss"]
    after = evals[evals["step"] > 0]["eval_loss"]
    smoothed = curve["smoothed"].dropna()
    return LossSummary(
        num_steps=int(curve["step"].max()) if len(curve) else 0,
        max_steps=_last_int(_latest(metrics, "step")["max_steps"]),
        num_tokens=_last_int(curve["num_tokens"]),
        first=float(losses[0]) if len(losses) else None,
        last=float(losses[-1]) if len(losses) else None,
        last_smoothed=float(smoothed.iloc[-1]) if len(smoothed) else None,
        eval_before=float(before.iloc[0]) if len(before) else None,
        eval_after=float(after.iloc[-1]) if len(after) else None,
        eval_best=float(after.min()) if len(after.dropna()) else None,
        first_nan_step=int(curve["step"].iloc[bad[0]]) if len(bad) else None,
    )


def speed(metrics: pd.DataFrame) -> Speed:
    """Seconds a step and tokens a second, of all ranks together.

    The first step of each attempt is left out: it compiles, allocates and builds its schedule.
    """
    steps = _latest(metrics, "step")
    again = steps[steps["attempt"].duplicated()]
    chosen = again if len(again) else steps
    parts = {name: _median(chosen[f"{name}_seconds"]) for name in STEP_PARTS}
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    return Speed(
        _median(chosen["step_seconds"]),
        _median(chosen["tokens_per_second"]),
        known,
        _median(chosen["gather_wait_seconds"]),
    )


def _latest(metrics: pd.DataFrame, event: str) -> pd.DataFrame:
    """Rows of one kind in the order of steps; what a later attempt has done again or thrown away is left out."""
    rows = metrics[(metrics["event"] == event) & metrics["step"].notna()]
    attempts = sorted(set(metrics["attempt"]), reverse=True)
    if len(attempts) > 1:
        limit, parts = math.inf, []
        for attempt in attempts:
            part = rows[(rows["attempt"] == attempt) & (rows["step"] < limit)]
            parts.append(part)
            # An attempt begins with a step; what was recorded from that step on is superseded.
            begun = metrics[(metrics["attempt"] == attempt) & (metrics["event"] == "step")]["step"].min()
            limit = limit if pd.isna(begun) else min(limit, float(begun))
        rows = pd.concat(parts[::-1])
    return rows.drop_duplicates("step", keep="last").sort_values("step", kind="stable")


def _median(column: pd.Series[Any]) -> float | None:
    known = column.dropna()
    return float(known.median()) if len(known) else None


def _last_int(column: pd.Series[Any]) -> int | None:
    known = column.dropna()
    return int(known.iloc[-1]) if len(known) else None
