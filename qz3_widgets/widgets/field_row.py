"""One field of the form: its control, unit or preset's value, help, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets

from ..config.form import FormField
from ..config.problems import ConfigError
from ..markup import escape
from .panel import button, close_all, options
from .plan_html import value_word

_GLYPHS = {"error": "✕", "warning": "!", "info": "i"}


@dataclass(frozen=True)
class Trouble:
    """What stands at a field: an issue of the plan, or a problem of the schema (which has no fix)."""

    severity: str
    message: str
    fix: Mapping[str, Any] | None = None


class FieldRow:
    """The widgets of one field, made once and updated."""

    def __init__(
        self,
        known: FormField,
        *,
        on_text: Callable[[str, str], Any],
        on_value: Callable[[str, Any], Any],
        on_reset: Callable[[str], Any],
        on_fix: Callable[[Mapping[str, Any]], Any],
        label: str | None = None,
        suggestions: Sequence[str] = (),
    ) -> None:
        """Make the control of ``known``.

        Args:
            known: The field.
            on_text: Called with path and text when something was typed.
            on_value: Called with path and plain value when a choice was made.
            on_reset: Called with the path.
            on_fix: Called with the changes of a fix.
            label: Its label, if not its name.
            suggestions: Texts to choose from in a free text.
        """
        self.known = known
        self._on_fix = on_fix
        self._silent = False
        self._shown: tuple[Any, ...] | None = None
        self.control = self._make_control(known.label if label is None else label, suggestions)
        self.aside = widgets.HTML()
        self.aside.add_class("qz3-field-aside")
        self.reset = button(
            "reset", lambda: on_reset(known.path), kind="link", tooltip=f"{known.path}: back to the preset's value"
        )
        self.reset.add_class("qz3-field-reset")
        self.box = widgets.Box([self.control, self.aside])
        self.box.add_class("qz3-field")
        self.box.add_class(f"qz3-field-{known.path.replace('.', '-')}")

        def changed(change: Mapping[str, Any]) -> None:
            if self._silent:
                return
            if known.kind in ("switch", "choice"):
                on_value(known.path, change["new"])
            else:
                on_text(known.path, str(change["new"]))

        self.control.observe(changed, names="value")

    def show(self, value: Any, text: str, *, base_text: str | None, troubles: Sequence[Trouble] = ()) -> None:
        """Show the field as it is now.

        Args:
            value: Its plain value.
            text: What stands in it, also where that is no value.
            base_text: The preset's value, if it differs from this.
            troubles: What is wrong with it.
        """
        self._show_value(value, text)
        now = (base_text, tuple((each.severity, each.message, repr(each.fix)) for each in troubles))
        if now == self._shown:
            return
        self._shown = now
        if base_text is None:
            note = f'<span class="qz3-field-unit">{escape(self.known.unit or "")}</span>'
        else:
            note = f'<span class="qz3-field-base">preset {escape(_short(base_text) or "empty")}</span>'
        self.aside.value = (
            f'{note}<div class="qz3-help">{escape(self.known.help)} Takes {escape(self.known.allowed)}.</div>'
        )
        for name, is_so in (
            ("changed", base_text is not None),
            ("wrong", any(each.severity == "error" for each in troubles)),
            ("doubted", bool(troubles) and all(each.severity != "error" for each in troubles)),
        ):
            (self.box.add_class if is_so else self.box.remove_class)(f"qz3-field-is-{name}")
        children = [self.control, self.aside]
        if base_text is not None:
            children.append(self.reset)
        old = [child for child in self.box.children if child not in (self.control, self.aside, self.reset)]
        self.box.children = [*children, *(self._trouble(each) for each in troubles)]
        for child in old:
            close_all(child)

    def _show_value(self, value: Any, text: str) -> None:
        self._silent = True
        try:
            if self.known.kind in ("switch", "choice"):
                allowed = (True, False) if self.known.kind == "switch" else self.known.choices
                # A value of another type comes from a damaged state; the problem at the field tells it.
                if value in allowed and self.control.value != value:
                    self.control.value = value
            elif not self._stands_for(value, text):
                self.control.value = text
        finally:
            self._silent = False

    def _stands_for(self, value: Any, text: str) -> bool:
        """Whether the control's text means the same: what is being typed is not put into another form meanwhile."""
        if self.control.value == text:
            return True
        try:
            return text == self.known.show(value) and bool(self.known.read(self.control.value) == value)
        except ConfigError:
            return False

    def _trouble(self, trouble: Trouble) -> widgets.Box:
        glyph = _GLYPHS[trouble.severity]
        role = "alert" if trouble.severity == "error" else "status"
        mark = f'<span class="qz3-glyph" aria-hidden="true">{glyph}</span>'
        words = widgets.HTML(f'<div role="{role}">{mark}{escape(trouble.message)}</div>')
        children: list[Any] = [words]
        fix = trouble.fix
        if fix:
            label = ", ".join(
                self.known.show(value) or "empty"
                if path == self.known.path
                else f"{path.rpartition('.')[2]} {value_word(value)}"
                for path, value in fix.items()
            )
            children.append(
                button(f"Apply: {_short(label)}", lambda: self._on_fix(fix), kind="primary", tooltip=f"Set {label}")
            )
        made = widgets.Box(children)
        made.add_class("qz3-trouble")
        made.add_class(f"qz3-trouble-{trouble.severity}")
        return made

    def _make_control(self, label: str, suggestions: Sequence[str]) -> Any:
        known = self.known
        # A long name may break after each of its words, and nowhere else.
        common = {"description": label.replace("_", "_\u200b"), "tooltip": known.help}
        if known.kind == "switch":
            return widgets.Checkbox(value=bool(known.default), indent=False, **common)
        if known.kind == "choice":
            return widgets.Dropdown(options=options(known.choices), value=known.default, **common)
        hint = "empty" if known.optional else ""
        if known.kind == "mapping":
            return widgets.Textarea(placeholder="NAME=value, one a line", rows=3, **common)
        if suggestions or known.choices:
            given = tuple(suggestions) or tuple(map(known.show, known.choices))
            made: Any = widgets.Combobox(options=given, placeholder=hint, ensure_option=False, **common)
        else:
            made = widgets.Text(placeholder=hint, **common)
        made.add_class("qz3-number" if known.kind == "number" else "qz3-words")
        return made


def _short(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:27]}…"
