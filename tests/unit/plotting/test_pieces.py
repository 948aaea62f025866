from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qz3_widgets.plotting.labels import shorten, spread, wrap_text
from qz3_widgets.plotting.scales import memory_scale, short_number
from qz3_widgets.plotting.series import thin_line, tint_outline
from qz3_widgets.plotting.style import text_width

GIB = 2**30


@given(st.lists(st.floats(0, 200), max_size=8))
def test_spread_labels_keep_apart_and_in_order(wanted: list[float]) -> None:
    placed = spread(wanted, 14, 0, 200)
    ordered = sorted(placed)
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(ordered))
    assert all(-1e-6 <= y <= 200 + 1e-6 for y in placed)
    if len(wanted) == 1:
        assert placed == [pytest.approx(wanted[0])]


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=300),
    st.integers(1, 20),
)
def test_thinned_lines_keep_their_extremes(values: list[float], buckets: int) -> None:
    x, y = np.arange(len(values), dtype=float), np.asarray(values)
    thin_x, thin_y = thin_line(x, y, buckets)
    assert len(thin_x) <= max(2 * buckets + 2, 2)
    assert (thin_y.min(), thin_y.max()) == (y.min(), y.max())
    assert (np.diff(thin_x) > 0).all()
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])


@given(st.lists(st.floats(0, 100), min_size=2, max_size=300), st.integers(1, 20))
def test_a_tint_reaches_every_peak(values: list[float], buckets: int) -> None:
    x, low = np.arange(len(values), dtype=float), np.asarray(values)
    high = low + 5
    high[len(high) // 2] = 500
    outline_x, bottom, top = tint_outline(x, low, high, buckets)
    assert (top >= bottom).all()
    assert top.max() == (500 if len(high) // 2 > 0 else high[1:].max())
    assert (np.diff(outline_x) >= 0).all()
    assert (outline_x[0], outline_x[-1]) == (x[0], x[-1])


def test_memory_scale() -> None:
    shown = memory_scale(40 * GIB, [80 * GIB], "cuda")
    assert (shown.unit, shown.capacities, shown.off_scale, shown.what) == ("GiB", (80.0,), (), "capacity")
    assert shown.top > 80
    hidden = memory_scale(GIB // 4, [24 * GIB], "cpu")
    assert (hidden.unit, hidden.capacities, hidden.off_scale) == ("MiB", (), (24.0 * GIB,))
    assert hidden.what == "host memory"
    assert 256 < hidden.top < 400
    assert memory_scale(0.0, [], None).top > 0
    mixed = memory_scale(30 * GIB, [40 * GIB, 640 * GIB, 40 * GIB], "cuda")
    assert (mixed.capacities, mixed.off_scale) == ((40.0,), (640.0 * GIB,))


def test_short_numbers() -> None:
    assert [short_number(value) for value in (0, 950, 9500, 12_000, 1_230_000, 2.5e9)] == [
        "0", "950", "9500", "12k", "1.23M", "2.5G",
    ]  # fmt: skip


def test_text_that_is_too_long() -> None:
    long = "OutOfMemoryError: CUDA out of memory. " * 8
    assert text_width(shorten(long, 150)) <= 150
    assert shorten("short", 150) == "short"
    lines = wrap_text(long, 200)
    assert len(lines) == 2
    assert lines[-1].endswith("…")
    assert all(text_width(line) <= 200 for line in lines)
    assert wrap_text("one line", 200) == ["one line"]
    assert text_width(wrap_text("x" * 500, 100)[0]) <= 100
