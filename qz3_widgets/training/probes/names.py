"""Names of parameters: the same before and after the adapter, and many of them in one line."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_WRAPPING = (".base_layer", ".original_module")
_PEFT_PREFIX = "base_model.model."


def base_name(name: str) -> str:
    """A parameter's name in the base model, whatever PEFT has wrapped around it since."""
    name = name.removeprefix("module.").removeprefix(_PEFT_PREFIX)
    for part in _WRAPPING:
        name = name.replace(part, "")
    return name


def compress(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers only, as one: ``model.layers.{0..31}.mlp.up_proj``. In order of appearance."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        groups[_NUMBER.sub("#", name)].append(tuple(int(found) for found in _NUMBER.findall(name)))
    lines: list[str] = []
    for pattern, numbers in groups.items():
        ranges = [_range(sorted({entry[place] for entry in numbers})) for place in range(len(numbers[0]))]
        pieces = pattern.split("#")
        lines.append("".join(piece + found for piece, found in zip(pieces, [*ranges, ""], strict=True)))
    return lines


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if list(values) == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"
