"""A report in one HTML file that needs nothing else: no script, no font, no image from anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..analysis.compare import compare
from ..analysis.summary import summarize
from ..markup import escape, style_block, tokens_css
from ..runs.files import write_text_atomic
from ..runs.store import Run
from .html import comparison_cards, heading, run_cards
from .source import memory_source

_RULES = """
:root { color-scheme: light dark; }
html, body { margin: 0; background: #ffffff; }
body.qz3 { background: var(--qz3-bg); }
main { max-width: 980px; margin: 0 auto; padding: 16px; }
h1 { font-size: 20px; margin: 8px 0 4px; overflow-wrap: anywhere; }
.qz3 h2 { font-size: 16px; margin: 24px 0 2px; overflow-wrap: anywhere; }
.qz3-line { margin: 0 0 12px; }
.qz3-card { border: 1px solid var(--qz3-line); border-radius: var(--qz3-radius); padding: 12px; margin: 12px 0; }
.qz3-figures { display: flex; flex-wrap: wrap; gap: 12px 0; }
.qz3-figures > div { flex: 1 1 104px; padding: 0 12px; border-left: 1px solid var(--qz3-line); }
.qz3-figures > div:first-child { border-left: 0; padding-left: 0; }
.qz3-figures b { display: block; font-size: var(--qz3-fs-figure); font-variant-numeric: tabular-nums; }
.qz3-figures span { font-size: var(--qz3-fs-small); color: var(--qz3-muted); }
.qz3-log { margin: 0; padding: 8px; overflow-x: auto; max-height: 420px; background: var(--qz3-panel);
  white-space: pre-wrap; overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--qz3-accent); padding: 8px 0 4px; }
footer { color: var(--qz3-muted); font-size: var(--qz3-fs-small); margin: 16px 0; }
.qz3-table + .qz3-table { margin-top: 12px; }
@media print { .qz3-card { break-inside: avoid; } }
"""


def export_html(runs: Run | Sequence[Run], path: Path | str) -> Path:
    """Write a report on one run, or on several and how they compare; returns the path.

    The file is whole or not there at all. It follows the reader's light or dark theme, and holds no secrets.

    Args:
        runs: A run, or several in the order in which they get their colours.
        path: A file ending in ``.html``; an existing one is replaced.

    Raises:
        ValueError: no runs, one of them twice, or the file can't be written; the message names it.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{target}: a report is written to a file that ends in .html")
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name a file")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: the folder {target.parent} does not exist: make it first")
    text = report_html([runs] if isinstance(runs, Run) else list(runs))
    try:
        write_text_atomic(target, text)
    except OSError as error:
        raise ValueError(f"{target} can't be written: {error.strerror or error}") from error
    return target


def report_html(runs: Sequence[Run]) -> str:
    """The report's text. Raises ``ValueError`` without runs, or if one is there twice."""
    if not runs:
        raise ValueError("a report needs one run or more")
    sources = [memory_source(run) for run in runs]
    if len(runs) == 1:
        summary = summarize(runs[0], trace=sources[0].trace)
        title = summary["run_id"]
        body = heading(summary) + run_cards(runs[0], summary, sources[0])
    else:
        comparison = compare(runs, traces={run.run_id: source.trace for run, source in zip(runs, sources, strict=True)})
        title = f"{len(runs)} runs compared"
        body = f"<h1>{title}</h1>{comparison_cards(comparison, runs, sources)}"
        for i, run in enumerate(runs):
            summary = dict(comparison.summaries[run.run_id])
            body += heading(summary, i) + run_cards(run, summary, sources[i], i)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n{style_block()}\n<style>{_RULES}{_dark()}</style>\n</head>\n"
        f'<body class="qz3">\n<main>\n{body}\n'
        f"<footer>Written by qz3_widgets on {written}.</footer>\n</main>\n</body>\n</html>\n"
    )


def _dark() -> str:
    """The dark theme's tokens for a page that stands alone, where the reader's system asks for dark."""
    block = re.search(r"qz3-dark\s*\{(.*?)\}", tokens_css(), flags=re.DOTALL)
    assert block is not None
    return f"@media (prefers-color-scheme: dark) {{ html {{ background: #1b1b1b; }} .qz3 {{{block.group(1)}}} }}\n"
