"""The plan as a picture: every component is in it, its bars add up, and nothing overlaps the edge."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.presets import preset
from qz3_widgets.plan.imagined import on_imagined
from qz3_widgets.plan.memory import LABELS
from qz3_widgets.plan.prospect import prospect
from qz3_widgets.plotting import FigureView, plot_plan
from qz3_widgets.plotting.plan import GROUPS, grouped

RELEASED = {"model.load_strategy": "stock", "zero.release_gathered": False, "zero.shard_statistics": False}
SCENES = {
    "fits": ("llama-3.1-405b", {}, 8, 80),
    "does not fit": ("llama-3.1-405b", RELEASED, 8, 80),
    "far below": ("llama-3.1-8b", {}, 8, 80),
    "megabytes": ("llama-3.1-8b", {"model.name_or_path": "random:tiny-llama"}, 2, 24),
}


def view(scene: str) -> FigureView:
    name, changes, gpus, gib = SCENES[scene]
    return plot_plan(on_imagined(with_changes(preset(name), changes), gpus, gib))


def test_every_component_is_in_one_group() -> None:
    members = [component for _, _, group in GROUPS for component in group]
    assert sorted(members) == sorted(LABELS)


@pytest.mark.parametrize("scene", SCENES)
def test_bars_add_up_to_the_peak(scene: str) -> None:
    name, changes, gpus, gib = SCENES[scene]
    found = prospect(on_imagined(with_changes(preset(name), changes), gpus, gib))
    for phase in found.fit.forecast.phases.values():
        assert sum(size for _, _, size in grouped(phase.peak)) == phase.peak_bytes
    shown = plot_plan(found)
    assert found.verdict in shown.alt
    assert shown.data.groupby("phase")["peak_bytes"].sum().to_dict() == {
        phase: each.peak_bytes for phase, each in found.fit.forecast.phases.items()
    }


@pytest.mark.parametrize("scene", SCENES)
def test_all_words_are_inside_the_figure(scene: str) -> None:
    figure = view(scene).figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    edge = figure.bbox
    words = [text for ax in figure.axes for text in ax.texts]
    assert len(words) >= 10
    for text in words:
        box = text.get_window_extent(canvas.get_renderer())
        assert edge.x0 - 1 <= box.x0 <= box.x1 <= edge.x1 + 1, text.get_text()
        assert edge.y0 - 1 <= box.y0 <= box.y1 <= edge.y1 + 1, text.get_text()


def test_what_does_not_fit_is_marked() -> None:
    words = [text.get_text() for text in view("does not fit").figure.findobj(Text)]
    assert sum(word.endswith("✕") for word in words) == 3
    assert not any(text.get_text().endswith("✕") for text in view("fits").figure.findobj(Text))
    assert any("off scale" in text.get_text() for text in view("far below").figure.findobj(Text))


def test_it_draws_into_given_axes() -> None:
    ax = Figure(figsize=(6, 3)).add_subplot()
    assert plot_plan(on_imagined(preset("llama-3.1-8b"), 2, 24), ax=ax) is ax
    assert len(ax.patches) > 6


def test_a_plan_shows_its_picture_in_a_notebook() -> None:
    import qz3_widgets

    plan = qz3_widgets.on_imagined(preset("llama-3.1-405b"), 8, 80)
    shown = plan._repr_html_()
    assert "<svg" in shown
    assert "capacity" in shown


def test_a_plan_of_an_unknown_shape_shows_no_picture() -> None:
    import qz3_widgets

    plan = qz3_widgets.on_imagined(
        with_changes(preset("llama-3.1-8b"), {"model.name_or_path": "somebody/model"}), 8, 80
    )
    assert "<svg" not in plan._repr_html_()
