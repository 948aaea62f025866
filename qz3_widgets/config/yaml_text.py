"""YAML that means one thing only: text to plain values and back, strict where PyYAML guesses.

``2e-4`` is a number (PyYAML reads text), ``yes``, ``no`` and ``12:30`` are text (PyYAML reads true, false and 750),
a key that stands twice is an error (PyYAML keeps the last), and tags and aliases are refused. What is written here
is also read alike by PyYAML's ``safe_load``.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class YamlError(ValueError):
    """Text that is not the YAML we take. ``line`` and ``column`` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        """``message`` says what is wrong, without the place."""
        super().__init__(f"line {line}, column {column}: {message}")
        self.line = line
        self.column = column


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported; write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}  # of its own: none of PyYAML's
for _name, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    # The writer gets them beside PyYAML's own, so that text that looks like a value to either is quoted.
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Double quotes escape line breaks: every scalar stays on one line, where a comment can stand above it.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def parse(text: str) -> tuple[Any, dict[str, int]]:
    """Plain values of ``text``, and the line of each key of the two upper levels (``"section.field"``).

    Raises:
        YamlError: not YAML, or not the part of YAML that a configuration needs.
    """
    loader: Any = None
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(node, "", lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        raise YamlError(_words(error), *place) from error
    except yaml.reader.ReaderError as error:
        before = text[: int(error.position)]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise YamlError(f"the character U+{int(error.character):04X} is not allowed in YAML", line, column) from error
    except RecursionError:
        raise YamlError("nested too deeply", 1, 1) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(value: Any) -> str:
    """``value`` as YAML text that :func:`parse` and PyYAML read alike."""
    return _dump(value, flow=False)


def dump_field(name: str, value: Any) -> str:
    """``name: value`` on one line, ending in a newline; lists and mappings as ``[a, b]`` and ``{a: b}``."""
    if isinstance(value, dict | list | tuple):
        return f"{name}: {_dump(value, flow=True)}"
    return _dump({name: value}, flow=False)


def _dump(value: Any, *, flow: bool) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf, default_flow_style=flow
    )
    return text


# What PyYAML says, and what it means to somebody who writes a configuration.
_MEANINGS = (
    ("'\\t'", "a tab where YAML wants spaces; indent with spaces"),
    ("mapping values are not allowed", "a second ':' on this line, or wrong indentation; put text with ': ' in quotes"),
    ("could not find expected ':'", "this line is no 'field: value'; is a ':' missing?"),
    ("expected <block end>", "wrong indentation: this line does not stand under the one that it belongs to"),
    ("found unexpected end of stream", "the text ends within quotes; a quotation mark is missing"),
    ("'<stream end>'", "the text ends too early; is a ']' or '}' missing?"),
    ("expected ',' or", "a ',' or the closing bracket is missing"),
)


def _words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not valid YAML"
    for sign, meaning in _MEANINGS:
        if sign in problem:
            return meaning
    return f"{problem} {error.context}" if error.context else problem


def _problem(message: str, node: yaml.Node) -> YamlError:
    return YamlError(message, node.start_mark.line + 1, node.start_mark.column + 1)


def _value(node: yaml.Node, path: str, lines: dict[str, int]) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item, f"{path}.", lines) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, kind)
    raise _problem(f"the tag {node.tag} is not supported", node)


def _mapping(node: yaml.MappingNode, path: str, lines: dict[str, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _problem("a key must be a plain name", key_node)
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in result:
            raise _problem(f"{path}{key} stands twice, first in line {first[key]}; remove one", key_node)
        first[key] = line
        lines[f"{path}{key}"] = line
        result[key] = _value(value_node, f"{path}{key}.", lines)
    return result


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = str(node.value)
    if kind == "str":
        return text
    try:
        if kind == "null":
            return None
        if kind == "bool" and _BOOL.match(text):
            return text.lower() == "true"
        if kind == "int":
            digits = text.replace("_", "")
            return int(digits, 0 if re.match(r"[-+]?0[xo]", digits) else 10)
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", ""), flags=re.IGNORECASE))
    except ValueError as error:
        raise _problem(f"{text[:40]!r} is no number that can be read", node) from error
    raise _problem(f"the tag {node.tag} is not supported", node)
