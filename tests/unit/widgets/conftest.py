"""Views without a page: their thread rests, so that a test alone says when they look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qz3_widgets.widgets import follow, live, log_box
from qz3_widgets.widgets.live import LiveRun

Show = Callable[[Path], LiveRun]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Iterator[Show]:
    """Makes a view of the run in a directory; nothing is too soon for it, and nothing happens by itself."""
    monkeypatch.setattr(live, "POLL_SECONDS", 3600.0)
    monkeypatch.setattr(live, "_DRAW_SHARE", 0)
    monkeypatch.setattr(live, "_MIN_DRAW_SECONDS", 0)
    monkeypatch.setattr(log_box, "_READ_SHARE", 0)
    monkeypatch.setattr(log_box, "_MIN_READ_SECONDS", 0)
    monkeypatch.setattr(follow, "_READ_SHARE", 0)
    monkeypatch.setattr(follow, "_SURVEY_SHARE", 0)
    monkeypatch.setattr(follow, "_STATUS_SHARE", 0)
    views: list[LiveRun] = []

    def show_it(directory: Path) -> LiveRun:
        views.append(LiveRun(directory))
        return views[-1]

    yield show_it
    for view in views:
        view.close()
        view.wait(10)
        assert not view.following


def text_of(html: str) -> str:
    """What a reader sees of a region."""
    import re
    from html import unescape

    plain = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", plain)).split())
