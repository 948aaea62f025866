"""Taking secrets out of what is written to disk or shown. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"

_SECRET_NAME = (
    r"(?:[A-Z0-9_]*(?:TOKEN(?!IZER|S)|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY)[A-Z0-9_]*"
    r"|(?i:[a-z0-9_-]*(?:api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?token|access[_-]?token|hf[_-]?token"
    r"|secret|password|passwd)))"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s,;&"'}\])]+)"""
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Authorization: Bearer abc, also as a JSON or Python pair.
    (re.compile(r"""(?i)(\bauthorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic|token)\s+)?)[^\s"',]+"""), r"\1***"),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), r"\1***"),
    # https://user:password@host
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s:@]*:[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(\bhttps?://)[^/\s:@]{8,}@"), r"\1***@"),
    # HF_TOKEN=abc, "api_key": "abc"
    (re.compile(rf"""(?<![A-Za-z0-9])({_SECRET_NAME}["']?\s*[=:]\s*){_VALUE}"""), r"\1***"),
    # Tokens that are known by their look.
    # (hf_transfer and its like are no tokens: those are long, or have digits or capitals.)
    (re.compile(r"\bhf_(?:[A-Za-z0-9]{20,}|(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{8,})"), "hf_***"),
    (re.compile(r"\b(gh[pousr]_|github_pat_|sk-|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}"), r"\1***"),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "AKIA***"),
)
_SECRET_OPTION = re.compile(r"(?i)^--?[a-z0-9_-]*(?:token|secret|password|passwd|credential|api[_-]?key)$")
_SECRET_KEY = re.compile(rf"{_SECRET_NAME}|token")


def redact(text: str) -> str:
    """``text`` with every secret in it replaced by ``***``: tokens, passwords, credentials in URLs and headers."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_argv(argv: Sequence[str]) -> list[str]:
    """:func:`redact` for each word, and the word after ``--token`` and its like."""
    words, hide = [], False
    for word in argv:
        words.append(HIDDEN if hide else redact(_redact_option(word)))
        hide = bool(_SECRET_OPTION.match(word))
    return words


def redact_tree(value: Any) -> Any:
    """:func:`redact` for every string in nested dictionaries and lists, and for values whose key names a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and _SECRET_KEY.fullmatch(str(key)) else redact_tree(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_tree(item) for item in value]
    return value


def _redact_option(word: str) -> str:
    name, equals, _ = word.partition("=")
    return f"{name}={HIDDEN}" if equals and _SECRET_OPTION.match(name) else word
