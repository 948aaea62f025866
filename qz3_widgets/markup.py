"""Small pieces of HTML that follow the notebook's theme: escaped text, tables, state chips, the one style block.

Standard library only. Whatever shows HTML is made of these, so that it looks alike and nothing is left unescaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

__all__ = ["Cell", "chip", "escape", "note", "run_dot", "style_block", "table", "tokens_css", "wrap"]

THIN_SPACE = "\u2009"
MINUS = "\u2212"

# State: glyph and kind. Meaning never hangs on colour: the word stands beside the glyph.
_STATES = {
    "pending": ("○", "idle"),
    "running": ("●", "accent"),
    "succeeded": ("✓", "ok"),
    "failed": ("✕", "error"),
    "cancelled": ("■", "idle"),
    "lost": ("?", "idle"),
}
_LEVELS = {"ok": ("✓", "ok"), "warn": ("!", "warn"), "error": ("✕", "error"), "info": ("●", "accent")}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: text (escaped when shown), how it is set, or HTML that is safe already."""

    text: str = ""
    kind: str = ""
    """Classes: ``num`` (right-aligned figures), ``best``, ``code``, ``muted``, ``bold``."""
    html: str | None = None

    def render(self, tag: str) -> str:
        """The cell as ``<td>`` or ``<th>``."""
        classes = f' class="{escape(self.kind)}"' if self.kind else ""
        return f"<{tag}{classes}>{self.html if self.html is not None else escape(self.text)}</{tag}>"


@cache
def tokens_css() -> str:
    """The colours, sizes and fonts as CSS variables, light and dark."""
    return (Path(__file__).parent / "tokens.css").read_text(encoding="utf-8")


@cache
def style_block() -> str:
    """The one ``<style>`` element that everything here needs. It may stand in a page more than once."""
    rules = (Path(__file__).parent / "markup.css").read_text(encoding="utf-8")
    return f"<style>\n{tokens_css()}\n{rules}</style>"


def wrap(*parts: str, kind: str = "") -> str:
    """Parts under the style they need: what a ``_repr_html_`` returns."""
    classes = f"qz3 {kind}".strip()
    return f'{style_block()}<div class="{escape(classes)}">{"".join(parts)}</div>'


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, caption: str = "") -> str:
    """A table; the first cell of each row is its head. ``caption`` is read out, not shown."""
    top = "".join(cell.render("th") for cell in head)
    body = []
    for row in rows:
        first, *rest = row
        body.append(f"<tr>{first.render('th')}{''.join(cell.render('td') for cell in rest)}</tr>")
    label = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="qz3-scroll"><table class="qz3-table">{label}'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def chip(state: str, *, live: bool = True) -> str:
    """A run's state, as glyph and word; ``live`` has changes of it read out, which is too much in a table of runs."""
    glyph, kind = _STATES.get(state, ("○", "idle"))
    role = ' role="status"' if live else ""
    return f'<span class="qz3-chip qz3-{kind}"{role}>{glyph} {escape(state)}</span>'


def note(level: str, sentence: str, detail: str = "") -> str:
    """A verdict: level ``ok``, ``warn``, ``error`` or ``info``, a sentence, and what stands behind it."""
    glyph, kind = _LEVELS.get(level, _LEVELS["info"])
    role = "alert" if level == "error" else "status"
    small = f'<div class="qz3-detail">{escape(detail)}</div>' if detail else ""
    return (
        f'<div class="qz3-note qz3-{kind}" role="{role}"><span class="qz3-glyph" aria-hidden="true">{glyph}</span>'
        f"<div><strong>{escape(sentence)}</strong>{small}</div></div>"
    )


def run_dot(index: int, label: str) -> str:
    """A run's name under a dot in its colour; ``index`` is its place in the order in which runs were chosen."""
    return f'<span class="qz3-run-dot qz3-run-{index % 4 + 1}" aria-hidden="true"></span>{escape(label)}'
