"""One thing that a check has found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Issue:
    """A finding about one field. An error blocks the start; a warning or info never does.

    ``fix`` is a change that removes it, ``{"section.field": value}``, or ``None`` where only the user can.
    """

    rule: str  # stable identifier, such as "more-ranks-than-gpus"
    severity: Severity
    field: str
    message: str
    fix: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        fix = ", ".join(f"{path}={_show(value)}" for path, value in (self.fix or {}).items())
        return f"{self.field}: {self.message}{f' (fix: {fix})' if fix else ''}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "field": self.field,
            "message": self.message,
            "fix": None if self.fix is None else dict(self.fix),
        }


def worst_first(issues: Iterable[Issue]) -> tuple[Issue, ...]:
    """Errors, then warnings, then info; within each as they came."""
    return tuple(sorted(issues, key=lambda issue: _ORDER[issue.severity]))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
