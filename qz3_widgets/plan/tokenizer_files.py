"""Whether the tokenizer is there, and whether it has the chat template that the data needs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..config.data_layout import looks_like_path
from ..config.schema import RunConfig
from .issue import Issue
from .model_files import RANDOM_PREFIX, local_folder, read_json

FIELD = "data.chat_template"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True)
class Template:
    """The chat template that a run will use. ``text`` is ``None`` if there is none, or it is not ``known``."""

    known: bool
    text: str | None = None
    source: str = ""  # where it comes from, for messages


def check_tokenizer(config: RunConfig) -> Iterator[Issue]:
    """Issues of the tokenizer's files. The hub is never asked."""
    model = config.model
    own = model.tokenizer_name_or_path
    if own is None:
        folder = None if model.name_or_path.startswith(RANDOM_PREFIX) else local_folder(model.name_or_path)
        name = "model.name_or_path"
        # A folder without a model is complained about elsewhere.
        if folder is None or not (folder / "config.json").is_file():
            return
        hint = "; name one in model.tokenizer_name_or_path"
    else:
        folder, name, hint = local_folder(own), "model.tokenizer_name_or_path", ""
        if folder is None:
            if looks_like_path(own):
                yield Issue("tokenizer-not-found", "error", name, f"there is no folder {own}", {name: None})
            return
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        yield Issue("tokenizer-files", "error", name, f"{folder} has no tokenizer (tokenizer.json or the like){hint}")


def find_template(config: RunConfig) -> tuple[Template, tuple[Issue, ...]]:
    """The chat template of a run, and what is wrong with the file of ``data.chat_template``."""
    given = config.data.chat_template
    if given is not None:
        return _read_template(given)
    name = config.model.tokenizer_name_or_path
    if name is None and config.model.name_or_path.startswith(RANDOM_PREFIX):
        return Template(known=False), ()  # the byte tokenizer brings one that fits everything
    folder = local_folder(name or config.model.name_or_path)
    if folder is None:
        return Template(known=False), ()
    return Template(True, _template_of(folder), str(folder)), ()


def check_template(config: RunConfig, template: Template, *, is_chat: bool | None) -> Iterator[Issue]:
    """Issues of the chat template for data that ``is_chat`` (``None``: not known)."""
    if not is_chat or not template.known:
        return
    if template.text is None:
        if config.data.chat_template is None:  # a file that can't be read is complained about elsewhere
            yield Issue(
                "template-missing",
                "error",
                FIELD,
                f"the data are chats, and the tokenizer in {template.source} has no chat template; "
                "name a Jinja file here, or take the instruction-tuned variant of the model",
            )
        return
    if config.data.loss_on == "assistant" and not _GENERATION.search(template.text):
        patched = patched_templates()
        if patched is None or template.text not in patched:
            yield Issue(
                "template-without-generation",
                "error" if patched is not None else "warning",
                FIELD,
                f"loss_on=assistant needs {{% generation %}} around the assistant's turns, which the template of "
                f"{template.source} lacks, and TRL has no version of it that does; name a Jinja file here that has it",
                {"data.loss_on": "all"},
            )


@cache
def patched_templates() -> frozenset[str] | None:
    """Templates that TRL replaces by ones that mark the assistant's turns; ``None`` if TRL's are not found.

    Source: ``trl/chat_template_utils.py``, ``get_training_chat_template`` (1.16): a template that equals one of its
    files ``NAME.jinja`` is replaced by ``NAME_training.jinja``. Nothing of TRL is imported for this.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    originals = [file.with_name(file.name.replace("_training", "")) for file in folder.glob("*_training.jinja")]
    if not originals:
        return None
    return frozenset(file.read_text(encoding="utf-8") for file in originals if file.is_file())


def _read_template(given: str) -> tuple[Template, tuple[Issue, ...]]:
    file = Path(given).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        return Template(known=True), (Issue("template-file", "error", FIELD, f"{given}: {error.strerror or error}"),)
    except UnicodeDecodeError:
        return Template(known=True), (Issue("template-file", "error", FIELD, f"{given} is not UTF-8 text"),)
    fault = "is empty" if not text.strip() else _syntax_fault(text)
    issues = (Issue("template-file", "error", FIELD, f"{given} {fault}"),) if fault else ()
    return Template(True, text, given), issues


def _syntax_fault(text: str) -> str:
    try:
        import jinja2
    except ImportError:
        return ""  # comes with transformers; without it the run fails anyway
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701 - only parsed
    try:
        # transformers adds the generation tag; jinja2 does not know it.
        environment.parse(_GENERATION_TAGS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        return f"is no valid Jinja template: line {error.lineno}: {error.message}"
    return ""


def _template_of(folder: Path) -> str | None:
    """A tokenizer's template as transformers finds it: its own file first, then its configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
