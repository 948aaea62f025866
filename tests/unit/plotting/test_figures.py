from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from qz3_widgets.plotting import FigureView, plot_loss, plot_memory, plot_memory_compare, plot_peaks, plot_time
from qz3_widgets.plotting.style import styled
from qz3_widgets.runs.store import Run
from tests.fake_runs import CPU_135M_SHORT, GPU_70B, GPU_70B_SHARDED, make_run

OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.62 GiB. GPU 3 has a total capacity of 79.10 GiB"

SCENES: dict[str, dict[str, Any]] = {
    "demo": {},
    "one rank": {"world_size": 1, "eval_steps": None},
    "one step": {"num_steps": 1, "eval_steps": None},
    "eight ranks": {"world_size": 8, "shape": GPU_70B, "num_steps": 20, "eval_steps": 10},
    "sixteen ranks": {"world_size": 16, "shape": GPU_70B_SHARDED, "sample_seconds": 1.0},
    "missing rank": {"world_size": 3, "missing_ranks": (0,), "torn": {1: 2}},
    "killed": {"state": "failed", "num_steps": 7, "max_steps": 40},
    "killed at once": {"state": "failed", "num_steps": 1, "eval_steps": None},
    "out of memory": {
        "state": "failed", "fail_phase": "load", "failed_rank": 3, "error": OOM, "world_size": 8, "shape": GPU_70B,
        "sample_seconds": 1.0,
    },
    "failed without a trace": {"state": "failed", "missing_ranks": (1,)},
    "running": {"state": "running", "num_steps": 30, "max_steps": 200},
    "lost": {"state": "lost", "num_steps": 5, "max_steps": 9},
    "resumed": {"attempts": 2, "num_steps": 14},
    "not a number": {"nan_at": 6},
    "long": {"num_steps": 300, "eval_steps": 20},
    "no evaluation": {"eval_steps": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    found = {
        name: Run(make_run(folder, run_id=f"{name.replace(' ', '-')}-20260917-12131{i % 10}", seed=i, **changes))
        for i, (name, changes) in enumerate(SCENES.items())
    }
    pending = Run(make_run(folder, run_id="pending-20260917-130000", state="pending"))
    shutil.rmtree(pending.layout.trace_dir)
    header_only = Run(make_run(folder, run_id="header-20260917-130000", state="running"))
    for path in header_only.layout.trace_dir.iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")
    one_record = Run(make_run(folder, run_id="record-20260917-130000", state="running", world_size=1))
    path = one_record.layout.memory_trace(0)
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    one_record.layout.metrics.unlink()
    return {**found, "pending": pending, "header only": header_only, "one record": one_record}


NAMES = (*SCENES, "pending", "header only", "one record")
PLOTS: dict[str, Callable[..., Any]] = {
    "memory": plot_memory,
    "peaks": plot_peaks,
    "loss": plot_loss,
    "time": plot_time,
    "tokens": lambda run, **kwargs: plot_loss(run, "tokens", **kwargs),
    "loss by time": lambda run, **kwargs: plot_loss(run, "time", **kwargs),
    "compare": lambda run, **kwargs: plot_memory_compare([run], **kwargs),
    "compare by step": lambda run, **kwargs: plot_memory_compare([run], "step", **kwargs),
    "compare by time": lambda run, **kwargs: plot_memory_compare([run], "time", **kwargs),
}


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, with its box in pixels."""
    with styled():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        in_view = []
        for text in texts:
            box = text.get_window_extent(renderer)
            on_axis = any(text in (*ax.get_xticklabels(), *ax.get_yticklabels()) for ax in figure.axes)
            if not on_axis or _inside_axes(figure, text):
                in_view.append((text.get_text(), box))
    return in_view


def _inside_axes(figure: Figure, text: Text) -> bool:
    """Tick labels beyond the axis' limits are not drawn."""
    for ax in figure.axes:
        if text in ax.get_yticklabels():
            low, high = ax.get_ylim()
            return low <= text.get_position()[1] <= high
        if text in ax.get_xticklabels():
            low, high = ax.get_xlim()
            return low <= text.get_position()[0] <= high
    return True


def check_readable(figure: Figure) -> None:
    """No text leaves the figure, none covers another."""
    found = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in found:
        assert box.x0 > -1, text
        assert box.y0 > -1, text
        assert box.x1 < width + 1, text
        assert box.y1 < height + 1, text
    for (first, a), (second, b) in itertools.combinations(found, 2):
        overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
        overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes have room above and below the letters: lines of a list may touch.
        assert overlap_x <= 1 or overlap_y <= 3.5, f"{first!r} and {second!r}"


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_scene_is_readable(scenes: dict[str, Run], name: str, plot: str) -> None:
    view = PLOTS[plot](scenes[name])
    assert isinstance(view, FigureView)
    assert view.alt.endswith(".")
    check_readable(view.figure)
    svg = view.svg()
    ET.fromstring(svg)
    assert svg.startswith("<svg class=")
    assert len(svg) < 400_000


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("name", ["demo", "killed", "pending", "not a number"])
def test_into_given_axes(scenes: dict[str, Run], name: str, plot: str) -> None:
    figure = Figure(figsize=(7, 3))
    ax = figure.add_subplot()
    assert PLOTS[plot](scenes[name], ax=ax) is ax
    assert isinstance(ax, Axes)
    FigureCanvasAgg(figure).draw()


def several(scenes: dict[str, Run], *names: str) -> list[Run]:
    return [scenes[name] for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ("demo", "no evaluation"),
        ("eight ranks", "out of memory"),
        ("demo", "pending", "killed", "not a number", "resumed", "running"),
        ("sixteen ranks", "eight ranks"),
        ("pending", "header only"),
        ("missing rank", "demo"),
    ],
)
def test_several_runs(scenes: dict[str, Run], names: tuple[str, ...]) -> None:
    runs = several(scenes, *names)
    for view in (
        *(plot_loss(runs, x, width=width) for x in ("step", "tokens", "time") for width in (720, 520)),
        *(plot_memory_compare(runs, by) for by in ("phase", "step", "time")),
    ):
        check_readable(view.figure)
        ET.fromstring(view.svg())


def test_every_run_is_there(scenes: dict[str, Run]) -> None:
    names = ("demo", "killed", "resumed", "one step", "no evaluation")
    runs = several(scenes, *names)
    svg = plot_loss(runs).svg()
    for run in runs:
        assert f">{run.config.name} " in svg
    # The fifth has the first one's colour, and dashes.
    assert svg.count("var(--qz3-run-1,") > 1


def texts(view: FigureView) -> str:
    return " | ".join(text for text, _ in boxes(view.figure))


def test_what_memory_says(scenes: dict[str, Run]) -> None:
    demo = texts(plot_memory(scenes["demo"]))
    for words in ("MiB", "start", "load", "steps 1 to 12", "host memory 23.4 GiB, off scale", "last 3 steps", "rank 1"):
        assert words in demo
    large = texts(plot_memory(scenes["eight ranks"]))
    assert "capacity 79.4 GiB" in large
    assert "off scale" not in large
    assert "rank 7" in large
    many = texts(plot_memory(scenes["sixteen ranks"]))
    assert "13 more between" in many
    assert "rank 15 emptiest" in many
    assert "no trace" in texts(plot_memory(scenes["missing rank"]))
    killed = texts(plot_memory(scenes["killed"]))
    assert "rank 1 failed in step 7" in killed
    assert "killed by SIGKILL" in killed
    assert "rank 1 failed; it left no record" in texts(plot_memory(scenes["failed without a trace"]))
    assert "so far" in texts(plot_memory(scenes["running"]))
    assert "attempt 2" in texts(plot_memory(scenes["resumed"]))
    assert "No memory is on record yet." in texts(plot_memory(scenes["pending"]))


def test_the_axis_reaches_past_the_capacity_or_names_it(scenes: dict[str, Run]) -> None:
    assert plot_memory(scenes["eight ranks"]).ax.get_ylim()[1] > 79.4
    top = plot_memory(scenes["demo"]).ax.get_ylim()
    assert top[0] == 0
    assert 320 < top[1] < 500


def test_what_peaks_say(scenes: dict[str, Run]) -> None:
    demo = texts(plot_peaks(scenes["demo"]))
    for words in ("load", "ready", "step", "peak", "settled", "319.3"):
        assert words in demo
    assert "stopped" in texts(plot_peaks(scenes["out of memory"]))
    assert texts(plot_peaks(scenes["missing rank"])).count("no trace") == 5


def test_what_loss_says(scenes: dict[str, Run]) -> None:
    assert "evaluation" in texts(plot_loss(scenes["demo"]))
    assert "still to come" in texts(plot_loss(scenes["running"]))
    assert "not a number from step 6 on" in texts(plot_loss(scenes["not a number"]))
    assert "failed" in texts(plot_loss(scenes["killed"]))
    assert "No loss is on record yet." in texts(plot_loss(scenes["out of memory"]))


def test_two_runs_that_agree(tmp_path: Path) -> None:
    runs = [Run(make_run(tmp_path, run_id=f"{name}-20260917-121314")) for name in ("one", "other")]
    assert "The two curves agree: largest difference 0.000" in texts(plot_loss(runs))
    differ = [runs[0], Run(make_run(tmp_path, run_id="third-20260917-121314", shape=CPU_135M_SHORT, loss=(5.5, 3)))]
    assert "agree" not in texts(plot_loss(differ))


def with_parts(run: Run) -> Run:
    """The run with the seconds of its steps' parts on record."""
    lines = []
    for line in run.layout.metrics.read_text().splitlines():
        record = json.loads(line)
        if record.get("event") == "step":
            parts = {"data": 0.02, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}
            record |= {f"{name}_seconds": share * record["step_seconds"] for name, share in parts.items()}
        lines.append(json.dumps(record))
    run.layout.metrics.write_text("\n".join(lines) + "\n")
    return run


def test_what_time_says(tmp_path: Path) -> None:
    first, second = (with_parts(Run(make_run(tmp_path, run_id=name))) for name in ("first", "second"))
    view = plot_time([first, second])
    assert "first" in texts(view)
    assert "second" in texts(view)
    check_readable(view.figure)
    assert list(view.data["run"]) == ["first", "second"]
    row = view.data.iloc[0]
    assert row["forward"] == pytest.approx(0.3 * row["step_seconds"])
    assert "backward" in view.alt
    assert "optimizer " in texts(view)


def test_time_without_parts_says_so(scenes: dict[str, Run]) -> None:
    view = plot_time(scenes["demo"])
    assert "recorded without its parts" in view.alt
    assert len(view.data) == 0


def test_only_some_ranks(scenes: dict[str, Run]) -> None:
    words = texts(plot_memory(scenes["sixteen ranks"], ranks=[3, 4]))
    assert "rank 3" in words
    assert "rank 15" not in words
    with pytest.raises(ValueError, match="no records of rank 99"):
        plot_memory(scenes["demo"], ranks=[99])


def test_bad_input(scenes: dict[str, Run]) -> None:
    with pytest.raises(ValueError, match="x is 'hours'"):
        plot_loss(scenes["demo"], "hours")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="by is 'clock'"):
        plot_memory_compare([scenes["demo"]], "clock")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="one run or more"):
        plot_memory_compare([])
    with pytest.raises(ValueError, match="span is 0"):
        plot_loss(scenes["demo"], span=0)


def test_traces_alone_will_do(scenes: dict[str, Run]) -> None:
    trace = scenes["killed"].memory()
    assert "rank 0" in texts(plot_memory(trace))
    assert "step" in texts(plot_peaks(trace))


def test_the_readers_own_settings_neither_show_nor_change(scenes: dict[str, Run]) -> None:
    before = dict(mpl.rcParams)
    plain = plot_memory(scenes["demo"]).svg()
    assert dict(mpl.rcParams) == before
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "axes.grid": True}):
        assert plot_memory(scenes["demo"]).svg() == plain


def test_no_pyplot() -> None:
    import subprocess
    import sys

    code = "import sys, qz3_widgets.plotting.report; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_aligned_by_what_is_chosen(scenes: dict[str, Run]) -> None:
    runs = several(scenes, "demo", "no evaluation")
    by_step, by_time = plot_memory_compare(runs, "step"), plot_memory_compare(runs, "time")
    last = max(int(run.metrics()["step"].max()) for run in runs)
    assert by_step.ax.get_xlim() == (0, last)
    assert by_step.data["steps"].between(0, last).all()
    seconds = max(float(run.memory().last_attempt()["time_seconds"].max()) for run in runs)
    assert by_time.ax.get_xlim()[1] == pytest.approx(seconds)
    assert by_time.data["time_seconds"].max() == pytest.approx(seconds)
    assert "Memory by time" in by_time.alt


def test_loss_by_time_goes_on_where_it_was_resumed(scenes: dict[str, Run]) -> None:
    run = scenes["resumed"]
    assert run.metrics()["attempt"].nunique() > 1
    ax = plot_loss(run, "time").ax
    seconds = ax.lines[1].get_xdata()
    assert (np.diff(np.asarray(seconds, dtype=float)) > 0).all()
    assert max(seconds) > run.metrics()["time_seconds"].max()


def test_a_narrow_loss_marks_evaluations_and_names_the_runs(scenes: dict[str, Run]) -> None:
    runs = several(scenes, "demo", "resumed")
    narrow = plot_loss(runs, width=520)
    assert narrow.figure.bbox.width == 520
    assert "evaluation" not in texts(narrow)
    assert "evaluation" in texts(plot_loss(runs))
    assert "evaluation" in texts(plot_loss(runs[0], width=520))
