from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ipywidgets.widgets.widget import _instances

from qz3_widgets.config.form import form_fields
from qz3_widgets.config.io import save_config
from qz3_widgets.config.presets import PRESETS, preset
from qz3_widgets.config.saved import list_saved
from qz3_widgets.plan.imagined import on_imagined
from qz3_widgets.plan.issue import Issue
from qz3_widgets.widgets.config_panel import ConfigPanel
from tests.unit.widgets.conftest import text_of


def issues_on_eight(config: Any) -> tuple[Issue, ...]:
    return on_imagined(config, 8, 80).issues


@pytest.fixture
def form(tmp_path: Path) -> ConfigPanel:
    return ConfigPanel("llama-3.1-405b", runs_dir=tmp_path, find_issues=issues_on_eight)


def shown_fields(form: ConfigPanel) -> set[str]:
    return {path for path, row in form._rows.items() if row.box.layout.display != "none"}


def test_a_choice_changes_the_configuration_and_is_marked(form: ConfigPanel) -> None:
    form._rows["quantization.bnb_4bit_use_double_quant"].control.value = False
    assert form.config.quantization.bnb_4bit_use_double_quant is False
    row = form._rows["quantization.bnb_4bit_use_double_quant"]
    assert "preset true" in row.aside.value
    assert row.reset in row.box.children
    assert "1 changed" in form.sections["quantization"].titles[0]
    assert ("Changed 1", "changed") in form.filter.options
    row.reset.click()
    assert form.config == preset("llama-3.1-405b")
    assert "preset" not in row.aside.value.split("<div")[0]
    assert row.reset not in row.box.children


def test_what_is_typed_counts_after_a_pause(form: ConfigPanel) -> None:
    control = form._rows["lora.r"].control
    control.value = "6"
    control.value = "64"
    form.settle()
    assert form.config.lora.r == 64
    assert control.value == "64"


def test_a_number_is_left_as_it_was_typed(form: ConfigPanel) -> None:
    control = form._rows["training.learning_rate"].control
    control.value = "1e-4"
    form.settle()
    assert form.config.training.learning_rate == 1e-4
    assert control.value == "1e-4"


def test_a_problem_stands_at_its_field_and_keeps_what_was_typed(form: ConfigPanel) -> None:
    row = form._rows["lora.r"]
    row.control.value = "lots"
    form.settle()
    assert form.draft.problems
    assert [field for field, _ in form.errors] == ["lora.r"]
    assert row.control.value == "lots"
    assert "qz3-field-is-wrong" in row.box._dom_classes
    assert "must be a whole number from 1 to 1024" in text_of(row.box.children[-1].children[0].value)
    assert form.config == preset("llama-3.1-405b")
    row.control.value = "8"
    form.settle()
    assert form.errors == ()
    assert "qz3-field-is-wrong" not in row.box._dom_classes


def test_the_fix_of_an_issue_is_a_button_at_the_field(form: ConfigPanel) -> None:
    form.choose("quantization.bnb_4bit_quant_storage", "float32")
    row = form._rows["quantization.bnb_4bit_quant_storage"]
    trouble = row.box.children[-1]
    assert "ZeRO-3 gathers each type by itself" in trouble.children[0].value
    assert trouble.children[1].description == "Apply: bfloat16"
    trouble.children[1].click()
    assert form.config.quantization.bnb_4bit_quant_storage == "bfloat16"
    assert len(row.box.children) == 2


def test_all_fixes_are_applied_at_once(form: ConfigPanel) -> None:
    form.choose("quantization.bnb_4bit_quant_storage", "float32")
    form.choose("zero.release_gathered", False)
    form.apply_all_fixes()
    assert not [issue for issue in form.issues if issue.fix and issue.severity != "info"]


def test_a_change_can_be_undone_once(form: ConfigPanel) -> None:
    assert form.undo_button.disabled
    form.apply({"lora.r": 64, "data.max_length": 4096})
    form.undo_button.click()
    assert form.config == preset("llama-3.1-405b")
    assert form._rows["lora.r"].control.value == "16"
    assert form.undo_button.disabled


def test_every_preset_can_be_chosen_and_undone(form: ConfigPanel) -> None:
    for name in PRESETS:
        form.preset.value = name
        assert form.config == preset(name), name
        assert form.failures == ()
    form.undo()
    assert form.preset.value == list(PRESETS)[-2]


def test_a_search_opens_what_it_finds_also_rare_fields(form: ConfigPanel) -> None:
    form.search.value = "prefetch storage"
    found = shown_fields(form)
    assert "zero.stage3_prefetch_bucket_size" in found
    assert "lora.r" not in found
    assert form.sections["lora"].layout.display == "none"
    form.search.value = "nosuchword"
    assert "No field matches “nosuchword”" in form.nothing.value
    form.search.value = ""
    assert "lora.r" in shown_fields(form)
    assert "zero.stage3_prefetch_bucket_size" not in shown_fields(form)


def test_only_what_changed_or_what_is_wrong_can_be_shown(form: ConfigPanel) -> None:
    form.choose("zero.release_gathered", False)
    form.filter.value = "changed"
    assert shown_fields(form) - {"name", "model.name_or_path"} == {"zero.release_gathered"}
    form.filter.value = "problems"
    assert all(
        path in {issue.field for issue in form.issues} for path in shown_fields(form) - {"name", "model.name_or_path"}
    )


def test_rare_fields_are_folded_away_and_unfolded(form: ConfigPanel) -> None:
    assert "training.adam_beta1" not in shown_fields(form)
    form._more["training"].click()
    assert "training.adam_beta1" in shown_fields(form)
    assert form._more["training"].description == "Show fewer fields"
    form._more["training"].click()
    assert "training.adam_beta1" not in shown_fields(form)
    assert form._more["training"].description.startswith("Show ")


def test_all_fields_can_be_shown_and_none_is_shown_twice(form: ConfigPanel) -> None:
    for name, place in form.sections.items():
        place.selected_index = 0
        form.unfold(name)
    assert shown_fields(form) == set(form_fields())
    boxes = [id(child) for place in form.sections.values() for child in place.children[0].children]
    assert len(boxes) == len(set(boxes))


def test_a_section_with_a_problem_opens(form: ConfigPanel) -> None:
    assert form.sections["launch"].selected_index is None
    form.apply({"launch.num_machines": 3})
    assert form.sections["launch"].selected_index == 0
    assert "problem" in form.sections["launch"].titles[0]


def test_yaml_is_pasted_and_what_does_not_fit_changes_nothing(form: ConfigPanel) -> None:
    form.paste_button.click()
    form.yaml_text.value = "lora: {r: 0}\nmodel: {nme: x}"
    form.take_button.click()
    assert "Could not read the YAML" in form.error.value
    assert form.config == preset("llama-3.1-405b")
    form.yaml_text.value = "name: mine\nlora: {r: 8}"
    form.take_button.click()
    assert (form.config.name, form.config.lora.r) == ("mine", 8)
    assert form.error.value == ""
    assert form.preset.value == "(loaded)"
    form.undo()
    assert form.preset.value == "llama-3.1-405b"


def test_a_file_is_uploaded(form: ConfigPanel) -> None:
    def given(name: str, content: bytes) -> tuple[dict[str, Any]]:
        when = datetime(2026, 1, 1, tzinfo=UTC)
        return (
            {"name": name, "content": memoryview(content), "type": "", "size": len(content), "last_modified": when},
        )

    form.upload_file.value = given("a.yaml", b"name: uploaded")
    assert form.config.name == "uploaded"
    form.upload_file.value = given("b.yaml", b"\xff\xfe")
    assert "b.yaml is not UTF-8 text" in form.error.value


def test_a_configuration_is_saved_beside_the_runs_and_loaded_again(form: ConfigPanel, tmp_path: Path) -> None:
    form.apply({"lora.r": 64})
    form.save_button.click()
    form.save_name.value = "../outside"
    form.write_button.click()
    assert "is no name" in form.error.value
    form.save_name.value = "my-config"
    form.write_button.click()
    assert list_saved(tmp_path) == [tmp_path / "configs" / "my-config.yaml"]
    form.write_button.click()
    assert "exists; choose another name" in form.error.value
    form.replace.value = True
    form.write_button.click()
    assert form.error.value == ""
    form.reset("lora.r")
    form.load_button.click()
    form.saved_button.click()
    assert form.config.lora.r == 64
    assert form.config.name == "llama-3.1-405b-qlora"


def test_the_saved_file_can_be_downloaded(form: ConfigPanel) -> None:
    form.save_button.click()
    assert 'download="llama-3.1-405b-qlora.yaml"' in form.download.value
    assert "data:text/yaml;base64," in form.download.value


def test_text_of_a_configuration_is_escaped(form: ConfigPanel, tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    form.apply({"data.source": bad, "model.name_or_path": bad, "lora.target_modules": [bad]})
    shown = [getattr(child, "value", "") for row in form._rows.values() for child in row.box.children[2:]]
    every = "".join([*(row.aside.value for row in form._rows.values()), *shown])
    assert "<img" not in every
    save_config(form.config, tmp_path / "bad.yaml")
    form.load_saved()
    assert form.failures == ()


def test_each_handler_shows_its_fault(form: ConfigPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("provoked")

    monkeypatch.setattr(form, "_changed", fail)
    monkeypatch.setattr(form, "_show", fail)
    monkeypatch.setattr(form.draft, "load_preset", fail)
    form.take_typed()
    attempts = {
        "change the field": lambda: form.choose("lora.r", 3),
        "apply the change": lambda: form.apply({"lora.r": 5}),
        "load the preset": lambda: form.choose_preset("demo"),
        "search the fields": lambda: form.find(),
        "show all fields": lambda: form.unfold("lora"),
        "open the section": lambda: form.open_section("lora"),
    }
    for doing, attempt in attempts.items():
        assert attempt() is False, doing
        assert doing in form.failures
    assert form.error.value.count("RuntimeError: provoked") >= len(attempts)


def test_nothing_grows_when_fields_change(form: ConfigPanel) -> None:
    def change(number: int) -> None:
        form.choose("zero.release_gathered", False)
        form.apply({"lora.r": 2000 + number})
        form.reset()

    change(0)
    before = len(_instances)
    for number in range(10):
        change(number)
    assert len(_instances) <= before
