"""Four things that a run should prove, each as a badge: ZeRO-3 is on, 4-bit is on, layers are let go, LoRA learns."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..runs.secrets import redact
from ..runs.store import Run
from .proof import CheckResult, Proof, prove

Level = Literal["ok", "error", "info"]


@dataclass(frozen=True)
class Badge:
    """One proof: what is so, and what was counted that says so."""

    title: str
    level: Level
    reason: str


@dataclass(frozen=True)
class _Question:
    checks: tuple[str, ...]  # the first one that passed gives the reason
    passed: str
    failed: str
    name: str


_QUESTIONS = (
    _Question(
        ("partitioned_at_load", "partitioned_when_ready", "stage", "registered"),
        "ZeRO-3 is on",
        "ZeRO-3 does not shard",
        "ZeRO-3",
    ),
    _Question(("quantized", "layers", "present"), "4-bit is on", "4-bit is not on", "4-bit"),
    _Question(("released", "statistics", "persistent"), "Layers are let go", "Layers are not let go", "Release"),
    _Question(("gradients", "unchanged"), "LoRA learns", "LoRA does not learn", "LoRA"),
)


def badges(source: Run | Proof, *, ended: bool = False) -> tuple[Badge, ...]:
    """The four badges of a run, or of its proof.

    Args:
        source: A run, or what :func:`~qz3_widgets.analysis.proof.prove` gave.
        ended: The run is over: what is not known by now stays unknown.
    """
    proof = prove(source) if isinstance(source, Run) else source
    by_name = {check.name: check for check in proof.checks}
    return tuple(
        _badge(question, [by_name[name] for name in question.checks if name in by_name], ended=ended)
        for question in _QUESTIONS
    )


def probe_state(run: Run) -> Hashable:
    """Changes when the probes do: as long as it is the same, so are the badges."""
    found = []
    for path in sorted(run.layout.probes_dir.glob("rank-*.json")):
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((path.name, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def _badge(question: _Question, checks: Sequence[CheckResult], *, ended: bool) -> Badge:
    failed = next((check for check in checks if check.outcome == "failed"), None)
    if failed is not None:
        return Badge(question.failed, "error", _sentence(failed.sentence))
    passed = next((check for check in checks if check.outcome == "passed"), None)
    unknown = next((check for check in checks if check.outcome == "unknown"), None)
    if passed is not None and (unknown is None or unknown.name in ("unchanged", "partitioned_when_ready")):
        return Badge(question.passed, "ok", _sentence(passed.sentence))
    title = f"{question.name}: not known{'' if ended else ' yet'}"
    if unknown is not None:
        return Badge(title, "info", f"{'Never seen' if ended else 'To be seen'}: {redact(unknown.sentence)}.")
    if checks:
        return Badge(f"{question.name}: does not apply", "info", "It is not part of this run.")
    return Badge(title, "info", "It ended before a rank had told." if ended else "No rank has told yet.")


def _sentence(text: str) -> str:
    plain = redact(text)
    return f"{plain[:1].upper()}{plain[1:]}{'' if plain.endswith('.') else '.'}"
