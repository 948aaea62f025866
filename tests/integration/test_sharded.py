"""The loading strategies on the CPU: sharded trains as stock does, digit for digit; the others run, with traces."""

from __future__ import annotations

import pytest

from qz3_widgets.analysis.memory import peaks
from qz3_widgets.analysis.proof import prove
from qz3_widgets.analysis.summary import summarize
from qz3_widgets.plotting.report import export_html
from qz3_widgets.runs.store import Run

from .real_runs import Runs, losses

STEPS = 10
NOISE = 5e-3  # bf16, and sums in another order


def figures(run: Run) -> list[tuple[int, float, float]]:
    """Step, loss with all its digits, and the gradient norm, which is summed in fp64 in another order."""
    frame = run.metrics().query("event == 'step'")
    norms = frame["grad_norm"].round(12).tolist()
    return list(zip(frame["step"].tolist(), frame["loss"].tolist(), norms, strict=True))


@pytest.fixture(scope="module")
def sharded(ways: dict[str, Run]) -> Run:
    return ways["ten-sharded"]


@pytest.fixture(scope="module")
def stock(ways: dict[str, Run]) -> Run:
    return ways["ten-stock"]


def test_ten_steps_are_those_of_stock_to_the_last_digit(sharded: Run, stock: Run) -> None:
    found = figures(sharded)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert found == figures(stock)
    assert found[-1][1] < found[0][1]
    evaluations = [run.metrics().query("event == 'eval'")["eval_loss"].tolist() for run in (sharded, stock)]
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[0]) == 1
    assert sharded.adapter_dir is not None
    assert stock.adapter_dir is not None
    file = "adapter_model.safetensors"
    assert (sharded.adapter_dir / file).read_bytes() == (stock.adapter_dir / file).read_bytes()


def test_a_rank_holds_less_after_the_load(sharded: Run, stock: Run) -> None:
    held = {}
    for run in (sharded, stock):
        frame = peaks(run.memory())
        load = frame[frame["phase"] == "load"]
        held[run.run_id] = load.set_index("rank")["settled_bytes"]
    own, whole = held[sharded.run_id], held[stock.run_id]
    assert sorted(own.index) == [0, 1]
    assert (own < whole).all(), held


def test_parameters_on_the_host(ways: dict[str, Run], sharded: Run) -> None:
    """On the CPU host and device are one, but the way through DeepSpeed's offloading is the real one."""
    run = ways["offloaded"]
    assert figures(run) == figures(sharded)[:4]
    assert prove(run).to_json()["zero3"]["partitioned_fraction"] == 1.0


@pytest.fixture(scope="module")
def replicated(runs: Runs) -> Run:
    return runs.finished("replicated", model__load_strategy="replicated", zero__zero_stage=0, training__max_steps=4)


@pytest.fixture(scope="module")
def device_map(runs: Runs) -> Run:
    changes = {"zero__zero_stage": 0, "launch__num_processes": 1, "training__per_device_train_batch_size": 4}
    return runs.finished("device-map", model__load_strategy="device_map", training__max_steps=4, **changes)


def test_replicated(replicated: Run, stock: Run) -> None:
    """Data parallel, by another road to the same losses."""
    expected = losses(stock)
    assert losses(replicated) == pytest.approx({step: expected[step] for step in range(1, 5)}, abs=NOISE)
    assert_traced(replicated, num_ranks=2, load_strategy="replicated")


def test_device_map(device_map: Run) -> None:
    found = losses(device_map)
    assert sorted(found) == [1, 2, 3, 4]
    assert found[4] < found[1]
    assert_traced(device_map, num_ranks=1, load_strategy="device_map")


def assert_traced(run: Run, *, num_ranks: int, load_strategy: str) -> None:
    assert not run.layout.deepspeed_json.exists()
    trace = run.memory()
    assert sorted(trace.headers) == list(range(num_ranks))
    assert all(end["outcome"] == "succeeded" for end in trace.ends.values())
    phases = set(trace.frame["phase"])
    assert {"load", "attach", "step", "eval", "save"} <= phases, phases
    assert run.plan_json["load_strategy"] == load_strategy
    summary = summarize(run)
    assert (summary["state"], summary["num_steps"]) == ("succeeded", 4)
    assert run.adapter_dir is not None


def test_all_in_one_report(runs: Runs, sharded: Run, stock: Run, replicated: Run, device_map: Run) -> None:
    chosen = [sharded, stock, replicated, device_map]
    page = export_html(chosen, runs.folder / "strategies.html").read_text(encoding="utf-8")
    for run in chosen:
        assert run.run_id in page
