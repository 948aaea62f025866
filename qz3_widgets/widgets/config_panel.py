"""The form: a preset, and what is changed in it. Problems stand at their fields, with a button that mends them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ..config.draft import Draft
from ..config.form import FormSection, form_fields, form_sections, summary
from ..config.io import load_config
from ..config.presets import PRESETS
from ..config.saved import list_saved, save_named
from ..config.schema import RunConfig
from ..demo import demo_is_prepared, prepare_demo
from ..markup import escape
from ..plan.issue import Issue
from ..plan.plan import make_plan
from .field_row import FieldRow, Trouble
from .panel import Later, Panel, box, button, handler, region, set_html, show

_OPEN = ("quantization", "lora", "training")
_ON_TOP = ("name", "model.name_or_path")
_OWN = "(loaded)"
_DEMO = "The demo's model and dialogues are not unpacked yet."

Issues = Callable[[RunConfig], Iterable[Issue]]


def issues_here(config: RunConfig) -> tuple[Issue, ...]:
    """What stands against a configuration on this machine."""
    return make_plan(config).issues


class ConfigPanel(Panel):
    """A form made from the schema. :attr:`config` is the last valid configuration, :attr:`draft` all that was typed."""

    def __init__(
        self,
        start: RunConfig | str | Draft | None = None,
        *,
        runs_dir: str | Path = "runs",
        find_issues: Issues = issues_here,
        on_change: Callable[[Draft], None] | None = None,
        nested: bool = False,
    ) -> None:
        """Edit a preset (its name), a configuration, or a draft.

        Args:
            start: What to begin with; the demo, if left out.
            runs_dir: Saved configurations are in its folder ``configs``.
            find_issues: What stands against a valid configuration; this machine's plan, if left out.
            on_change: Called with the draft after each change.
            nested: It stands in another panel.

        Raises:
            ValueError: no such preset.
        """
        self.draft = start if isinstance(start, Draft) else Draft(start)
        self.runs_dir = Path(runs_dir)
        self.issues: tuple[Issue, ...] = ()
        self._find_issues = find_issues
        self._on_change = on_change
        self._rows: dict[str, FieldRow] = {}
        self._built: set[str] = set()
        self._unfolded: set[str] = set()
        self._typed: dict[str, str] = {}
        self._busy = False
        self._more: dict[str, widgets.Button] = {}
        self._typing = Later(self.take_typed)

        self.preset = widgets.Dropdown(options=self._preset_options(), value=self._preset_value(), description="Preset")
        self.preset.observe(lambda change: self._busy or self.choose_preset(change["new"]), names="value")
        top = [self._row(path, label=label) for path, label in zip(_ON_TOP, ("Run", "Model"), strict=True)]
        self.search = widgets.Text(placeholder=f"Search {len(form_fields())} fields", description="Search")
        self.search.add_class("qz3-search")
        self.filter = widgets.ToggleButtons(options=[("All", "all")], value="all", description="Show")
        self.filter.add_class("qz3-filter")
        for control in (self.search, self.filter):
            control.observe(lambda _: self._busy or self.find(), names="value")
        self.nothing = region("nothing")
        self.demo_button = button("Unpack the demo", self.unpack_demo, kind="primary")
        self.demo_said = widgets.HTML(_DEMO)
        self.demo_box = box([self.demo_said, self.demo_button], "config-demo")
        self.sections = {section.name: self._section(section) for section in form_sections()}
        self.undo_button = button("Undo", self.undo, tooltip="Take the last change back, once")
        self.undo_button.disabled = True
        self._make_yaml_box()
        head = box([self.preset, *(row.box for row in top)], "config-head")
        tools = box([self.undo_button, self.load_button, self.paste_button, self.save_button], "config-tools")
        finder = box([self.search, self.filter], "config-finder")
        super().__init__(
            [head, self.demo_box, tools, self.yaml_box, finder, self.nothing, *self.sections.values()],
            name="config",
            nested=nested,
        )
        for name in _OPEN:
            self.sections[name].selected_index = 0
        self.refresh()

    @property
    def config(self) -> RunConfig:
        """The last valid configuration."""
        return self.draft.config

    @property
    def errors(self) -> tuple[tuple[str, str], ...]:
        """(field, message) of all that blocks a start, the schema's problems first."""
        return (
            *((problem.field, problem.message) for problem in self.draft.problems),
            *((issue.field, issue.message) for issue in self.issues if issue.severity == "error"),
        )

    @handler("show the configuration")
    def refresh(self) -> None:
        """Look for issues, and show all fields as they are now."""
        self.issues = () if self.draft.problems else tuple(self._find_issues(self.draft.config))
        self._show()

    @handler("change the field")
    def take_typed(self) -> None:
        """Take what was typed into the draft."""
        typed, self._typed = self._typed, {}
        changed = [self.draft.type_text(path, text) for path, text in typed.items()]
        if any(changed):
            self._changed()

    @handler("change the field")
    def choose(self, path: str, value: Any) -> None:
        """Take a choice into the draft."""
        if self.draft.set_value(path, value):
            self._changed()

    def settle(self) -> None:
        """Take what is still being typed, at once."""
        self._typing.flush()

    @handler("apply the change")
    def apply(self, changes: Mapping[str, Any]) -> None:
        """Apply a fix or advice; the fields are marked as changed, nothing is started."""
        if self.draft.apply(changes):
            self._changed()

    @handler("apply the fixes")
    def apply_all_fixes(self) -> None:
        """Apply the fixes of all errors and warnings, until none is left."""
        for _ in range(8):  # a fix can uncover another issue
            changes: dict[str, Any] = {}
            for issue in self.issues:
                if issue.severity != "info" and issue.fix and not changes.keys() & issue.fix.keys():
                    changes.update(issue.fix)
            if not changes or not self.draft.apply(changes):
                break
            self.issues = tuple(self._find_issues(self.draft.config))
        self._changed()

    @handler("reset the field")
    def reset(self, *paths: str) -> None:
        """Give fields the preset's values back; all of them, if none is named."""
        if self.draft.reset(*paths):
            self._changed()

    @handler("take the change back")
    def undo(self) -> None:
        """Take the last change back."""
        if self.draft.undo():
            self._changed()

    @handler("load the preset")
    def choose_preset(self, name: str) -> None:
        """Begin anew with a preset; Undo comes back."""
        if name != _OWN and name != self.draft.preset:
            self.draft.load_preset(name)
            self._changed()

    @handler("load the configuration")
    def load(self, config: RunConfig, changes: Mapping[str, Any] | None = None) -> None:
        """Begin anew with a configuration, ``changes`` marked as changed in it; Undo comes back."""
        self.draft.load(config)
        if changes:
            self.draft.apply(changes)
        self._changed()

    @handler("read the YAML")
    def paste(self) -> None:
        """Take the pasted YAML."""
        self.draft.load_yaml(self.yaml_text.value, source="pasted YAML")
        show(self.yaml_box, shown=False)
        self._changed()

    @handler("read the file")
    def upload(self) -> None:
        """Take the uploaded file."""
        for given in self.upload_file.value:
            try:
                text = bytes(given["content"]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{given['name']} is not UTF-8 text; save it as UTF-8") from error
            self.draft.load_yaml(text, source=str(given["name"]))
            show(self.yaml_box, shown=False)
            self._changed()

    @handler("read the file")
    def load_saved(self) -> None:
        """Take the saved configuration that is chosen."""
        if self.saved.value is not None:
            self.draft.load(load_config(self.saved.value))
            show(self.yaml_box, shown=False)
            self._changed()

    @handler("save the configuration")
    def save(self) -> None:
        """Write the configuration into the runs folder's ``configs``."""
        if self.draft.problems:
            raise ValueError(f"{self.draft.problems[0]}; mend it first: only what is valid is saved")
        path = save_named(self.config, self.runs_dir, self.save_name.value, replace=self.replace.value)
        set_html(self.said, f'<span role="status">Saved as {escape(str(path))}</span>')

    @handler("search the fields")
    def find(self) -> None:
        """Show the fields that the search and the filter leave."""
        self._show()

    @handler("open the section")
    def open_section(self, name: str) -> None:
        """Make the fields of a section, when it is opened for the first time."""
        self._build(name)
        self._show()

    @handler("show all fields")
    def unfold(self, name: str) -> None:
        """Show the rarely used fields of a section too, or fold them again."""
        self._unfolded ^= {name}
        self._show()

    @handler("unpack the demo")
    def unpack_demo(self) -> None:
        """Unpack the demo's model and dialogues, in the background; some ten seconds, once."""
        self.demo_button.disabled = True

        def work() -> None:
            def say(line: str) -> None:
                self.demo_said.value = f'<span role="status">{escape(line)} …</span>'

            say("unpacking")
            unpacked = self.guard("unpack the demo", lambda: prepare_demo(say=say), locked=False)
            self.demo_button.disabled = False
            self.demo_said.value = _DEMO if not unpacked else ""
            self.guard("show the configuration", self._changed)

        threading.Thread(target=work, name="qz3-demo", daemon=True).start()

    def _changed(self) -> None:
        self.issues = () if self.draft.problems else tuple(self._find_issues(self.draft.config))
        self._show()
        if self._on_change is not None:
            self._on_change(self.draft)

    def _show(self) -> None:
        changed = set(self.draft.changed)
        troubles = self._troubles()
        wrong = {path for path, found in troubles.items() if any(each.severity == "error" for each in found)}
        self._show_head(len(changed), len(troubles))
        words, only = self.search.value.strip(), self.filter.value
        chosen = {"changed": changed, "problems": set(troubles)}.get(only)
        searching = bool(words) or chosen is not None
        num_found = 0
        for section in form_sections():
            paths = [known.path for known in section.fields if known.path not in _ON_TOP]
            found = [
                path
                for path in paths
                if (chosen is None or path in chosen) and (not words or form_fields()[path].matches(words))
            ]
            num_found += len(found)
            place = self.sections[section.name]
            show(place, shown=not searching or bool(found))
            if (searching and found) or any(path in wrong for path in paths):
                self._build(section.name)
                self._open(place)
            self._show_title(section.name, paths, changed, troubles)
            if section.name in self._built:
                self._show_rows(section, found if searching else None, changed, troubles)
        for path in _ON_TOP:
            self._show_row(path, changed, troubles)
        message = {"changed": "Nothing is changed.", "problems": "No problem was found."}.get(only, "")
        if searching and not num_found:
            set_html(
                self.nothing,
                f'<div class="qz3-empty">{escape(f"No field matches “{words}”." if words else message)}</div>',
            )
        else:
            set_html(self.nothing, "")

    def _show_head(self, num_changed: int, num_problems: int) -> None:
        show(self.demo_box, shown=self.draft.preset == "demo" and not demo_is_prepared())
        self._busy = True
        try:
            self.undo_button.disabled = not self.draft.can_undo
            if self.preset.value != self._preset_value():
                self.preset.options = self._preset_options()
                self.preset.value = self._preset_value()
            labels = [("All", "all"), (f"Changed {num_changed}", "changed"), (f"Problems {num_problems}", "problems")]
            if list(self.filter.options) != labels:
                now = self.filter.value
                self.filter.options = labels
                self.filter.value = now
        finally:
            self._busy = False

    def _show_title(self, name: str, paths: Sequence[str], changed: set[str], troubles: Mapping[str, Any]) -> None:
        parts = [name, summary(self.config, name)]
        errors = sum(1 for path in paths for each in troubles.get(path, ()) if each.severity == "error")
        others = sum(1 for path in paths for each in troubles.get(path, ()) if each.severity == "warning")
        differing = sum(path in changed for path in paths)
        for number, word in ((errors, "problem"), (others, "warning")):
            if number:
                parts.append(f"{'✕' if word == 'problem' else '!'} {number} {word}{'s' if number != 1 else ''}")
        if differing:
            parts.append(f"{differing} changed")
        title = "  ·  ".join(parts)
        if self.sections[name].titles != (title,):
            self.sections[name].titles = (title,)
        (self.sections[name].add_class if errors else self.sections[name].remove_class)("qz3-section-wrong")

    def _show_rows(
        self, section: FormSection, found: list[str] | None, changed: set[str], troubles: Mapping[str, Any]
    ) -> None:
        """``found``: only these, wherever they are folded; ``None``: all that are not folded away."""
        hidden = 0
        unfolded = section.name in self._unfolded
        for known in section.fields:
            path = known.path
            if path in _ON_TOP:
                continue
            folded = known.rare and not unfolded and path not in changed and path not in troubles
            hidden += found is None and folded
            shown = path in found if found is not None else not folded
            if shown or path in self._rows:
                self._show_row(path, changed, troubles)
                show(self._rows[path].box, shown=shown)
        place = self.sections[section.name].children[0]
        wanted = [
            self._rows[known.path].box
            for known in section.fields
            if known.path in self._rows and known.path not in _ON_TOP
        ]
        more = self._more[section.name]
        if tuple(place.children) != (*wanted, more):
            place.children = (*wanted, more)
        num_rare = sum(known.rare for known in section.fields)
        more.description = f"Show {hidden} more field{'s' * (hidden > 1)}" if hidden else "Show fewer fields"
        more.tooltip = f"{section.name}: {more.description}"
        show(more, shown=found is None and bool(hidden or (unfolded and num_rare)))

    def _show_row(self, path: str, changed: set[str], troubles: Mapping[str, Any]) -> None:
        draft = self.draft
        base = draft.base_text(path) if path in changed else None
        self._row(path).show(draft.value(path), draft.text(path), base_text=base, troubles=troubles.get(path, ()))

    def _troubles(self) -> dict[str, list[Trouble]]:
        found: dict[str, list[Trouble]] = {}
        for problem in self.draft.problems:
            found.setdefault(problem.field, []).append(Trouble("error", problem.message))
        for issue in self.issues:
            if issue.severity != "info":
                found.setdefault(issue.field, []).append(Trouble(issue.severity, issue.message, issue.fix))
        return found

    def _row(self, path: str, label: str | None = None) -> FieldRow:
        if path not in self._rows:
            models = [str(make().model.name_or_path) for make in PRESETS.values()]
            self._rows[path] = FieldRow(
                form_fields()[path],
                on_text=self._take_text,
                on_value=self.choose,
                on_reset=self.reset,
                on_fix=self.apply,
                label=label,
                suggestions=tuple(dict.fromkeys(models)) if path == "model.name_or_path" else (),
            )
        return self._rows[path]

    def _take_text(self, path: str, text: str) -> None:
        self._typed[path] = text
        self._typing.request()

    def _section(self, section: FormSection) -> widgets.Accordion:
        place = widgets.Accordion([widgets.VBox()], titles=(section.name,), selected_index=None)
        place.add_class("qz3-section")
        self._more[section.name] = button("Show more fields", lambda: self.unfold(section.name), kind="link")
        place.add_class(f"qz3-section-{section.name}")
        place.observe(
            lambda change: self._busy or change["new"] is None or self.open_section(section.name),
            names="selected_index",
        )
        return place

    def _open(self, place: widgets.Accordion) -> None:
        busy, self._busy = self._busy, True
        place.selected_index = 0
        self._busy = busy

    def _build(self, name: str) -> None:
        self._built.add(name)

    def _preset_options(self) -> list[str]:
        return [*PRESETS, *([_OWN] if self.draft.preset is None else [])]

    def _preset_value(self) -> str:
        return _OWN if self.draft.preset is None else self.draft.preset

    def _make_yaml_box(self) -> None:
        self.load_button = button("Load", lambda: self._toggle_yaml("load"), tooltip="Load a YAML file")
        self.paste_button = button("Paste", lambda: self._toggle_yaml("paste"), tooltip="Paste YAML text")
        self.save_button = button("Save", lambda: self._toggle_yaml("save"), tooltip="Save as YAML")
        self.upload_file = widgets.FileUpload(accept=".yaml,.yml", description="From a file of yours", multiple=False)
        self.upload_file.add_class("qz3-button")
        self.upload_file.observe(lambda _: self.upload(), names="value")
        self.saved = widgets.Dropdown(options=[], description="Saved")
        self.saved_button = button("Load it", self.load_saved, kind="primary")
        self.yaml_text = widgets.Textarea(placeholder="lora:\n  r: 32", rows=8, description="YAML")
        self.take_button = button("Take it", self.paste, kind="primary")
        self.save_name = widgets.Text(description="Name", placeholder="my-config")
        self.replace = widgets.Checkbox(value=False, description="replace", indent=False)
        self.write_button = button("Save it", self.save, kind="primary")
        self.download = widgets.HTML()
        self.said = region("said")
        self._yaml_parts = {
            "load": box([self.upload_file, self.saved, self.saved_button], "yaml-load"),
            "paste": box([self.yaml_text, self.take_button], "yaml-paste", kind="column"),
            "save": box([self.save_name, self.replace, self.write_button, self.download, self.said], "yaml-save"),
        }
        self.yaml_box = box([], "yaml")
        self.yaml_box.add_class("qz3-card")
        show(self.yaml_box, shown=False)

    def _toggle_yaml(self, which: str) -> None:
        self.guard(f"open “{which}”", lambda: self._open_yaml(which))

    def _open_yaml(self, which: str) -> None:
        part = self._yaml_parts[which]
        if self.yaml_box.children == (part,) and self.yaml_box.layout.display != "none":
            show(self.yaml_box, shown=False)
            return
        self.yaml_box.children = (part,)
        show(self.yaml_box)
        if which == "load":
            found = list_saved(self.runs_dir)
            self.saved.options = [(path.stem, str(path)) for path in found]
            self.saved.value = str(found[0]) if found else None
            show(self.saved, shown=bool(found))
            show(self.saved_button, shown=bool(found))
        elif which == "save":
            self.save_name.value = self.config.name
            set_html(self.said, "")
            content = base64.b64encode(self.draft.to_yaml().encode()).decode()
            name = escape(f"{self.config.name}.yaml")
            self.download.value = f'<a download="{name}" href="data:text/yaml;base64,{content}">Download {name}</a>'
