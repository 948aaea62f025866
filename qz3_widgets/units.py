"""Bytes, GiB and durations: the only place where ``2**30`` is written.

Sizes travel as bytes (names end in ``_bytes``) and become text only here. Binary prefixes are
spelled ``MiB`` and ``GiB``; the decimal ``GB`` is never used, since the two differ by 7 %.
"""

from __future__ import annotations

MIB = 2**20
GIB = 2**30


def to_gib(num_bytes: float) -> float:
    """Bytes as GiB."""
    return num_bytes / GIB


def to_mib(num_bytes: float) -> float:
    """Bytes as MiB."""
    return num_bytes / MIB


def format_bytes(num_bytes: float | None) -> str:
    """Bytes as text with one decimal and the binary unit that fits: ``"52.3 MiB"``, ``"1.4 GiB"``.

    ``None`` (not measured) becomes ``"-"``.
    """
    if num_bytes is None:
        return "-"
    size = float(num_bytes)
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def pick_unit(largest_bytes: float) -> tuple[str, float]:
    """The unit for an axis whose largest value is ``largest_bytes``: its name and its size in bytes."""
    return ("GiB", float(GIB)) if largest_bytes >= GIB else ("MiB", float(MIB))


def format_duration(seconds: float | None) -> str:
    """Seconds as text: ``"0.8 s"``, ``"41 s"``, ``"1 min 52 s"``, ``"3 h 05 min"``; ``None`` becomes ``"-"``."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
