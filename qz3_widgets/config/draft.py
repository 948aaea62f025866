"""A configuration that is being edited: also what was typed and does not fit yet, and what differs from its preset."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .changes import from_plain, get_field
from .form import FormField, form_fields
from .io import dump_config, loads_config
from .presets import PRESETS, preset
from .problems import ConfigError, Problem
from .schema import RunConfig


@dataclass(frozen=True)
class _State:
    base: RunConfig
    preset: str | None
    plain: dict[str, Any]  # path to plain value; what can't be read keeps its former value
    typed: dict[str, str] = field(default_factory=dict)  # path to text that stands for no value


class Draft:
    """A preset and what was changed in it.

    A value that the schema refuses is kept and told as a problem; :attr:`config` stays the last valid configuration.
    """

    def __init__(self, start: RunConfig | str | None = None) -> None:
        """Begin with a preset's name, with a configuration, or (``None``) with the first preset.

        Raises:
            ValueError: no such preset.
        """
        name = start if isinstance(start, str) else None
        config = next(iter(PRESETS.values()))() if start is None else preset(start) if isinstance(start, str) else start
        if start is None:
            name = next(iter(PRESETS))
        self._state = _State(config, name, _flat(config))
        self._before: _State | None = None
        self._config = config
        self._problems: tuple[Problem, ...] = ()
        self.last_changed: tuple[str, ...] = ()

    @property
    def config(self) -> RunConfig:
        """The last valid configuration: what is edited, while :attr:`problems` is empty."""
        return self._config

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that the schema has against what was typed, in the form's order."""
        return self._problems

    @property
    def preset(self) -> str | None:
        """The name of the preset that it was made from, if it was."""
        return self._state.preset

    @property
    def base(self) -> RunConfig:
        """What changes are counted from: the preset, or the configuration that was loaded."""
        return self._state.base

    @property
    def changed(self) -> tuple[str, ...]:
        """Paths of fields that are not as in :attr:`base`, in schema order."""
        base = _flat(self.base)
        state = self._state
        return tuple(path for path in form_fields() if path in state.typed or state.plain[path] != base[path])

    @property
    def can_undo(self) -> bool:
        """Whether :meth:`undo` has something to go back to."""
        return self._before is not None

    def text(self, path: str) -> str:
        """What stands in the field."""
        state = self._state
        return state.typed[path] if path in state.typed else form_fields()[path].show(state.plain[path])

    def value(self, path: str) -> Any:
        """The field's plain value, valid or not; of a text that can't be read the value before it."""
        return self._state.plain[path]

    def base_text(self, path: str) -> str:
        """What stood in the field at first."""
        return form_fields()[path].show(_plain(self.base, path))

    def type_text(self, path: str, text: str) -> bool:
        """Put a text into a field; returns whether that changed anything."""
        if text == self.text(path):
            return False
        known = _known(path)
        state = self._copy()
        try:
            state.plain[path] = known.read(text)
            state.typed.pop(path, None)
        except ConfigError:
            state.typed[path] = text
        return self._take(state, (path,))

    def set_value(self, path: str, value: Any) -> bool:
        """Put a plain value into a field; returns whether that changed anything."""
        return self.apply({path: value})

    def apply(self, changes: Mapping[str, Any]) -> bool:
        """Set several fields at once: a fix, or a piece of advice. :meth:`undo` takes it back.

        Raises:
            ConfigError: there is no such field.
        """
        state = self._copy()
        for path, value in changes.items():
            _known(path)
            state.plain[path] = list(value) if isinstance(value, tuple) else value
            state.typed.pop(path, None)
        touched = tuple(path for path in changes if self.text(path) != form_fields()[path].show(state.plain[path]))
        return self._take(state, touched) if touched else False

    def reset(self, *paths: str) -> bool:
        """Give fields back the value of :attr:`base`; all of them, if none is named."""
        base = _flat(self.base)
        return self.apply({path: base[path] for path in paths or tuple(form_fields())})

    def undo(self) -> bool:
        """Go back to before the last change, once; returns whether there was one."""
        if self._before is None:
            return False
        before, self._before = self._before, None
        changed = tuple(path for path in form_fields() if self._differs(before, path))
        self._state = before
        self.last_changed = changed
        self._check()
        return True

    def load_preset(self, name: str) -> None:
        """Begin anew with a preset; :meth:`undo` comes back.

        Raises:
            ValueError: no such preset.
        """
        config = preset(name)
        self._take(_State(config, name, _flat(config)), ())

    def load(self, config: RunConfig) -> None:
        """Begin anew with a configuration; :meth:`undo` comes back."""
        self._take(_State(config, None, _flat(config)), ())

    def load_yaml(self, text: str, *, source: str = "YAML") -> None:
        """Begin anew with YAML text.

        Raises:
            ConfigError: it is none, or does not fit the schema; what was edited stays.
        """
        self.load(loads_config(text, source=source))

    def to_yaml(self) -> str:
        """The last valid configuration as YAML, each field under what it means."""
        return dump_config(self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_json` makes the same draft."""
        state = self._state
        base = None if state.preset is not None else _flat(state.base)
        return {"preset": state.preset, "base": base, "plain": dict(state.plain), "typed": dict(state.typed)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Draft:
        """Back from :meth:`to_json`; fields of another version are left out.

        Raises:
            ValueError: something else, or a preset that is gone.
        """
        name, base = content.get("preset"), content.get("base")
        draft = cls(from_plain(_nested(base))) if isinstance(base, Mapping) else cls(str(name))
        state = draft._copy()
        for target, key in ((state.plain, "plain"), (state.typed, "typed")):
            given = content.get(key)
            if isinstance(given, Mapping):
                target.update({path: value for path, value in given.items() if path in form_fields()})
        draft._take(state, ())
        draft._before = None
        return draft

    def _differs(self, other: _State, path: str) -> bool:
        mine = self._state
        return mine.plain[path] != other.plain[path] or mine.typed.get(path) != other.typed.get(path)

    def _copy(self) -> _State:
        return copy.deepcopy(self._state)

    def _take(self, state: _State, changed: tuple[str, ...]) -> bool:
        self._before, self._state = self._state, state
        self.last_changed = changed
        self._check()
        return True

    def _check(self) -> None:
        state = self._state
        unread = []
        for path, text in state.typed.items():
            try:
                form_fields()[path].read(text)
            except ConfigError as error:
                unread += error.problems
        try:
            config = from_plain(_nested(state.plain), source="form")
        except ConfigError as error:
            unread += [problem for problem in error.problems if problem.field not in state.typed]
        else:
            if not unread:
                self._config = config
        order = list(form_fields())
        place = {path: number for number, path in enumerate(order)}
        self._problems = tuple(sorted(unread, key=lambda problem: place.get(problem.field, len(order))))


def changed_lines(before: str, after: str) -> frozenset[int]:
    """Numbers (from 0) of the lines of ``after`` that ``before`` does not have in their place."""
    from difflib import SequenceMatcher

    new = after.splitlines()
    matcher = SequenceMatcher(None, before.splitlines(), new, autojunk=False)
    same = {line for block in matcher.get_matching_blocks() for line in range(block.b, block.b + block.size)}
    return frozenset(range(len(new))) - same


def _known(path: str) -> FormField:
    if path not in form_fields():
        get_field(RunConfig(), path)  # raises, and names the nearest
    return form_fields()[path]


def _plain(config: RunConfig, path: str) -> Any:
    return _flat(config)[path]


def _flat(config: RunConfig) -> dict[str, Any]:
    whole = config.model_dump(mode="json")
    return {
        path: whole[known.section][known.label] if known.section else whole[path]
        for path, known in form_fields().items()
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        section, dot, name = path.rpartition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[name] = value
    return nested
