"""What all panels share: their style, handlers that lose no exception, and small controls.

An exception in a handler of a widget shows nowhere by itself. Every handler of a panel runs in :meth:`Panel.guard`:
what goes wrong is shown at the panel's foot, with what to do, and written to a log.
"""

from __future__ import annotations

import functools
import logging
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import ipywidgets as widgets

from ..config.paths import default_cache_dir
from ..markup import escape, note, style_block
from ..runs.secrets import redact

_STYLES = ("live.css", "workbench.css", "configure.css", "monitor.css", "runs.css")
_LOG_BYTES = 1_000_000
TYPING_SECONDS = 0.15
"""How long nothing is typed before what was typed counts."""

# One for all panels of a kernel: they call each other, and two locks taken in two orders would wait for each other.
_LOCK = threading.RLock()

P = ParamSpec("P")
S = TypeVar("S", bound="Panel")


class Panel(widgets.VBox):  # type: ignore[misc]
    """A box with a title for readers, a style, and a region at its foot for what went wrong in it."""

    def __init__(self, children: Sequence[Any], *, name: str, nested: bool = False) -> None:
        """Show ``children``.

        Args:
            children: Widgets from top to bottom.
            name: What the panel is called in messages and in its class ``qz3-<name>``.
            nested: It stands in another panel, which brings the style along.
        """
        self.panel_name = name
        self.lock = _LOCK
        self.is_closed = False
        self._problems: dict[str, str] = {}
        self.error = region("error")
        self.dismiss = button("Dismiss", self._dismiss, tooltip="Take the message away")
        self.dismiss.layout.display = "none"
        foot = box([self.error, self.dismiss], "foot")
        style = [] if nested else [widgets.HTML(style_css())]
        super().__init__([*style, *children, foot])
        for each in ("qz3", "qz3-panel", f"qz3-{name}"):
            self.add_class(each)

    def guard(self, doing: str, do: Callable[[], Any], *, locked: bool = True) -> bool:
        """Run ``do``; returns whether it went well. An exception goes to the error region, and to the log.

        Args:
            doing: What was attempted, as it follows "could not": ``"show the runs"``. Success takes its message away.
            do: The handler.
            locked: Whether other handlers wait meanwhile; not for what takes longer than a moment in a thread.
        """
        try:
            with self.lock if locked else nullcontext():
                do()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown, and the panel goes on
            self._tell(doing, error)
            return False
        if self._problems.pop(doing, None) is not None:
            self._show_problems()
        return True

    def tell(self, doing: str, message: str) -> None:
        """Show a message in the error region that is no exception."""
        self._problems[doing] = note("error", message)
        self._show_problems()

    def close(self) -> None:
        """Take the panel away, with all that is in it."""
        with self.lock:
            self.is_closed = True
            super().close()
            close_parts(self)

    def __del__(self) -> None:
        """Nothing, where ipywidgets would close it, which it was before.

        Garbage is collected in any thread, at any moment, and must not wait for a lock whose holder waits for what that
        thread has.
        """

    @property
    def failures(self) -> tuple[str, ...]:
        """What could not be done and still stands in the error region."""
        return tuple(self._problems)

    def _tell(self, doing: str, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        where = log_fault(f"{self.panel_name}: could not {doing}", text)
        # A ValueError is ours, with what to do in its message; anything else is a fault, shown with its place.
        if isinstance(error, ValueError | OSError):
            first, *rest = redact(str(error)).splitlines() or ["no reason was given"]
            shown = note("error", f"Could not {doing}: {first}", " ".join(rest))
        else:
            reason = redact(traceback.format_exception_only(error)[-1].strip())
            way = "This is a fault of the workbench; runs are not affected. Try again; if it stays, report the details"
            shown = note("error", f"Could not {doing}: {reason}", f"{way} ({where}).")
            shown += f"<details><summary>Details</summary><pre>{escape(redact(text))}</pre></details>"
        self._problems[doing] = shown
        self._show_problems()

    def _dismiss(self) -> None:
        self._problems.clear()
        self._show_problems()

    def _show_problems(self) -> None:
        set_html(self.error, "".join(self._problems.values()))
        self.dismiss.layout.display = None if self._problems else "none"


def handler(
    doing: str,
) -> Callable[[Callable[Concatenate[S, P], Any]], Callable[Concatenate[S, P], bool]]:
    """Makes a method of a panel a handler: guarded, and the rest of the events' arguments left to the caller."""

    def wrap(method: Callable[Concatenate[S, P], Any]) -> Callable[Concatenate[S, P], bool]:
        @functools.wraps(method)
        def guarded(self: S, *args: P.args, **kwargs: P.kwargs) -> bool:
            return self.guard(doing, lambda: method(self, *args, **kwargs))

        return cast("Callable[Concatenate[S, P], bool]", guarded)

    return wrap


class Later:
    """Calls a function once, a moment after the last of many requests: typing is not looked at letter by letter."""

    def __init__(self, do: Callable[[], Any], seconds: float = TYPING_SECONDS) -> None:
        self._do, self._seconds = do, seconds
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def request(self) -> None:
        """Call it after the pause, counted anew."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._seconds, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Call it now, if it was requested."""
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            self._do()


def button(
    label: str,
    do: Callable[[], Any],
    *,
    kind: str = "",
    tooltip: str = "",
    disabled: bool = False,
) -> widgets.Button:
    """A button that calls ``do`` without arguments.

    Args:
        label: What stands on it.
        do: A guarded handler.
        kind: ``primary``, ``danger``, ``link`` or nothing.
        tooltip: What it does, if the label does not say all.
        disabled: Whether it can't be pressed yet.
    """
    made = widgets.Button(description=label, tooltip=tooltip or label, disabled=disabled)
    made.add_class("qz3-button")
    if kind:
        made.add_class(f"qz3-button-{kind}")
    made.on_click(lambda _: do())
    return made


class Ask(widgets.HBox):  # type: ignore[misc]
    """A button that asks once, in its place, before it does something that can't be taken back."""

    def __init__(
        self, label: str, question: str, do: Callable[[], Any], *, yes: str | None = None, keep: str = "Keep"
    ) -> None:
        """Show ``label``; pressed, ask ``question`` with ``yes`` (the label) and ``keep``."""
        self.first = button(label, lambda: self.show_question(asked=True), kind="danger")
        self.question = widgets.HTML(f'<span role="alert">{escape(question)}</span>')
        self.yes = button(yes or label, self.confirm, kind="danger")
        self.no = button(keep, lambda: self.show_question(asked=False))
        self._do = do
        super().__init__([self.first])
        self.add_class("qz3-ask")

    def ask_about(self, question: str) -> None:
        """Change the question."""
        self.question.value = f'<span role="alert">{escape(question)}</span>'

    def show_question(self, *, asked: bool) -> None:
        """Show the question, or the button again."""
        self.children = (self.question, self.yes, self.no) if asked else (self.first,)

    def confirm(self) -> None:
        """The answer was yes."""
        self.show_question(asked=False)
        self._do()


def region(name: str, value: str = "") -> widgets.HTML:
    """A piece of HTML that is hidden while it is empty; ``name`` is in its class."""
    made = widgets.HTML(value, layout=widgets.Layout(display=None if value else "none"))
    made.add_class(f"qz3-region-{name}")
    return made


def set_html(where: widgets.HTML, value: str) -> None:
    """Show ``value``, and hide a region without any. What is the same already does not travel to the page again."""
    if where.value != value:
        where.value = value
        where.layout.display = None if value else "none"


def show(widget: Any, *, shown: bool = True) -> None:
    """Show or hide a widget."""
    display = None if shown else "none"
    if widget.layout.display != display:
        widget.layout.display = display


def box(children: Sequence[Any], name: str, *, kind: str = "row") -> widgets.Box:
    """A box of the class ``qz3-<name>``; ``kind`` is ``row`` (side by side) or ``column`` (on top of each other)."""
    made = widgets.Box(list(children))
    made.add_class(f"qz3-box-{kind}")
    made.add_class(f"qz3-{name}")
    return made


def set_children(where: Any, children: Sequence[Any]) -> None:
    """Replace the children of a box, and close those that are gone: they stay alive otherwise, shown or not."""
    kept = {id(child) for child in children}
    old = [child for child in where.children if id(child) not in kept]
    if tuple(where.children) != tuple(children):
        where.children = tuple(children)
    for child in old:
        close_all(child)


def close_all(widget: Any) -> None:
    """Close a widget with all that is in it or belongs to it, shown or not: it stays alive otherwise."""
    close_parts(widget)
    widget.close()


def close_parts(widget: Any) -> None:
    """Close all that is in a widget or belongs to it, and not the widget itself."""
    for part in _parts_of(widget, {id(widget)}):
        part.close()


def _parts_of(owner: Any, seen: set[int]) -> list[widgets.Widget]:
    """Widgets that an object holds, directly, in containers, or in objects of ours; the innermost first."""
    found: list[widgets.Widget] = []
    for value in list(vars(owner).values()):
        for each in _flat(value):
            if id(each) in seen:
                continue
            ours = type(each).__module__.startswith(__package__)
            if isinstance(each, widgets.Widget):
                # What is not a widget may know the panel that it is in, and does not own it.
                if isinstance(each, Panel) and not isinstance(owner, widgets.Widget):
                    continue
                seen.add(id(each))
                found += _parts_of(each, seen)
                found.append(each)
            elif ours and hasattr(each, "__dict__") and not isinstance(each, type):
                seen.add(id(each))
                found += _parts_of(each, seen)
    return found


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [each for item in value.values() for each in _flat(item)]
    if isinstance(value, list | tuple):
        return [each for item in value for each in _flat(item)]
    return [value]


@cache
def style_css() -> str:
    """The one ``<style>`` of all panels."""
    folder = Path(__file__).parent
    rules = "\n".join((folder / name).read_text(encoding="utf-8") for name in _STYLES)
    return f"{style_block()}<style>\n{rules}</style>"


def options(values: Mapping[str, Any] | Sequence[Any]) -> list[tuple[str, Any]]:
    """Values as a drop-down takes them, each with its own words."""
    if isinstance(values, Mapping):
        return list(values.items())
    return [("true" if value is True else "false" if value is False else str(value), value) for value in values]


def log_file() -> Path:
    """Where faults of the workbench itself are written."""
    return default_cache_dir() / "workbench.log"


@cache
def _logger(path: Path) -> logging.Logger:
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(f"{__name__}.{path}")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    writer = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
    writer.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(writer)
    return logger


def log_fault(head: str, text: str) -> str:
    """Write to the log; returns where it is, in words."""
    path = log_file()
    try:
        _logger(path).error("%s\n%s", redact(head), redact(text))
    except OSError as error:
        return f"not logged: {path} can't be written, {error.strerror or error}"
    return f"also in {path}"
