from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qz3_widgets.config import RunConfig, with_changes
from qz3_widgets.plan import Issue, tokenizer_files
from qz3_widgets.plan.tokenizer_files import (
    Template,
    check_template,
    check_tokenizer,
    find_template,
    patched_templates,
)

from .conftest import TEMPLATE, MakeModel

MARKED = "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"


def config_of(name: str | Path, **changes: Any) -> RunConfig:
    values = {"model.name_or_path": str(name)} | {path.replace("__", "."): value for path, value in changes.items()}
    return with_changes(RunConfig(), values)


def template_issues(config: RunConfig, *, is_chat: bool | None = True) -> list[Issue]:
    template, issues = find_template(config)
    return [*issues, *check_template(config, template, is_chat=is_chat)]


def test_a_tokenizer_beside_the_model(make_model: MakeModel) -> None:
    folder = make_model()
    assert list(check_tokenizer(config_of(folder))) == []
    (folder / "tokenizer.json").unlink()
    (issue,) = check_tokenizer(config_of(folder))
    assert (issue.rule, issue.field) == ("tokenizer-files", "model.name_or_path")
    assert "model.tokenizer_name_or_path" in issue.message


def test_a_tokenizer_of_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    (folder / "tokenizer.json").unlink()
    assert list(check_tokenizer(config_of(folder, model__tokenizer_name_or_path="gpt2"))) == []
    own = tmp_path / "tokenizer"
    (issue,) = check_tokenizer(config_of(folder, model__tokenizer_name_or_path=str(own)))
    assert (issue.rule, issue.field) == ("tokenizer-not-found", "model.tokenizer_name_or_path")
    own.mkdir()
    (issue,) = check_tokenizer(config_of(folder, model__tokenizer_name_or_path=str(own)))
    assert (issue.rule, issue.field) == ("tokenizer-files", "model.tokenizer_name_or_path")
    (own / "vocab.json").write_text("{}", encoding="utf-8")
    assert list(check_tokenizer(config_of(folder, model__tokenizer_name_or_path=str(own)))) == []


@pytest.mark.parametrize("name", ["gpt2", "random:tiny-llama", "./nowhere"])
def test_where_nothing_can_be_said(name: str, tmp_path: Path) -> None:
    assert list(check_tokenizer(config_of(name))) == []
    assert template_issues(config_of(name)) == []
    assert list(check_tokenizer(config_of(tmp_path))) == []  # a folder without a model has its own issue


def test_chats_need_a_template(make_model: MakeModel) -> None:
    folder = make_model(template=None)
    (issue,) = template_issues(config_of(folder))
    assert (issue.rule, issue.severity, issue.field) == ("template-missing", "error", "data.chat_template")
    assert template_issues(config_of(folder), is_chat=False) == []
    assert template_issues(config_of(folder), is_chat=None) == []


def test_places_of_a_template(make_model: MakeModel) -> None:
    folder = make_model(template=None)
    file = folder / "tokenizer_config.json"
    for value in (TEMPLATE, [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "x"}]):
        file.write_text(json.dumps({"chat_template": value}), encoding="utf-8")
        assert find_template(config_of(folder)) == (Template(True, TEMPLATE, str(folder)), ())
    for other in ({}, {"chat_template": [{"name": "rag", "template": "x"}]}, {"chat_template": None}):
        file.write_text(json.dumps(other), encoding="utf-8")
        assert [issue.rule for issue in template_issues(config_of(folder))] == ["template-missing"]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}), encoding="utf-8")
    assert find_template(config_of(folder))[0].text == "legacy"
    (folder / "chat_template.jinja").write_text("newest", encoding="utf-8")
    assert find_template(config_of(folder))[0].text == "newest"


def test_a_template_file_takes_the_place_of_the_tokenizers(make_model: MakeModel, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    config = config_of(make_model(template=None), data__chat_template=str(file))
    (issue,) = template_issues(config)
    assert (issue.rule, issue.field) == ("template-file", "data.chat_template")
    assert "No such file" in issue.message
    file.write_text(MARKED, encoding="utf-8")
    assert template_issues(config) == []


@pytest.mark.parametrize(
    "content,words",
    [
        (b"", "is empty"),
        (b"caf\xe9", "is not UTF-8"),
        (b"line 1\n{% for m in messages %}", "is no valid Jinja template: line 2"),
        (b"{{ a", "is no valid Jinja template"),
    ],
)
def test_template_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_bytes(content)
    (issue,) = template_issues(config_of("gpt2", data__chat_template=str(file)))
    assert words in issue.message


def test_a_folder_is_no_template(tmp_path: Path) -> None:
    (issue,) = template_issues(config_of("gpt2", data__chat_template=str(tmp_path)))
    assert issue.rule == "template-file"


def test_assistant_only_loss_needs_marked_turns(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, marked = make_model("plain"), make_model("marked", template=MARKED)
    assert template_issues(config_of(plain)) == []
    assert template_issues(config_of(marked, data__loss_on="assistant")) == []
    (issue,) = template_issues(config_of(plain, data__loss_on="assistant"))
    assert (issue.rule, issue.severity) == ("template-without-generation", "error")
    monkeypatch.setattr(tokenizer_files, "patched_templates", lambda: None)
    (issue,) = template_issues(config_of(plain, data__loss_on="assistant"))
    assert issue.severity == "warning"


def test_templates_that_trl_patches_are_fine(make_model: MakeModel) -> None:
    patched = patched_templates()
    assert patched is not None
    assert len(patched) > 10
    template = next(text for text in sorted(patched) if not tokenizer_files._GENERATION.search(text))
    assert template_issues(config_of(make_model(template=template), data__loss_on="assistant")) == []


def test_the_patched_templates_are_those_of_trl() -> None:
    # Read from TRL's source rather than imported: importing it takes seconds.
    patched = patched_templates()
    assert patched is not None
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0])  # type: ignore[union-attr,index]
    source = (folder / "chat_template_utils.py").read_text(encoding="utf-8")
    function = source[source.index("def get_training_chat_template") :]
    names = {
        line.split("== ")[1].removesuffix("_chat_template:")
        for line in function.splitlines()
        if "if chat_template == " in line
    }
    assert {(folder / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8") for name in names} == patched


def test_without_trl_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_templates.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert patched_templates() is None
    patched_templates.cache_clear()
