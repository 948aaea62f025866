from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest

from qz3_widgets.plotting import plot_loss, plot_memory
from qz3_widgets.plotting.style import drawing_colors, tokens
from qz3_widgets.runs.store import Run
from tests.fake_runs import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(make_run(tmp_path_factory.mktemp("runs")))


def test_a_notebook_gets_svg_that_follows_its_theme(run: Run) -> None:
    html = plot_memory(run)._repr_html_()
    assert html.count("<style>") == 1
    assert 'role="img"' in html
    assert 'aria-label="Memory of 2 ranks' in html
    assert "var(--qz3-run-1, #0072b2)" in html
    assert "var(--qz3-ui" in html
    assert "<script" not in html
    # Every colour is a token's.
    bare = re.sub(r"var\([^)]*\)", "", html[html.index("<svg") :])
    assert re.findall(r'style="[^"]*#[0-9a-f]{6}', bare) == []


def test_the_same_figure_gives_the_same_bytes(run: Run) -> None:
    view = plot_loss(run)
    assert view.svg() == view.svg() == plot_loss(run).svg()


def test_changes_of_the_reader_are_shown(run: Run) -> None:
    view = plot_loss(run)
    view.ax.set_title("my own title")
    assert "my own title" in view.svg()


def test_png(run: Run) -> None:
    data = plot_loss(run)._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1440


def test_save(run: Run, tmp_path: Path) -> None:
    view = plot_memory(run)
    for theme in ("light", "dark"):
        text = view.save(tmp_path / "a.svg", theme=theme).read_text()  # type: ignore[arg-type]
        root = ET.fromstring(text)
        assert root.attrib["width"]
        assert "var(" not in text
        assert tokens(theme)["run-1"] in text  # type: ignore[arg-type]
        assert f'fill="{tokens(theme)["bg"]}"' in text  # type: ignore[arg-type]
    assert view.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    numbers = pd.read_csv(view.save(tmp_path / "a.csv"))
    assert {"rank", "time_seconds", "phase", "allocated_bytes"} <= set(numbers.columns)
    assert len(numbers) == len(run.memory().frame)


def test_save_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    view = plot_loss(run)
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.csv, not \.pdf"):
        view.save(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="without an ending"):
        view.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"nowhere.*can't be written"):
        view.save(tmp_path / "nowhere" / "a.svg")


def test_names_are_escaped(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path, state="failed", num_steps=3, error="ValueError: <b>&\"$x_1$'"))
    svg = plot_memory(run).svg()
    ET.fromstring(svg)
    assert "<b>" not in svg
    assert "$x_1$" in svg


def test_colours() -> None:
    light, dark, drawn = tokens("light"), tokens("dark"), drawing_colors()
    assert light["run-1"] == "#0072b2"
    assert dark["run-1"] == "#56b4e9"
    assert light["bg"] == "#ffffff"
    assert dark["bg"] == "#1b1b1b"
    assert set(dark) == set(light) == set(drawn)
    assert len(set(drawn.values())) == len(drawn)
    for token, color in drawn.items():
        assert abs(int(color[1:], 16) - int(light[token][1:], 16)) < 12
