from __future__ import annotations

import json
from pathlib import Path

import pytest

from qz3_widgets.analysis.badges import Badge, badges, probe_state
from qz3_widgets.analysis.proof import CheckResult, Proof
from qz3_widgets.runs.store import Run
from tests.fake_runs import make_run

ALL = (
    "stage",
    "registered",
    "partitioned_at_load",
    "partitioned_when_ready",
    "quantized",
    "layers",
    "present",
    "released",
    "statistics",
    "persistent",
    "gradients",
    "unchanged",
)


def proof(**outcomes: str) -> Proof:
    checks = tuple(
        CheckResult(name, outcomes.get(name, "passed"), f"the {name.replace('_', ' ')} of it")  # type: ignore[arg-type]
        for name in ALL
    )
    return Proof("a-1", ok=False, reasons=(), checks=checks, probes={}, world_size=2, rehearsal=False)


def test_what_is_proven_has_four_badges_with_their_reasons() -> None:
    found = badges(proof())
    assert [(badge.title, badge.level) for badge in found] == [
        ("ZeRO-3 is on", "ok"),
        ("4-bit is on", "ok"),
        ("Layers are let go", "ok"),
        ("LoRA learns", "ok"),
    ]
    assert found[0].reason == "The partitioned at load of it."


@pytest.mark.parametrize(
    "check, place, title",
    [
        ("partitioned_at_load", 0, "ZeRO-3 does not shard"),
        ("quantized", 1, "4-bit is not on"),
        ("released", 2, "Layers are not let go"),
        ("gradients", 3, "LoRA does not learn"),
    ],
)
def test_what_fails_says_why(check: str, place: int, title: str) -> None:
    badge = badges(proof(**{check: "failed"}))[place]
    assert badge == Badge(title, "error", f"The {check.replace('_', ' ')} of it.")


def test_what_is_still_to_be_seen_says_so() -> None:
    found = badges(proof(partitioned_at_load="unknown", released="unknown", unchanged="unknown"))
    assert found[0] == Badge("ZeRO-3: not known yet", "info", "To be seen: the partitioned at load of it.")
    assert found[2].level == "info"
    assert found[3].level == "ok"  # that weights stay as they are is known at the end only


def test_what_does_not_apply_is_no_failure() -> None:
    skipped = dict.fromkeys(("released", "statistics", "persistent"), "skipped")
    badge = badges(proof(**skipped))[2]
    assert (badge.title, badge.level) == ("Release: does not apply", "info")


def test_what_was_not_seen_to_the_end_stays_unknown(runs_dir: Path) -> None:
    assert badges(proof(released="unknown"), ended=True)[2] == Badge(
        "Release: not known", "info", "Never seen: the released of it."
    )
    run = Run(make_run(runs_dir, run_id="a-1", state="failed"))
    assert {badge.reason for badge in badges(run, ended=True)} == {"It ended before a rank had told."}


def test_a_run_without_probes_has_nothing_to_tell_yet(runs_dir: Path) -> None:
    run = Run(make_run(runs_dir, run_id="a-1"))
    assert {badge.level for badge in badges(run)} == {"info"}
    before = probe_state(run)
    run.layout.probe(0).write_text(json.dumps({"rank": 0}))
    assert probe_state(run) != before
