"""Is the run what it was meant to be? Sharded by ZeRO-3, in 4 bit, and learning: what the ranks' probes prove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runs.files import read_json_object
from ..runs.store import Run
from ..trace.probes import BY_CHOICE, CHECKS, Finding, Outcome, judge, spell_out
from .names import config_of

_RANK_FIGURES = ("held_bytes", "expected_bytes", "bytes_by_dtype", "bytes_by_device", "partitioned_fraction")


@dataclass(frozen=True)
class CheckResult:
    """One check over all ranks."""

    name: str
    outcome: Outcome
    sentence: str
    ranks: tuple[int, ...] = ()  # of which the sentence is true


@dataclass(frozen=True)
class Proof:
    """What is proven of a run, and what is not."""

    run_id: str
    ok: bool
    reasons: tuple[str, ...]
    """Why not, the first thing first; empty if it is all right."""
    checks: tuple[CheckResult, ...]
    probes: Mapping[int, Mapping[str, Any]] = field(repr=False)
    world_size: int
    rehearsal: bool

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if not self.ok:
            return self.reasons[0]
        by_choice = next((each.sentence for each in self.checks if each.sentence in BY_CHOICE.values()), None)
        what = f"in 4 bit, {by_choice}" if by_choice else "sharded by ZeRO-3 from the start, in 4 bit"
        alone = " (a rehearsal of one rank: nothing is known of others)" if self.rehearsal else ""
        return f"proven: {what}, and every adapter tensor is trained{alone}"

    def verdict(self) -> dict[str, Any]:
        """The short form, for a run's summary."""
        return {"ok": self.ok, "sentence": self.sentence, "reasons": list(self.reasons), "known": self.is_known}

    @property
    def computed_settings(self) -> dict[str, Any] | None:
        """ZeRO-3's settings that were ``auto``, and what they were computed from; as the lowest rank tells."""
        first: Mapping[str, Any] = self.probes[min(self.probes)] if self.probes else {}
        computed = first.get("computed")
        return dict(computed) if isinstance(computed, dict) else None

    @property
    def flops_per_token(self) -> int | None:
        """Floating-point operations of training for one token; as the lowest rank has counted them."""
        first: Mapping[str, Any] = self.probes[min(self.probes)] if self.probes else {}
        flops = first.get("flops")
        return int(flops["per_token"]) if isinstance(flops, dict) and "per_token" in flops else None

    @property
    def chosen(self) -> dict[str, Any]:
        """What the run chose by itself beside DeepSpeed's settings; as the lowest rank tells."""
        first: Mapping[str, Any] = self.probes[min(self.probes)] if self.probes else {}
        return dict(first.get("chosen") or {})

    @property
    def is_known(self) -> bool:
        """Whether it is decided: it is proven, or something has failed. Otherwise something is not known (yet)."""
        return self.ok or any(check.outcome == "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What ``qz3 verify --json`` prints. What all ranks have in common is told by the lowest one."""
        first: Mapping[str, Any] = self.probes[min(self.probes)] if self.probes else {}
        asked, loaded, ready = first.get("asked", {}), first.get("loaded", {}), first.get("ready", {})
        return {
            "run_id": self.run_id,
            "ok": self.ok,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "checks": [
                {"name": each.name, "outcome": each.outcome, "sentence": each.sentence, "ranks": list(each.ranks)}
                for each in self.checks
            ],
            "rehearsal": self.rehearsal,
            "zero3": {
                "partitioned_fraction": self._least("loaded", "partitioned_fraction"),
                "partitioned_fraction_when_ready": self._least("ready", "partitioned_fraction"),
                "by_choice": asked.get("load_strategy") in BY_CHOICE,
                "zero_stage": asked.get("zero_stage"),
                "load_strategy": asked.get("load_strategy"),
                "registered_before_load": loaded.get("zero3_registered"),
                "world_size": self.world_size,
                "model_bytes": loaded.get("bytes"),
                "persistent_bytes": ready.get("persistent_bytes"),
                "step": first.get("step") or None,
                "checksum": (first.get("ended") or first.get("checksum") or {}).get("checksum")
                or first.get("checksum", {}).get("model"),
            },
            "quantization": {
                "bytes_per_parameter": loaded.get("bytes_per_parameter"),
                "bytes_per_4bit_parameter": loaded.get("bytes_per_4bit_parameter"),
                "layers_4bit": loaded.get("layers_4bit"),
                "layers_16bit": loaded.get("layers_16bit", []),
                "weights": loaded.get("weights"),
                "weights_4bit": loaded.get("weights_4bit"),
                "statistics": ready.get("statistics") or loaded.get("statistics"),
            },
            "gradients": first.get("gradients"),
            "ranks": [self._rank(rank) for rank in sorted(self.probes)],
        }

    def _least(self, moment: str, name: str) -> Any:
        found = [probe[moment][name] for probe in self.probes.values() if moment in probe]
        return min(found, default=None)

    def _rank(self, rank: int) -> dict[str, Any]:
        probe = self.probes[rank]
        loaded = probe.get("loaded", {})
        return {
            "rank": rank,
            **{name: loaded.get(name) for name in _RANK_FIGURES},
            "held_share": None if not loaded else loaded["held_bytes"] / max(1, loaded["bytes"]),
            "allocated_bytes": loaded.get("allocated_bytes"),
            "held_bytes_when_ready": probe.get("ready", {}).get("held_bytes"),
            "checksum": probe.get("checksum"),
            "failures": probe.get("failures", []),
            "problems": probe.get("problems", []),
            "probe_seconds": probe.get("seconds", {}),
        }


def prove(run: Run) -> Proof:
    """Read the probes of ``run`` and decide. While it is under way, what is not known yet keeps it from being ok."""
    probes, damage = _read(run)
    any_probe: Mapping[str, Any] = next(iter(probes.values()), {})
    world_size = int(any_probe.get("world_size") or _expected_ranks(run))
    rehearsal = bool(any_probe.get("rehearsal"))
    findings = {rank: {finding.check: finding for finding in judge(probe)} for rank, probe in probes.items()}
    checks = [_over_ranks(name, findings, world_size) for name in CHECKS] if probes else []
    if probes and not rehearsal:
        checks.append(_all_reported(probes, world_size, run))
        checks.append(_consistent(probes))
    reasons = [check.sentence for check in checks if check.outcome == "failed"]
    reasons += damage
    reasons += [
        f"rank {rank}: the probe failed ({text})" for rank, p in probes.items() for text in p.get("problems", [])
    ]
    reasons += _not_known(run, checks, nothing=not probes)
    return Proof(
        run_id=run.run_id,
        ok=not reasons,
        reasons=tuple(reasons),
        checks=tuple(checks),
        probes=probes,
        world_size=world_size,
        rehearsal=rehearsal,
    )


def failures_so_far(run: Run) -> list[str]:
    """What has failed up to now, for a view on a run under way; empty while all is well or nothing is known."""
    return [check.sentence for check in prove(run).checks if check.outcome == "failed" and check.name != "ranks"]


def _read(run: Run) -> tuple[dict[int, Mapping[str, Any]], list[str]]:
    probes: dict[int, Mapping[str, Any]] = {}
    damage = []
    for path in sorted(run.layout.probes_dir.glob("rank-*.json")):
        try:
            content = read_json_object(path)
            judge(content)
            probes[int(content["rank"])] = content
        except (ValueError, KeyError, TypeError) as error:
            damage.append(f"{path} can't be read: {type(error).__name__}: {error}")
    return probes, damage


def _expected_ranks(run: Run) -> int:
    config = config_of(run)
    return 1 if config is None else config.launch.num_processes


def _over_ranks(name: str, findings: Mapping[int, Mapping[str, Finding]], world_size: int) -> CheckResult:
    """The worst outcome of all ranks, with the sentence of the lowest of the ranks that have it."""
    worst: Sequence[Outcome] = ("failed", "unknown", "passed", "skipped")
    outcome = next(each for each in worst if any(found[name].outcome == each for found in findings.values()))
    ranks = sorted(rank for rank, found in findings.items() if found[name].outcome == outcome)
    return CheckResult(name, outcome, spell_out(findings[ranks[0]][name], ranks, world_size), tuple(ranks))


def _all_reported(probes: Mapping[int, Mapping[str, Any]], world_size: int, run: Run) -> CheckResult:
    missing = [rank for rank in range(world_size) if rank not in probes]
    if not missing:
        return CheckResult("ranks", "passed", f"all {world_size} ranks have reported", tuple(probes))
    names = ", ".join(map(str, missing))
    outcome: Outcome = "failed" if run.status.has_ended else "unknown"
    sentence = f"no probe of rank {names}" if outcome == "failed" else f"what rank {names} holds"
    return CheckResult("ranks", outcome, sentence, tuple(missing))


def _consistent(probes: Mapping[int, Mapping[str, Any]]) -> CheckResult:
    """What ranks hold whole is the same on all of them, and they agree on the sum of the rest."""
    sums = {rank: probe["checksum"] for rank, probe in probes.items() if "checksum" in probe}
    if len(sums) < len(probes):
        return CheckResult("checksum", "unknown", "whether the ranks hold the same model")
    first = sums[min(sums)]
    other = tuple(rank for rank, each in sorted(sums.items()) if each["whole"] != first["whole"])
    if other:
        names = ", ".join(map(str, other))
        sentence = (
            f"what is whole on every rank differs between rank {min(sums)} and rank {names}: the ranks do not hold "
        )
        return CheckResult("checksum", "failed", f"{sentence}the same model", other)
    return CheckResult("checksum", "passed", f"the ranks hold the same model (checksum {first['model']})", tuple(sums))


def _not_known(run: Run, checks: Sequence[CheckResult], *, nothing: bool) -> list[str]:
    unknown = "; ".join(check.sentence for check in checks if check.outcome == "unknown")
    if not unknown and not nothing:
        return []
    state = run.state
    if state == "pending":
        return ["nothing is known yet: the run has not started"]
    if state == "running":
        if nothing:
            return ["nothing is known yet: the run is under way and has not loaded its model"]
        return [f"not known yet, the run is under way: {unknown}"]
    how = {"failed": "failed", "succeeded": "succeeded"}.get(state, f"ended ({state})")
    if not nothing:
        return [f"not known, since the run {how} before: {unknown}"]
    if state == "succeeded":
        return ["nothing is known: the run has left no probes; an older version made it"]
    return [f"nothing is known: the run {how} before its model was loaded"]
