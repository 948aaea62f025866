"""What a rank's probe file holds, and what has to be true of it for the run to be what it was meant to be.

``probes/rank-NNNNN.json`` grows while the run goes on: ``loaded`` comes right after the model was loaded, ``ready``
when the engine stands, ``step`` and ``gradients`` after the first steps, ``ended`` after the last. The rank judges
itself with :func:`judge` at each of these moments, and so does whoever reads the files later. Pure: no disk, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..units import MIB, format_bytes

SCHEMA_VERSION = 1

Outcome = Literal["passed", "failed", "unknown", "skipped"]

WHO = "{who}"
"""Stands in a sentence for the ranks of which it is true."""

BY_CHOICE = {
    "replicated": "not sharded, by choice: every rank keeps a whole copy (model.load_strategy is replicated)",
    "device_map": "not sharded, by choice: one process spreads the layers over its devices (model.load_strategy is "
    "device_map)",
}

# Of what a rank should hold, for what is rounded; and of allocated memory, for what is no weight.
_TOLERANCE = 1.02
_ALLOCATED_SLACK = 1.1
_ALLOCATED_SLACK_BYTES = 64 * MIB
_SMALL_SHARE = 0.01  # of the matrices' weights: routers and the like may stay in 16 bit

WHY_16_BIT = {
    "quantization_off": "quantization is off",
    "embedding": "embedding",
    "head": "output head, left in 16 bit by design",
    "listed": "on the list quantization.llm_int8_skip_modules",
    "fused": "several experts in one 3-D tensor, which bitsandbytes skips without a word",
    "kept": "left out by the loader's own list",
    "not_linear": "no plain linear layer, which is all that bitsandbytes quantizes",
    "unexplained": "plain linear layers that should have been quantized",
}
_BY_DESIGN = ("embedding", "head", "listed")
_STAGES = {
    0: f"zero.zero_stage is 0: nothing is sharded, and {WHO} held the whole model",
    1: f"zero.zero_stage is 1: only the optimizer's state is sharded, and {WHO} held the whole model",
    2: f"zero.zero_stage is 2: gradients and optimizer state are sharded, the weights are not, and {WHO} held the "
    "whole model",
}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one rank, as a sentence; ``{who}`` in it stands for the ranks."""

    check: str
    outcome: Outcome
    sentence: str


def judge(probe: Mapping[str, Any]) -> list[Finding]:
    """Every check on one rank's probe, in the order in which a run can fail them."""
    found: list[Finding] = []
    failed: set[str] = set()
    for name, check in CHECKS.items():
        if failed & set(check.needs):
            finding = Finding(name, "skipped", "")
        elif check.moment not in probe:
            finding = Finding(name, "unknown", check.doubt)
        else:
            finding = Finding(name, *check.ask(probe))
        if finding.outcome == "failed":
            failed.add(name)
        found.append(finding)
    return found


@dataclass(frozen=True)
class Check:
    """One question to a rank's probe."""

    moment: str  # that answers it
    doubt: str  # what is not known before
    needs: tuple[str, ...]  # checks whose failure says it all
    ask: Callable[[Mapping[str, Any]], Verdict]


Verdict = tuple[Outcome, str]


def _stage(probe: Mapping[str, Any]) -> Verdict:
    asked = probe["asked"]
    if asked["load_strategy"] in BY_CHOICE:
        return "passed", BY_CHOICE[asked["load_strategy"]]
    if asked["zero_stage"] != 3:
        return "failed", _STAGES[asked["zero_stage"]]
    return "passed", f"ZeRO-3 over {probe['world_size']} ranks"


def _quantized(probe: Mapping[str, Any]) -> Verdict:
    loaded = probe["loaded"]
    if not probe["asked"]["load_in_4bit"]:
        return "failed", "no weight is in 4 bit: quantization.load_in_4bit is off"
    if not loaded["layers_4bit"]:
        return "failed", "no weight is in 4 bit, though quantization.load_in_4bit is on: the quantization had no effect"
    return "passed", (
        f"{loaded['layers_4bit']} layers are in 4 bit, {loaded['bytes_per_4bit_parameter']:.3f} bytes for each of "
        f"their weights, {loaded['bytes_per_parameter']:.3f} over the whole model"
    )


def _present(probe: Mapping[str, Any]) -> Verdict:
    missing, total = probe["loaded"]["missing_weights"], probe["loaded"]["weights"]
    if missing == 0:
        return "passed", f"all {total:,} weights are loaded"
    if probe["asked"]["load_strategy"] == "device_map":
        return "skipped", ""  # it may leave some on the disk
    return "failed", f"{missing:,} of {total:,} weights were never loaded: they are on the meta device"


def _registered(probe: Mapping[str, Any]) -> Verdict:
    if _by_choice(probe):
        return "skipped", ""
    if not probe["loaded"]["zero3_registered"] and probe["loaded"]["partitioned_fraction"] < 1:
        return "failed", (
            "DeepSpeed was not registered before the model was loaded, so that the loader knew nothing of ZeRO-3, and "
            f"{WHO} loaded the whole model; make TrainingArguments first, and keep them"
        )
    return "passed", "the loader knew of ZeRO-3"


def _partitioned_at_load(probe: Mapping[str, Any]) -> Verdict:
    if _by_choice(probe):
        return "skipped", ""
    loaded = probe["loaded"]
    if loaded["partitioned_fraction"] < 1 and probe["asked"]["load_strategy"] == "stock":
        return "failed", (
            f"{WHO} held the whole model after loading: ZeRO-3 does not shard a 4-bit model while it loads "
            "(model.load_strategy is stock)"
        )
    return _in_parts(probe, loaded, "right after loading")


def _layers(probe: Mapping[str, Any]) -> Verdict:
    loaded = probe["loaded"]
    left = loaded["layers_16bit"]
    bad = [entry for entry in left if entry["why"] not in _BY_DESIGN]
    weights = sum(entry["weights"] for entry in bad)
    plain = any(entry["why"] == "unexplained" for entry in bad)
    if plain or weights > _SMALL_SHARE * loaded["matrix_weights"]:
        names = "; ".join(f"{_names(entry)} ({WHY_16_BIT[entry['why']]})" for entry in bad)
        size = sum(entry["bytes"] for entry in bad)
        return "failed", (
            f"{_percent(weights / loaded['weights'])} of the model's weights stay in 16 bit and should be in 4, "
            f"{format_bytes(size)} of {format_bytes(loaded['bytes'])}: {names}"
        )
    share = sum(entry["weights"] for entry in left) / max(1, loaded["weights"])
    names = "; ".join(f"{_names(entry)} ({WHY_16_BIT[entry['why']]})" for entry in left)
    return "passed", f"every linear layer is in 4 bit; {_percent(share)} of the weights stay in 16 bit: {names}"


def _allocated(probe: Mapping[str, Any]) -> Verdict:
    loaded = probe["loaded"]
    if loaded.get("allocated_bytes") is None or _by_choice(probe):
        return "skipped", ""
    allocated, expected = loaded["allocated_bytes"], loaded["expected_bytes"]
    if loaded.get("offloaded"):
        return "skipped", ""
    if allocated > max(_ALLOCATED_SLACK * expected, expected + _ALLOCATED_SLACK_BYTES):
        return "failed", (
            f"{WHO} had {format_bytes(allocated)} more allocated after loading than before, where the rank's part of "
            f"the model is {format_bytes(expected)}"
        )
    return "passed", f"loading took {format_bytes(allocated)} of memory, the rank's part is {format_bytes(expected)}"


def _partitioned_when_ready(probe: Mapping[str, Any]) -> Verdict:
    if _by_choice(probe):
        return "skipped", ""
    # Norms and other small ones are whole between the steps, by a setting: _persistent says how much, and judges it.
    return _in_parts(probe, probe["ready"], "when the engine was ready", whole=probe["ready"]["persistent_bytes"])


def _statistics(probe: Mapping[str, Any]) -> Verdict:
    asked, found = probe["asked"], probe["ready"]["statistics"]
    if _by_choice(probe) or not probe["ready"]["layers_4bit"]:
        return "skipped", ""
    if found["whole_bytes"] == 0:
        return "passed", f"the quantization statistics are sharded too ({format_bytes(found['sharded_bytes'])} in all)"
    whole = f"{WHO} held {format_bytes(found['whole_bytes'])} of quantization statistics whole"
    if not asked["shard_statistics"]:
        return "passed", f"{whole}, as zero.shard_statistics asks"
    because = "" if asked["release_gathered"] else "; zero.release_gathered is off, and they are sharded only with it"
    return "failed", f"{whole}, and zero.shard_statistics asks to shard them{because}"


def _persistent(probe: Mapping[str, Any]) -> Verdict:
    ready = probe["ready"]
    if _by_choice(probe) or ready.get("beyond_threshold_bytes") is None:
        return "skipped", ""
    if ready["beyond_threshold_bytes"]:
        return "failed", (
            f"{WHO} kept {format_bytes(ready['beyond_threshold_bytes'])} of frozen weights whole between the steps "
            f"that are larger than zero.stage3_param_persistence_threshold ({ready['persistence_threshold']}): "
            f"{', '.join(ready['beyond_threshold'])}"
        )
    return "passed", f"{format_bytes(ready['persistent_bytes'])} of small tensors stay whole between the steps"


def _released(probe: Mapping[str, Any]) -> Verdict:
    step = probe["step"]
    if _by_choice(probe) or step.get("model_bytes") is None:
        return "skipped", ""
    peak = max(step["peaks"], key=lambda each: each["alive_bytes"])
    alive, needed, model = (
        format_bytes(size) for size in (peak["alive_bytes"], peak["needed_bytes"], step["model_bytes"])
    )
    if step["leaked_bytes"] > step["largest_unit_bytes"]:
        because = "" if probe["asked"]["release_gathered"] else " (zero.release_gathered is off)"
        return "failed", (
            f"gathered 4-bit weights are not let go: {WHO} had {alive} of them alive at the peak of a step, of {model} "
            f"in the model, where {needed} had to be{because}"
        )
    # In the first step DeepSpeed learns the order of the modules, and keeps nothing for later use.
    first = format_bytes(step["peaks"][0]["alive_bytes"])
    kept = (
        ""
        if peak["alive_bytes"] <= 2 * step["peaks"][0]["alive_bytes"]
        else (
            f"; later steps have {alive}, which DeepSpeed keeps within zero.stage3_max_live_parameters and "
            "zero.stage3_max_reuse_distance"
        )
    )
    return "passed", f"gathered 4-bit weights are let go: at the peak of a step {first} of {model} were alive{kept}"


def _gradients(probe: Mapping[str, Any]) -> Verdict:
    found = probe["gradients"]
    total = found["tensors"]
    if total == 0:
        return "failed", "nothing is trainable: no tensor asks for a gradient"
    if found["num_missing"]:
        return "failed", (
            f"{found['num_missing']} of {total} trainable tensors got no gradient in the first step, and are not "
            f"trained: {', '.join(found['missing'])}"
        )
    # What a rehearsal gathers is mostly nobody's: zeros there mean nothing.
    if found["num_zero"] and not probe["rehearsal"]:
        return "failed", (
            f"{found['num_zero']} of {total} trainable tensors have a gradient that is exactly zero, and are not "
            f"trained: {', '.join(found['zero'])}"
        )
    rest = "" if found["a_checked"] else "; those of lora_A were zero, since lora_B still was"
    return "passed", f"all {total} trainable tensors got a gradient{rest}"


def _unchanged(probe: Mapping[str, Any]) -> Verdict:
    ended = probe["ended"]
    if ended["changed"]:
        return "failed", f"the frozen weights have changed during the training: {', '.join(ended['changed'])}"
    return "passed", f"the frozen weights are as they were loaded ({ended['tensors']} tensors, by checksum)"


_SHARDED = ("stage", "registered")
CHECKS: dict[str, Check] = {
    "stage": Check("asked", "whether ZeRO-3 is on", (), _stage),
    "quantized": Check("loaded", "whether the weights are in 4 bit", (), _quantized),
    "present": Check("loaded", "whether all weights are there", (), _present),
    "registered": Check("loaded", "whether the loader knows of ZeRO-3", ("stage",), _registered),
    "partitioned_at_load": Check(
        "loaded", "whether weights are sharded while they load", _SHARDED, _partitioned_at_load
    ),
    "layers": Check("loaded", "which layers stay in 16 bit", ("quantized",), _layers),
    "allocated": Check("loaded", "how much memory loading takes", (*_SHARDED, "partitioned_at_load"), _allocated),
    "partitioned_when_ready": Check(
        "ready", "whether the engine shards the weights", ("stage",), _partitioned_when_ready
    ),
    "released": Check("step", "whether gathered weights are let go within a step", ("stage", "quantized"), _released),
    "statistics": Check("ready", "whether quantization statistics are sharded", ("stage", "quantized"), _statistics),
    "persistent": Check("ready", "what stays whole between the steps", ("stage",), _persistent),
    "gradients": Check("gradients", "whether every trainable tensor gets a gradient", (), _gradients),
    "unchanged": Check("ended", "whether the frozen weights stay as they are to the end", (), _unchanged),
}
"""By name, in the order in which reasons are shown."""


def _by_choice(probe: Mapping[str, Any]) -> bool:
    return probe["asked"]["load_strategy"] in BY_CHOICE


def _in_parts(probe: Mapping[str, Any], census: Mapping[str, Any], when: str, *, whole: int = 0) -> Verdict:
    fraction, ranks = census["partitioned_fraction"], probe["world_size"]
    held, expected, total = census["held_bytes"], census["expected_bytes"], census["bytes"]
    if fraction < 1:
        names = ", ".join(census["whole"][:5])
        return "failed", f"{WHO} held {_percent(1 - fraction)} of the frozen weights whole {when}: {names}"
    if held > _TOLERANCE * expected + whole:
        return "failed", (
            f"{WHO} held {format_bytes(held)} of the model {when}, {_percent(held / total)} of it, where its part is "
            f"{format_bytes(expected)}"
        )
    return "passed", (
        f"all frozen weights were partitioned {when}: {WHO} held {_percent(held / total)} of the model's bytes "
        f"(1/{ranks} is {_percent(1 / ranks)})"
    )


def _names(entry: Mapping[str, Any]) -> str:
    more = len(entry["names"]) - 4
    return ", ".join(entry["names"][:4]) + (f" and {more} more" if more > 0 else "")


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 99.95 or percent == 0 else f"{percent:.1f} %"


def spell_out(finding: Finding, ranks: list[int], world_size: int) -> str:
    """A finding's sentence for the ranks of which it is true."""
    who = "every rank" if len(ranks) == world_size else f"rank {ranks[0]}" if len(ranks) == 1 else _several(ranks)
    return finding.sentence.replace(WHO, "the one rank" if world_size == 1 else who)


def failures(findings: list[Finding]) -> Iterator[Finding]:
    """Those that failed."""
    return (finding for finding in findings if finding.outcome == "failed")


def _several(ranks: list[int]) -> str:
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}"
