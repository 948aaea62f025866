"""The verdict on a run from its ranks' probes: every check by itself, then over all ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qz3_widgets.analysis.proof import Proof, failures_so_far, prove
from qz3_widgets.analysis.summary import summarize
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.runs.store import Run
from qz3_widgets.terminal_proof import show_proof
from qz3_widgets.trace.probes import CHECKS, WHO, judge
from tests.conftest import Qz3
from tests.fake_runs import make_run

GIB = 2**30
CENSUS = {
    "weights": 8_000_000_000,
    "bytes": 5 * GIB,
    "frozen_weights": 8_000_000_000,
    "partitioned_fraction": 1.0,
    "whole": [],
    "held_bytes": 5 * GIB // 2 + 4000,
    "expected_bytes": 5 * GIB // 2 + 4000,
    "bytes_by_dtype": {"4bit": 4 * GIB, "bfloat16": GIB},
    "bytes_by_device": {"cuda:0": 5 * GIB},
    "missing_weights": 0,
    "layers_4bit": 224,
    "weights_4bit": 7_000_000_000,
    "bytes_per_parameter": 0.66,
    "bytes_per_4bit_parameter": 0.516,
    "layers_16bit": [
        {
            "why": "embedding",
            "names": ["model.embed_tokens.weight"],
            "tensors": 1,
            "weights": 500_000_000,
            "bytes": GIB,
        },
        {"why": "head", "names": ["lm_head.weight"], "tensors": 1, "weights": 500_000_000, "bytes": GIB},
    ],
    "matrix_weights": 7_900_000_000,
    "statistics": {"sharded_bytes": 100_000_000, "whole_bytes": 0, "nested_bytes": 400_000},
    "persistent_bytes": 500_000,
}
GOOD: dict[str, Any] = {
    "schema_version": 1,
    "rank": 0,
    "world_size": 2,
    "rehearsal": False,
    "asked": {
        "load_strategy": "sharded", "zero_stage": 3, "load_in_4bit": True, "shard_statistics": True,
        "release_gathered": True, "offload_param_device": "none", "skipped_modules": [],
    },
    "problems": [],
    "failures": [],
    "seconds": {"loaded": 0.1},
    "loaded": {**CENSUS, "zero3_registered": True, "allocated_bytes": 5 * GIB // 2 + 10**6, "offloaded": False},
    "checksum": {"model": "00ff", "parts": "01", "whole": "02", "whole_agrees": True},
    "ready": {
        **CENSUS, "persistence_threshold": 40960, "beyond_threshold_bytes": 0, "beyond_threshold": [],
        "trainable_tensors": 448, "trainable_weights": 10**7, "trainable_partitioned": 448,
    },
    "step": {
        "peaks": [
            {"alive_bytes": 10**8, "needed_bytes": 10**8, "when": "forward", "where": "model.layers.3.mlp.up_proj"},
            {"alive_bytes": 1.5 * 10**8, "needed_bytes": 1.5 * 10**8, "when": "backward", "where": "model.layers.3"},
        ],
        "leaked_bytes": 0, "model_bytes": 4 * GIB, "largest_unit_bytes": 3 * 10**7, "fetches": 1344,
    },
    "gradients": {
        "tensors": 448, "missing": [], "num_missing": 0, "zero": [], "num_zero": 0, "a_checked": True, "steps": 2,
    },
    "ended": {"tensors": 600, "changed": [], "checksum_before": "00ff", "checksum": "00ff"},
}  # fmt: skip
NAMES = ["model.layers.{0..31}.mlp.experts.gate_up_proj", "model.layers.{0..31}.mlp.experts.down_proj"]
FUSED = {"why": "fused", "names": NAMES, "tensors": 64, "weights": 6 * 10**9, "bytes": 12 * 10**9}
ROUTER = {"why": "not_linear", "names": ["gate"], "tensors": 32, "weights": 10**6, "bytes": 2 * 10**6}
PLAIN = {"why": "unexplained", "names": ["model.layers.7.mlp.up_proj.weight"], "tensors": 1, "weights": 9, "bytes": 18}
LEFT = CENSUS["layers_16bit"]


def changed(*changes: tuple[str, Any], base: dict[str, Any] = GOOD) -> dict[str, Any]:
    """The good probe with ``("loaded.bytes", 1)`` set."""
    probe = copy.deepcopy(base)
    for path, value in changes:
        *folders, leaf = path.split(".")
        place = probe
        for folder in folders:
            place = place[folder]
        place[leaf] = value
    return probe


def failed(probe: dict[str, Any]) -> dict[str, str]:
    return {finding.check: finding.sentence for finding in judge(probe) if finding.outcome == "failed"}


def test_a_good_probe_passes_every_check() -> None:
    findings = judge(GOOD)
    assert [finding.check for finding in findings] == list(CHECKS)
    assert {finding.outcome for finding in findings} == {"passed"}


@pytest.mark.parametrize(
    "changes, check, words",
    [
        ([("asked.zero_stage", 2)], "stage", "zero.zero_stage is 2: gradients and optimizer state are sharded"),
        ([("asked.zero_stage", 1)], "stage", "only the optimizer's state is sharded"),
        ([("asked.zero_stage", 0)], "stage", "nothing is sharded"),
        ([("asked.load_in_4bit", False)], "quantized", "quantization.load_in_4bit is off"),
        ([("loaded.layers_4bit", 0), ("ready.layers_4bit", 0), ("loaded.layers_16bit", [])], "quantized", "no effect"),
        ([("loaded.missing_weights", 7)], "present", "7 of 8,000,000,000 weights were never loaded"),
        ([("loaded.zero3_registered", False), ("loaded.partitioned_fraction", 0.0)], "registered", "not registered"),
        ([("asked.load_strategy", "stock"), ("loaded.partitioned_fraction", 0.0)], "partitioned_at_load",
         "does not shard a 4-bit model while it loads"),
        ([("loaded.partitioned_fraction", 0.75), ("loaded.whole", ["lm_head.weight"])], "partitioned_at_load",
         f"{WHO} held 25.0 % of the frozen weights whole right after loading: lm_head.weight"),
        ([("loaded.held_bytes", 3 * GIB)], "partitioned_at_load",
         f"{WHO} held 3.0 GiB of the model right after loading, 60.0 % of it, where its part is 2.5 GiB"),
        ([("loaded.layers_16bit", [*LEFT, FUSED])], "layers", "75.0 % of the model's weights stay in 16 bit"),
        ([("loaded.layers_16bit", [*LEFT, PLAIN])], "layers", "model.layers.7.mlp.up_proj.weight"),
        ([("loaded.allocated_bytes", 4 * GIB)], "allocated", "had 4.0 GiB more allocated after loading"),
        ([("ready.partitioned_fraction", 0.5), ("ready.whole", ["a", "b"])], "partitioned_when_ready", "a, b"),
        ([("step.leaked_bytes", 10**9), ("step.peaks", [{"alive_bytes": 4 * GIB, "needed_bytes": 10**8}])], "released",
         "4.0 GiB of them alive at the peak of a step, of 4.0 GiB in the model, where 95.4 MiB had to be"),
        ([("ready.statistics.whole_bytes", 10**8)], "statistics", "95.4 MiB of quantization statistics whole"),
        ([("ready.beyond_threshold_bytes", 10**7), ("ready.beyond_threshold", ["k_proj"])], "persistent", "k_proj"),
        ([("gradients.num_missing", 42), ("gradients.missing", ["model.layers.2.x"])], "gradients",
         "42 of 448 trainable tensors got no gradient in the first step, and are not trained: model.layers.2.x"),
        ([("gradients.num_zero", 21), ("gradients.zero", ["model.layers.2.x"])], "gradients", "exactly zero"),
        ([("gradients.tensors", 0)], "gradients", "nothing is trainable"),
        ([("ended.changed", ["model.norm.weight"])], "unchanged", "changed during the training: model.norm.weight"),
    ],
)  # fmt: skip
def test_each_check_fails_by_itself(changes: list[tuple[str, Any]], check: str, words: str) -> None:
    found = failed(changed(*changes))
    assert list(found) == [check]
    assert words in found[check]


@pytest.mark.parametrize(
    "changes",
    [
        [("loaded.layers_16bit", [*LEFT, ROUTER])],  # a router is small
        [("loaded.zero3_registered", False)],  # what is partitioned all the same is no fault
        [("step", {})],  # no 4-bit weights to watch
        [("asked.shard_statistics", False), ("ready.statistics.whole_bytes", 10**8)],
        [("gradients.a_checked", False)],  # a run of one step
        [("loaded.allocated_bytes", 8 * GIB), ("loaded.offloaded", True)],
        [("step.leaked_bytes", 10**7)],  # no more than one layer
        [("rehearsal", True), ("gradients.num_zero", 21)],  # most of what is gathered there is nobody's
    ],
)
def test_what_is_no_fault(changes: list[tuple[str, Any]]) -> None:
    assert failed(changed(*changes)) == {}


@pytest.mark.parametrize("strategy", ["replicated", "device_map"])
def test_not_sharded_by_choice(strategy: str) -> None:
    whole = [("loaded.partitioned_fraction", 0.0), ("ready.partitioned_fraction", 0.0), ("step", {})]
    probe = changed(("asked.load_strategy", strategy), ("asked.zero_stage", 0), *whole)
    assert failed(probe) == {}
    assert "not sharded, by choice" in judge(probe)[0].sentence
    assert list(failed(changed(("asked.load_in_4bit", False), base=probe))) == ["quantized"]


def test_what_is_not_there_yet_is_not_known() -> None:
    early = {name: value for name, value in GOOD.items() if name not in ("ready", "step", "gradients", "ended")}
    unknown = [finding.check for finding in judge(early) if finding.outcome == "unknown"]
    assert unknown == [
        "partitioned_when_ready", "released", "statistics", "persistent", "gradients", "unchanged",
    ]  # fmt: skip


# Over all ranks.


def write(runs_dir: Path, *probes: dict[str, Any], **fake: Any) -> Run:
    root = make_run(runs_dir, **fake)
    layout = RunLayout(root)
    for rank, probe in enumerate(probes):
        layout.probe(rank).write_text(json.dumps({**probe, "rank": rank}), encoding="utf-8")
    return Run(root)


def proven(runs_dir: Path, *probes: dict[str, Any], **fake: Any) -> Proof:
    return prove(write(runs_dir, *probes, **fake))


def test_ok(tmp_path: Path) -> None:
    proof = proven(tmp_path, GOOD, GOOD)
    assert proof.ok
    assert proof.reasons == ()
    assert proof.sentence.startswith("proven: sharded by ZeRO-3 from the start, in 4 bit")
    document = proof.to_json()
    json.dumps(document, allow_nan=False)
    assert document["ok"] is True
    assert document["zero3"]["partitioned_fraction"] == 1.0
    assert document["zero3"]["checksum"] == "00ff"
    assert document["quantization"]["bytes_per_parameter"] == 0.66
    assert document["quantization"]["layers_4bit"] == 224
    assert document["quantization"]["layers_16bit"] == LEFT
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    assert document["ranks"][0]["held_share"] == pytest.approx(0.5, abs=1e-5)


def test_the_ranks_are_named(tmp_path: Path) -> None:
    bad = changed(("loaded.held_bytes", 3 * GIB))
    assert proven(tmp_path / "a", GOOD, bad).reasons[0].startswith("rank 1 held 3.0 GiB")
    assert proven(tmp_path / "b", bad, bad).reasons[0].startswith("every rank held 3.0 GiB")
    three = [changed(("world_size", 3), base=probe) for probe in (bad, GOOD, bad)]
    assert proven(tmp_path / "c", *three, world_size=3).reasons[0].startswith("ranks 0 and 2 held 3.0 GiB")
    one = changed(("world_size", 1), ("ready.held_bytes", 3 * GIB))
    assert proven(tmp_path / "d", one, world_size=1).reasons[0].startswith("the one rank held 3.0 GiB")


def test_the_first_reason_is_the_one_to_show(tmp_path: Path) -> None:
    bad = changed(("asked.load_strategy", "stock"), ("loaded.partitioned_fraction", 0.0), ("gradients.num_missing", 2))
    proof = proven(tmp_path, bad, bad)
    assert len(proof.reasons) == 2
    assert proof.sentence == proof.reasons[0]
    assert "ZeRO-3 does not shard a 4-bit model while it loads (model.load_strategy is stock)" in proof.sentence
    assert proof.is_known


def test_a_rank_without_a_probe(tmp_path: Path) -> None:
    assert proven(tmp_path / "ended", GOOD).reasons == ("no probe of rank 1",)
    [reason] = proven(tmp_path / "running", GOOD, state="running").reasons
    assert reason == "not known yet, the run is under way: what rank 1 holds"


def test_ranks_that_do_not_hold_the_same(tmp_path: Path) -> None:
    [reason] = proven(tmp_path, GOOD, changed(("checksum.whole", "03"))).reasons
    assert reason.startswith("what is whole on every rank differs between rank 0 and rank 1")


@pytest.mark.parametrize(
    "state, words",
    [
        ("running", "not known yet, the run is under way: whether the engine shards the weights; whether gathered"),
        ("failed", "not known, since the run failed before: whether the engine shards the weights"),
        ("cancelled", "not known, since the run ended (cancelled) before: "),
    ],
)
def test_a_run_that_was_cut_short(tmp_path: Path, state: str, words: str) -> None:
    early = {name: value for name, value in GOOD.items() if name not in ("ready", "step", "gradients", "ended")}
    proof = proven(tmp_path, early, early, state=state)
    assert not proof.ok
    assert not proof.is_known
    assert proof.reasons[0].startswith(words)
    bad = {**early, "loaded": {**early["loaded"], "partitioned_fraction": 0.0}}
    again = proven(tmp_path / "bad", bad, bad, state=state)
    assert "whole right after loading" in again.reasons[0]
    assert again.reasons[1].startswith(words)
    assert again.is_known


@pytest.mark.parametrize(
    "state, words",
    [
        ("pending", "nothing is known yet: the run has not started"),
        ("running", "nothing is known yet: the run is under way and has not loaded its model"),
        ("failed", "nothing is known: the run failed before its model was loaded"),
        ("lost", "nothing is known: the run ended (lost) before its model was loaded"),
        ("succeeded", "nothing is known: the run has left no probes; an older version made it"),
    ],
)
def test_a_run_without_probes(tmp_path: Path, state: str, words: str) -> None:
    proof = proven(tmp_path, state=state)
    assert (proof.ok, proof.reasons) == (False, (words,))
    json.dumps(proof.to_json(), allow_nan=False)


def test_damaged_probes_and_faults_of_the_probe_are_told(tmp_path: Path) -> None:
    run = write(tmp_path, GOOD, {**GOOD, "problems": ["ended: RuntimeError: x"]})
    run.layout.probe(2).write_text("{", encoding="utf-8")
    run.layout.probe(3).write_text('{"rank": 3, "loaded": {}}', encoding="utf-8")
    reasons = prove(run).reasons
    assert any("rank-00002.json can't be read" in reason for reason in reasons)
    assert any("rank-00003.json can't be read" in reason for reason in reasons)
    assert "rank 1: the probe failed (ended: RuntimeError: x)" in reasons


def test_a_rehearsal_speaks_of_its_rank_alone(tmp_path: Path) -> None:
    probe = changed(("rehearsal", True), ("world_size", 8), ("checksum.model", None))
    del probe["ended"]["checksum"]
    proof = proven(tmp_path, probe, world_size=8)
    assert proof.ok
    assert proof.rehearsal
    assert proof.sentence.endswith("(a rehearsal of one rank: nothing is known of others)")
    assert proof.to_json()["zero3"]["checksum"] is None


def test_a_run_that_does_not_exist_is_bad_input(tmp_path: Path, qz3: Qz3) -> None:
    result = qz3("verify", "nothing", "--runs-dir", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "there is no run 'nothing'" in result.stderr


def test_the_alarm_and_the_summary(tmp_path: Path) -> None:
    bad = changed(("gradients.num_missing", 2))
    run = write(tmp_path, bad, bad)
    assert failures_so_far(run) == [prove(run).sentence]
    assert summarize(run)["proof"] == {"ok": False, "sentence": prove(run).sentence,
                                       "reasons": [prove(run).sentence], "known": True}  # fmt: skip


def test_the_terminal_shows_marks(tmp_path: Path) -> None:
    console = Console(width=200, record=True, force_terminal=False)
    show_proof(proven(tmp_path, GOOD, changed(("loaded.held_bytes", 3 * GIB))), console)
    lines = console.export_text().splitlines()
    assert lines[1].startswith("✕ not ok: rank 1 held 3.0 GiB")
    assert any(line.startswith("  ✕ rank 1 held 3.0 GiB") for line in lines)
    assert any(line.startswith("  ✓ all 448 trainable tensors got a gradient") for line in lines)
    assert lines[-1] == "  rank 1: 3.0 GiB of 5.0 GiB after loading"
