"""The regions of a live view as HTML. What comes from a run is redacted and escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..analysis.badges import Badge
from ..analysis.loss import loss_curve
from ..analysis.names import config_of
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..markup import MINUS, THIN_SPACE, Cell, chip, escape, note, style_block, table
from ..plotting.html import card, describe
from ..runs.logs import LogLine, read_log
from ..runs.secrets import redact
from ..runs.store import Run
from ..trace.records import PHASES
from ..units import format_bytes, format_duration
from .follow import Now, RankNow

NO_NEWS_SECONDS = 30.0
"""A rank that has written nothing for so long is pointed out."""

_LOG_LINES = 40
_LINES_BEFORE, _LINES_AFTER = 24, 8  # around the line that tells the failure
_SEARCHED_LINES = 2_000
_LONGEST_EVIDENCE = 600
_RECENT_STEPS = 400  # what is older has no weight in the smoothed loss
_MAX_RANKS = 64
_COMING = tuple(phase for phase in PHASES if phase not in ("eval", "save"))  # may come again, or not at all
_FILL = {"succeeded": "ok", "failed": "error", "cancelled": "idle", "lost": "idle"}


@cache
def style() -> str:
    """The ``<style>`` of the whole view."""
    rules = (Path(__file__).parent / "live.css").read_text(encoding="utf-8")
    return f"{style_block()}<style>\n{rules}</style>"


def head(run: Run, now: Now, description: str) -> str:
    """Which run it is, its state, and what it is at; ``description`` is what :func:`describe_run` gave."""
    state = now.status.state
    if state == "pending" and now.status.launched_by == "launch.sh":
        doing = f"not started yet: bash {run.layout.launch_sh} starts it"
    else:
        doing = "" if now.status.has_ended else now.progress.doing
    detail = now.status.message if state == "running" else None
    words = " ".join(filter(None, (doing, f"({detail})" if detail else "")))
    return (
        f'<div class="qz3-live-title"><strong>{escape(run.run_id)}</strong>{chip(state)}'
        f"<span>{escape(redact(words))}</span></div>"
        f'<div class="qz3-muted">{escape(description)}</div>'
    )


@dataclass(frozen=True)
class Latest:
    """Figures of the newest steps; ``None`` is what is not on record."""

    smoothed_loss: float | None = None
    learning_rate: float | None = None


def latest(metrics: pd.DataFrame) -> Latest:
    """The newest figures, at the same cost however long the run is."""
    recent = metrics.tail(_RECENT_STEPS)
    return Latest(_last(loss_curve(recent)["smoothed"]), _last(recent["learning_rate"]))


def _last(values: pd.Series[Any]) -> float | None:
    known = values.dropna()
    return float(known.iloc[-1]) if len(known) else None


def cause(run: Run, now: Now, *, asked: int = 0) -> str:
    """What became of a run that has ended, its cause first; nothing while it goes on.

    Args:
        run: The run.
        now: It at this moment.
        asked: How often somebody asked for an explanation: the log around the failure is unfolded then.
    """
    if not now.status.has_ended:
        return ""
    verdict = judge(summarize(run))
    text = note(verdict.level, redact(verdict.sentence), redact(verdict.detail))
    if now.status.state not in ("failed", "lost"):
        return text
    lines, place = _evidence(run, now.status.failed_rank, now.status.error)
    if not lines:
        return text
    own = lines[0].rank is not None and lines[0].file != run.layout.launcher_log.name
    name = f"the log of rank {lines[0].rank}" if own else "the launcher's log"
    unfolded = f' open data-asked="{asked}"' if asked else ""
    if place is None:
        shown, title, evidence = lines[-_LOG_LINES:], f"The end of {name}", ""
    else:
        shown = lines[max(0, place - _LINES_BEFORE) : place + _LINES_AFTER + 1]
        title, line = f"{name[0].upper()}{name[1:]} around it", lines[place]
        where = f"{line.file}:{line.number}" if line.number is not None else line.file
        evidence = (
            f'<div class="qz3-evidence"><span>{escape(where)}</span>'
            f"<code>{escape(line.text[:_LONGEST_EVIDENCE])}</code></div>"
        )
    told = "\n".join(escape(line.text) for line in shown)
    return f"{text}{evidence}<details{unfolded}><summary>{escape(title)}</summary><pre>{told}</pre></details>"


def _evidence(run: Run, rank: int | None, error: str | None) -> tuple[list[LogLine], int | None]:
    """Lines of the log that tells most of a failure, and the place among them of the one that tells it."""
    ours: list[LogLine] = []
    sources: tuple[int | Literal["all"], ...] = ("all",) if rank is None else (rank, "all")
    for source in sources:
        lines = read_log(run, rank=source, num_lines=_SEARCHED_LINES)
        told = [place for place, line in enumerate(lines) if _tells_an_error(line, rank)]
        known = redact(error or "").split("\n")[0][:60]
        exact = [place for place in told if known and known in lines[place].text]
        # An error that was logged long before the end is not why it ended.
        late = [place for place in told if place >= len(lines) - _LOG_LINES]
        if exact or late:
            return lines, (exact or late)[-1]
        ours = ours or lines
    return ours, None


def _tells_an_error(line: LogLine, rank: int | None) -> bool:
    """Whether it is an error itself, of this rank or of no rank: neither a traceback's head nor the code in it."""
    of_it = rank is None or line.rank in (rank, None)
    return of_it and line.level == "error" and not line.text.startswith((" ", "\t", "Traceback"))


def progress(now: Now, newest: Latest, expected: Mapping[str, Mapping[str, int]]) -> str:
    """How far it is: steps, time, phases, and the figures that are read first.

    ``expected`` are bytes by phase and figure, as :func:`~qz3_widgets.analysis.truth.expected_sizes` gives them.
    """
    at, state = now.progress, now.status.state
    none = "No step was finished" if now.status.has_ended else "No step yet"
    whole = f"Step {at.step} of {at.max_steps}" if at.max_steps else none
    so_far = "" if now.status.has_ended else " so far"
    elapsed = "" if at.elapsed_seconds is None else f"{format_duration(at.elapsed_seconds)}{so_far}"
    left = "" if at.seconds_left is None else f"about {format_duration(at.seconds_left)} left"
    share = min(1.0, at.step / at.max_steps) if at.max_steps else 0.0
    line = (
        f'<div class="qz3-live-line"><span><b class="qz3-live-step">{escape(whole)}</b> '
        f'<span class="qz3-muted qz3-live-elapsed">{escape(elapsed)}</span></span><b>{escape(left)}</b></div>'
        f'<div class="qz3-live-track" role="progressbar" aria-valuemin="0" aria-valuemax="{at.max_steps or 0}" '
        f'aria-valuenow="{at.step}" aria-label="optimizer steps"><div class="qz3-live-fill qz3-{_FILL.get(state, "")}" '
        f'style="width: {share:.2%}"></div></div>'
    )
    boxes = "".join(
        f"<div><b>{escape(number)} <small>{escape(unit)}</small></b><span>{escape(label)}</span></div>"
        for number, unit, label in _figures(now, newest, expected)
    )
    figures = f'<div class="qz3-figures">{boxes}</div>' if boxes else ""
    return f'<div class="qz3-card">{line}{_phase_list(now)}{figures}</div>'


def badge_row(found: Sequence[Badge]) -> str:
    """What is proven of the run, and what was counted."""
    glyphs = {"ok": "✓", "error": "✕", "info": "○"}
    boxes = "".join(
        f'<div class="qz3-badge qz3-badge-{badge.level}"><span aria-hidden="true">{glyphs[badge.level]}</span>'
        f"<div><b>{escape(badge.title)}</b><p>{escape(badge.reason)}</p></div></div>"
        for badge in found
    )
    return f'<div class="qz3-badges" role="group" aria-label="proof">{boxes}</div>'


def ranks(now: Now) -> str:
    """A row for each rank: where it is, what it holds, whether it is still heard of."""
    if not now.ranks:
        return ""
    shown = _shown(now)
    rows = []
    for rank in shown:
        where = f"step {rank.step}" if rank.phase == "step" else rank.phase
        quiet = rank.outcome is None and not now.status.has_ended and rank.silent_seconds > NO_NEWS_SECONDS
        if quiet:
            text = f"! no news for {format_duration(rank.silent_seconds)}"
            where_cell = Cell(html=f'{escape(where)} <span class="qz3-quiet">{escape(text)}</span>')
        else:
            ended = "" if rank.outcome in (None, "succeeded") else f", {rank.outcome}"
            where_cell = Cell("done" if rank.outcome == "succeeded" else f"{where}{ended}")
        cells = [Cell(format_bytes(rank.allocated_bytes), "num"), Cell(format_bytes(rank.peak_bytes), "num")]
        rows.append([Cell(f"rank {rank.rank}"), where_cell, *cells])
    for rank_number in now.missing_ranks[:_MAX_RANKS]:
        silent = Cell(html='<span class="qz3-quiet">! no trace</span>')
        rows.append([Cell(f"rank {rank_number}"), silent, Cell("-", "num"), Cell("-", "num")])
    head_row = [Cell("rank"), Cell("at"), Cell("last" if now.status.has_ended else "now", "num"), Cell("peak", "num")]
    more = len(now.ranks) - len(shown)
    foot = f'<ul class="qz3-notes"><li>{more} more ranks hold less.</li></ul>' if more else ""
    return card("Ranks", table(head_row, rows, caption="What each rank holds") + foot, aside="allocated")


def figure(title: str, svg: str, aside: str = "") -> str:
    """A figure in its box."""
    return card(title, svg, aside=aside)


def wait(title: str, sentence: str) -> str:
    """A sentence where a figure will be."""
    return card(title, f'<p class="qz3-live-wait">{escape(sentence)}</p>')


def measured(now: Now) -> str:
    """What the figure of memory counts."""
    where = {"cuda": "the GPU", "cpu": "the CPU"}.get(now.device or "", "its device")
    return f"allocated by torch on {where}"


def no_memory(now: Now) -> str:
    """Why there is no figure of memory."""
    return "No memory was recorded." if now.status.has_ended else "Nothing yet: the ranks have still to start."


def no_loss(now: Now) -> str:
    """Why there is no figure of the loss."""
    return "No step was finished." if now.status.has_ended else "Nothing yet: the first step is still to come."


def problems(found: Mapping[str, str]) -> str:
    """What of the view itself failed; ``found`` is region to traceback. The run is not affected."""
    if not found:
        return ""
    parts = []
    for region, text in found.items():
        last = next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")
        parts.append(
            note("error", f"This view could not show the {region}: {redact(last)}", "The run itself is not affected.")
            + f"<details><summary>Details</summary><pre>{escape(redact(text))}</pre></details>"
        )
    return "".join(parts)


def gone(run: Run) -> str:
    """The run's directory was deleted or moved."""
    return note(
        "warn",
        f"{run.run_id}: its directory is gone.",
        f"{run.layout.root} was deleted or moved while it was shown; this view follows it no more.",
    )


def describe_run(run: Run) -> str:
    """The run's set-up in a line."""
    config = config_of(run)
    if config is None:
        return "its configuration can't be read"
    plain = config.model_dump(mode="json")
    # The last part of a path says which model it is.
    plain["model"]["name_or_path"] = config.model.name_or_path.rstrip("/").rsplit("/", 1)[-1]
    return redact(describe({"world_size": config.launch.num_processes, "config": plain}))


def _phase_list(now: Now) -> str:
    """Phases that were entered with their times, then those to come."""
    items = []
    entered = [name for name, _, _ in now.phases]
    for name, seconds, here in now.phases:
        word = "steps" if name == "step" else name
        label = f"{word} {format_duration(seconds)}"
        items.append(f'<li class="qz3-here" aria-current="step">● {label}</li>' if here else f"<li>✓ {label}</li>")
    if not now.status.has_ended:
        to_come = [name for name in _COMING if name not in entered]
        items += [f"<li>{'steps' if name == 'step' else name}</li>" for name in to_come]
    return f'<ol class="qz3-live-phases" aria-label="phases">{"".join(items)}</ol>' if items else ""


def _figures(now: Now, newest: Latest, expected: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, str]]:
    """(number, unit, what it is) of the key figures that are known."""
    found: list[tuple[str, str, str]] = []
    peak, capacity = now.step_peak_bytes, now.capacity_bytes
    if peak is not None:
        label = "peak of a step, fullest rank"
        wanted = expected.get("step", {}).get("peak_bytes")
        if wanted:
            label += f" (expected {format_bytes(wanted)}, {(peak / wanted - 1) * 100:+.1f}{THIN_SPACE}%)"
        found.append((*_parts(peak), label.replace("-", MINUS) if wanted else label))
    elif any(rank.peak_bytes for rank in now.ranks):
        largest = max(rank.peak_bytes or 0 for rank in now.ranks)
        found.append((*_parts(largest), f"peak{'' if now.status.has_ended else ' so far'}, fullest rank"))
    if peak is not None and capacity is not None and now.device == "cuda":
        found.append((*_parts(capacity - peak), f"free of {format_bytes(capacity)}"))
    if newest.smoothed_loss is not None and math.isfinite(newest.smoothed_loss):
        found.append((f"{newest.smoothed_loss:.3f}", "", "loss, smoothed"))
    if now.step_seconds is not None:
        found.append((f"{now.step_seconds:.2f}", "s", "a step, median"))
    if now.progress.tokens_per_second:
        found.append((f"{now.progress.tokens_per_second:,.0f}", "tokens/s", "all ranks"))
    if newest.learning_rate is not None:
        found.append((f"{newest.learning_rate:.1e}".replace("e-0", "e-"), "", "learning rate"))
    return found


def _parts(num_bytes: int) -> tuple[str, str]:
    number, unit = format_bytes(num_bytes).split(" ")
    return number, unit


def _shown(now: Now) -> Sequence[RankNow]:
    if len(now.ranks) <= _MAX_RANKS:
        return now.ranks
    fullest = sorted(now.ranks, key=lambda rank: rank.peak_bytes or 0, reverse=True)[:_MAX_RANKS]
    return sorted(fullest, key=lambda rank: rank.rank)
