from __future__ import annotations

import json

import pytest

from qz3_widgets.config.draft import Draft, changed_lines
from qz3_widgets.config.presets import preset
from qz3_widgets.config.problems import ConfigError
from qz3_widgets.config.schema import RunConfig


def test_what_differs_from_the_preset_is_known_and_can_be_reset() -> None:
    draft = Draft("llama-3.1-8b")
    assert draft.changed == ()
    assert draft.type_text("lora.r", "64")
    assert draft.set_value("zero.release_gathered", False)
    assert draft.changed == ("lora.r", "zero.release_gathered")
    assert draft.config.lora.r == 64
    assert draft.base_text("lora.r") == "16"
    assert draft.last_changed == ("zero.release_gathered",)
    draft.reset("lora.r")
    assert draft.changed == ("zero.release_gathered",)
    draft.reset()
    assert draft.config == preset("llama-3.1-8b")


def test_what_does_not_fit_stays_and_is_told_all_at_once() -> None:
    draft = Draft("llama-3.1-8b")
    draft.type_text("lora.r", "[1")
    draft.type_text("data.max_length", "3")
    draft.type_text("training.learning_rate", "fast")
    assert [problem.field for problem in draft.problems] == ["lora.r", "data.max_length", "training.learning_rate"]
    assert draft.text("lora.r") == "[1"
    assert draft.text("training.learning_rate") == "fast"
    assert draft.config == preset("llama-3.1-8b")  # the last that was valid
    draft.type_text("lora.r", "8")
    draft.type_text("data.max_length", "512")
    draft.type_text("training.learning_rate", "1e-3")
    assert draft.problems == ()
    assert (draft.config.lora.r, draft.config.data.max_length) == (8, 512)


def test_a_rule_of_a_section_stands_at_its_field() -> None:
    draft = Draft("llama-3.1-8b")
    draft.set_value("zero.offload_param_device", "cpu")
    draft.set_value("zero.zero_stage", 2)
    assert [problem.field for problem in draft.problems] == ["zero.offload_param_device"]


def test_the_last_change_can_be_taken_back_once() -> None:
    draft = Draft("llama-3.1-8b")
    draft.apply({"lora.r": 64, "data.max_length": 4096})
    assert draft.can_undo
    assert draft.undo()
    assert draft.last_changed == ("lora.r", "data.max_length")
    assert draft.changed == ()
    assert not draft.undo()


def test_what_changes_nothing_is_no_change() -> None:
    draft = Draft("llama-3.1-8b")
    assert not draft.type_text("lora.r", "16")
    assert not draft.apply({"lora.target_modules": "all-linear"})
    assert not draft.can_undo


def test_an_unknown_field_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ConfigError, match="lora.r"):
        Draft().apply({"lora.rr": 1})


def test_yaml_comes_in_and_goes_out() -> None:
    draft = Draft("llama-3.1-8b")
    draft.type_text("lora.r", "64")
    again = Draft()
    again.load_yaml(draft.to_yaml())
    assert again.config == draft.config
    assert again.preset is None
    assert again.changed == ()


def test_yaml_that_does_not_fit_changes_nothing() -> None:
    draft = Draft("llama-3.1-8b")
    with pytest.raises(ConfigError):
        draft.load_yaml("lora: {r: 0, alpha: 3}")
    with pytest.raises(ConfigError):
        draft.load_yaml("!!python/object/apply:os.system ['true']")
    assert draft.config == preset("llama-3.1-8b")


def test_it_survives_as_json_with_what_does_not_fit() -> None:
    draft = Draft("llama-3.1-8b")
    draft.type_text("lora.r", "many")
    draft.type_text("data.max_length", "[")
    again = Draft.from_json(json.loads(json.dumps(draft.to_json())))
    assert again.preset == "llama-3.1-8b"
    assert [again.text(path) for path in ("lora.r", "data.max_length")] == ["many", "["]
    assert again.problems == draft.problems
    loaded = Draft(RunConfig(name="mine"))
    assert Draft.from_json(json.loads(json.dumps(loaded.to_json()))).config.name == "mine"


def test_json_of_another_version_is_taken_as_far_as_it_goes() -> None:
    content = Draft("llama-3.1-8b").to_json()
    content["plain"]["lora.was_removed"] = 3
    content["typed"] = None
    assert Draft.from_json(content).problems == ()
    with pytest.raises(ValueError, match="preset"):
        Draft.from_json({"preset": "no-such-preset"})


def test_lines_that_changed_are_found() -> None:
    assert changed_lines("a\nb\nc", "a\nB\nc\nd") == {1, 3}
    assert changed_lines("same", "same") == frozenset()
