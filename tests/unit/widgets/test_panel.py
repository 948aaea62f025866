from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import ipywidgets as widgets
import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.widgets import panel
from qz3_widgets.widgets.panel import Ask, Later, Panel, button, close_all, handler, log_file, set_children
from tests.unit.widgets.conftest import text_of


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QZ3_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    logging.shutdown()


class Example(Panel):
    def __init__(self, error: BaseException | None = None) -> None:
        self.fault = error
        self.done = 0
        super().__init__([], name="example")

    @handler("do the thing")
    def act(self) -> None:
        if self.fault is not None:
            raise self.fault
        self.done += 1


def test_a_fault_is_shown_with_what_to_do_and_logged() -> None:
    view = Example(RuntimeError("boom <b>"))
    assert view.act() is False
    shown = view.error.value
    assert "Could not do the thing: RuntimeError: boom &lt;b&gt;" in shown
    assert "fault of the workbench" in shown
    assert "Traceback" in shown
    assert view.error.layout.display is None
    assert view.failures == ("do the thing",)
    logged = log_file().read_text()
    assert "example: could not do the thing" in logged
    assert "RuntimeError: boom <b>" in logged


def test_what_a_user_can_mend_is_shown_without_its_place() -> None:
    view = Example(ValueError("lora.r: must be more\ndata.source: no such file"))
    view.act()
    shown = view.error.value
    assert "Could not do the thing: lora.r: must be more" in shown
    assert "data.source: no such file" in shown
    assert "Traceback" not in shown
    assert "Traceback" in log_file().read_text()


def test_success_takes_the_message_away() -> None:
    view = Example(ValueError("not now"))
    view.act()
    view.fault = None
    assert view.act() is True
    assert view.error.value == ""
    assert view.failures == ()


def test_a_message_can_be_dismissed() -> None:
    view = Example(ValueError("not now"))
    view.act()
    view.dismiss.click()
    assert view.failures == ()
    assert view.dismiss.layout.display == "none"


def test_secrets_do_not_reach_page_or_log() -> None:
    view = Example(RuntimeError("token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"))
    view.act()
    assert "hf_abcdefghijklmnop" not in view.error.value
    assert "hf_abcdefghijklmnop" not in log_file().read_text()


def test_a_log_that_cannot_be_written_hides_nothing(cache_dir: Path) -> None:
    cache_dir.write_text("a file where the folder should be")
    view = Example(RuntimeError("boom"))
    view.act()
    assert "boom" in view.error.value
    assert "can&#x27;t be written" in view.error.value


def test_later_calls_once_after_many_requests() -> None:
    calls: list[int] = []
    later = Later(lambda: calls.append(1), seconds=60)
    for _ in range(5):
        later.request()
    assert calls == []
    later.flush()
    later.flush()
    assert calls == [1]


def test_a_question_stands_between_a_button_and_what_it_does() -> None:
    done: list[int] = []
    ask = Ask("Delete", "Delete 2 runs?", lambda: done.append(1))
    ask.first.click()
    assert done == []
    assert "Delete 2 runs?" in text_of(ask.question.value)
    ask.no.click()
    assert ask.children == (ask.first,)
    assert done == []
    ask.first.click()
    ask.yes.click()
    assert done == [1]
    assert ask.children == (ask.first,)


def test_replaced_children_are_closed_with_all_that_is_theirs() -> None:
    place = widgets.Box()
    before = len(_instances)
    for _ in range(3):
        set_children(place, [widgets.Box([widgets.HTML("a"), button("b", lambda: None)])])
    size = len(_instances)
    set_children(place, [widgets.Box([widgets.HTML("a"), button("b", lambda: None)])])
    assert len(_instances) == size
    close_all(place)
    assert len(_instances) < before


def test_styles_of_all_panels_are_in_one_place() -> None:
    for name in panel._STYLES:
        assert (Path(panel.__file__).parent / name).is_file()
    assert panel.style_css().count("<style>") == 2


def test_collecting_a_panel_waits_for_no_lock() -> None:
    """Another thread may collect it while this one holds the lock and waits for something that thread has."""
    view = Example()
    view.close()
    collected = threading.Event()
    garbage = [view]
    del view

    def collect() -> None:
        garbage.clear()
        gc.collect()
        collected.set()

    with panel._LOCK:
        threading.Thread(target=collect, daemon=True).start()
        assert collected.wait(20)
