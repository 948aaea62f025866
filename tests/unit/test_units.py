from __future__ import annotations

import pytest

from qz3_widgets.units import GIB, MIB, format_bytes, format_duration, pick_unit, to_gib, to_mib


def test_gib_is_binary() -> None:
    assert GIB == 1024 * MIB == 1024**3
    assert to_gib(3 * GIB) == 3.0
    assert to_mib(GIB) == 1024.0


@pytest.mark.parametrize(
    "size,text",
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (54_840_524, "52.3 MiB"),
        (int(1.4 * GIB), "1.4 GiB"),
        (-2 * GIB, "-2.0 GiB"),
        (2000 * GIB, "2000.0 GiB"),
    ],
)
def test_bytes_as_text(size: float | None, text: str) -> None:
    assert format_bytes(size) == text
    assert "GB" not in format_bytes(size)


@pytest.mark.parametrize("largest,name", [(0, "MiB"), (GIB - 1, "MiB"), (GIB, "GiB"), (80 * GIB, "GiB")])
def test_unit_of_an_axis(largest: int, name: str) -> None:
    unit, size = pick_unit(largest)
    assert unit == name
    assert size == (GIB if name == "GiB" else MIB)


@pytest.mark.parametrize(
    "seconds,text",
    [
        (None, "-"),
        (0, "0.0 s"),
        (0.84, "0.8 s"),
        (9.94, "9.9 s"),
        (41, "41 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (112, "1 min 52 s"),
        (3599.7, "1 h 00 min"),
        (3 * 3600 + 300, "3 h 05 min"),
    ],
)
def test_durations_as_text(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
