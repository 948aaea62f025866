"""Rungs that are as predicted lead on, one that is not stops; the rest grows with the layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from qz3_widgets import ladder
from qz3_widgets.config.presets import preset
from qz3_widgets.ladder import Rung, climb
from qz3_widgets.plan.capabilities import Capabilities
from qz3_widgets.plan.memory import PHASES, forecast
from qz3_widgets.plan.plan import Plan
from qz3_widgets.plan.shapes import model_shape

MACHINE = Capabilities(host="here", num_cpus=2, host_memory_bytes=2**36)


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Climbs with rehearsals that measure what is predicted, and so many bytes more a layer in the peak of a step."""
    monkeypatch.setattr(ladder, "peaks", lambda table: table)

    def climb_with(more: int = 0, states: dict[int, str] | None = None, **options: Any) -> list[Rung]:
        def measure(plan: Plan, runs_dir: Path) -> Any:
            shape = model_shape(plan.config)
            found = forecast(plan.config, shape, device="cpu", world_size=plan.world_size)
            rows = [
                {
                    "phase": phase,
                    "settled_bytes": found.phases[phase].settled_bytes,
                    "peak_bytes": found.phases[phase].peak_bytes + (more * shape.num_layers if phase == "step" else 0),
                }
                for phase in PHASES
            ]
            state = (states or {}).get(shape.num_layers, "succeeded")
            status = SimpleNamespace(error="OutOfMemoryError: no", message=None)
            return SimpleNamespace(state=state, status=status, run_id="r", memory=lambda: pd.DataFrame(rows))

        given = {"runs_dir": tmp_path, "capabilities": MACHINE, "measure": measure, **options}
        return list(climb(preset("llama-3.1-8b"), 8, **given))

    return climb_with


def test_all_rungs_as_predicted(go: Any) -> None:
    rungs = go()
    assert [rung.num_layers for rung in rungs] == [2, 4, 32]
    assert all(rung.ok for rung in rungs)
    assert [rung.run_id for rung in rungs] == ["r", "r", None]
    assert rungs[-1].to_json()["extrapolated"] is True
    assert len(rungs[-1].heights) == 6


def test_the_rest_grows_with_the_layers(go: Any) -> None:
    more = 3_000_000
    rungs = go(more)
    assert [rung.ok for rung in rungs[:2]] == [True, True]
    (step,) = [each for each in rungs[-1].heights if (each.phase, each.figure) == ("step", "peak_bytes")]
    assert step.measured_bytes - step.predicted_bytes == 32 * more
    assert rungs[-1].worst == step


def test_a_rung_that_is_not_as_predicted_stops(go: Any) -> None:
    rungs = go(10**9)
    assert [rung.num_layers for rung in rungs] == [2]
    assert not rungs[0].ok


def test_a_rehearsal_that_fails_stops(go: Any) -> None:
    rungs = go(states={4: "failed"})
    assert [rung.ok for rung in rungs] == [True, False]
    assert rungs[-1].problem == "the rehearsal failed: OutOfMemoryError: no"


@pytest.mark.parametrize("rungs", [(2,), (4, 2), (2, 2), (0, 2)])
def test_what_is_no_ladder(go: Any, rungs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two numbers of layers"):
        go(rungs=rungs)


def test_a_model_that_is_too_shallow(go: Any) -> None:
    with pytest.raises(ValueError, match="32 layers, too few"):
        go(rungs=(2, 32))
