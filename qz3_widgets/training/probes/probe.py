"""One rank's probe: what it counts, when, and the file that it leaves. It never ends a training.

At each moment the ranks exchange a few numbers, so that rank 0 can say at once, in its log, what is not as it should
be, for all of them.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...config.schema import RunConfig
from ...config.strategy import resolve_load_strategy
from ...runs.files import write_json_atomic
from ...runs.layout import RunLayout
from ...trace.probes import CHECKS, SCHEMA_VERSION, Finding, failures, judge, spell_out
from ..recorder import MemoryRecorder
from ..session import RankIdentity
from .census import Weight, base_weights, explain_16_bit, take_census
from .fingerprint import MODULUS, Print, fingerprints, totals
from .gathered import GatheredWatch
from .gradients import GradientWatch
from .names import compress

FAILED = "PROOF FAILED:"
"""How the line in the log begins that says what is wrong."""

_NUM_WATCHED_STEPS = 2  # the second is the first in which DeepSpeed fetches ahead


class RankProbe:
    """Call its methods in the order in which they stand here; each is a collective call of all ranks."""

    def __init__(self, config: RunConfig, layout: RunLayout, recorder: MemoryRecorder, identity: RankIdentity) -> None:
        """Before the model is loaded, with communication up."""
        self._recorder = recorder
        self.rank, self.world_size = identity.rank, identity.world_size
        # A fake collective leaves what it was given: nothing may be concluded from it about other ranks.
        self._is_rehearsal = identity.rehearsal
        self._talks = self.world_size > 1 and not self._is_rehearsal
        self._path = layout.probe(self.rank)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # of an earlier attempt
        zero, quantization = config.zero, config.quantization
        self.content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "rank": self.rank,
            "world_size": self.world_size,
            "rehearsal": self._is_rehearsal,
            "asked": {
                "load_strategy": resolve_load_strategy(config),
                "zero_stage": zero.zero_stage,
                "load_in_4bit": quantization.load_in_4bit,
                "shard_statistics": zero.shard_statistics,
                "release_gathered": zero.release_gathered,
                "offload_param_device": zero.offload_param_device,
                "skipped_modules": list(quantization.llm_int8_skip_modules or ()),
            },
            "problems": [],
            "failures": [],
            "seconds": {},
        }
        self._before_bytes = recorder.allocated_bytes
        self._names: set[str] = set()
        self._why: dict[str, Any] = {}
        self._prints: dict[str, Print] = {}
        self._gathered: GatheredWatch | None = None
        self._gradients: GradientWatch | None = None
        self._num_steps = 0
        self._said: set[str] = set()

    def loaded(self, model: nn.Module) -> None:
        """Right after the load, before the adapter."""
        with self._moment("loaded"):
            asked = self.content["asked"]
            weights = list(base_weights(model))
            self._names = {weight.name for weight in weights}
            self._why = explain_16_bit(model, quantized=asked["load_in_4bit"], listed=asked["skipped_modules"])
            self.content["loaded"] = {
                # What the adapter makes trainable is not known yet: until then all of the base counts as frozen.
                **take_census(weights, weights, self._why, num_ranks=self.world_size),
                "zero3_registered": bool(is_deepspeed_zero3_enabled()),
                "allocated_bytes": self._recorder.allocated_bytes - self._before_bytes,
                "offloaded": asked["offload_param_device"] != "none",
            }
            self._prints = self._fingerprints(weights)
        self._agree("loaded", *totals(self._prints.values()))

    def settled(self, computed: dict[str, Any]) -> None:
        """What the configuration left to the model's sizes, and what it was computed from; written with the next."""
        self.content["computed"] = computed

    def counted(self, flops: dict[str, int]) -> None:
        """Floating-point operations for a token (:mod:`..flops`); written with the next."""
        self.content["flops"] = flops

    def chosen(self, **what: Any) -> None:
        """What the run chose by itself beside DeepSpeed's settings, by name; written with the next."""
        self.content.setdefault("chosen", {}).update(what)

    def ready(self, model: nn.Module, engine: Any) -> None:
        """When the engine stands, before the first step."""
        watches = [0, 0, 0]
        with self._moment("ready"):
            weights = list(base_weights(model, self._names))
            frozen = [weight for weight in weights if not weight.parameter.requires_grad]
            trainable = [each for each in model.parameters() if each.requires_grad]
            self.content["ready"] = {
                **take_census(weights, frozen, self._why, num_ranks=self.world_size),
                **_persistent(weights, engine),
                "trainable_tensors": len(trainable),
                "trainable_weights": sum(math.prod(getattr(each, "ds_shape", each.shape)) for each in trainable),
                "trainable_partitioned": sum(hasattr(each, "ds_id") for each in trainable),
            }
            gathered = GatheredWatch(engine, weights)
            gradients = GradientWatch(model, self._largest, num_ranks=self.world_size, rank=self.rank)
            self._gathered, self._gradients = gathered, gradients
            watches = [1, len(gradients.names), int(gathered.is_possible)]
            if gathered.is_possible:
                gathered.start()
        if any(entry != watches or not entry[0] for entry in self._agree("ready", *watches)):
            # A rank without a watch can't take part in what the others do at the end of a step.
            self._drop_watches()

    def step_ended(self) -> None:
        """After an optimizer step; free from the moment when nothing is left to ask."""
        if self._gathered is None and self._gradients is None:
            return
        self._num_steps += 1
        with self._moment("gathered"):
            self._look_at_gathered()
        with self._moment("gradients"):
            if self._gradients is not None:
                self.content["gradients"] = self._gradients.end_step()
                if self._gradients.is_done:
                    self.content["seconds"]["gradient_hooks"] = round(self._gradients.seconds, 4)
                    self._gradients = None
        self._agree("step")

    def ended(self, model: nn.Module) -> None:
        """After the last step."""
        parts_before = wholes_before = parts = wholes = 0
        with self._moment("ended"):
            frozen = [each for each in base_weights(model, self._names) if not each.parameter.requires_grad]
            now = self._fingerprints(frozen)
            # What the engine has cast to another type is another tensor, not a changed one.
            same = [name for name in now if name in self._prints and now[name].dtype == self._prints[name].dtype]
            parts_before, wholes_before = totals(self._prints[name] for name in same)
            parts, wholes = totals(now[name] for name in same)
            kept = [name for name in same if now[name].whole == self._prints[name].whole]
            changed = [name for name in kept if now[name].value != self._prints[name].value]
            self.content["ended"] = {"tensors": len(same), "changed": compress(changed)[:20]}
        self._drop_watches()
        numbers = self._agree("ended", parts_before, wholes_before, parts, wholes, judging=False)
        if "ended" in self.content and not self._is_rehearsal:
            # A tensor that was whole at first and partitioned since has no counterpart on one rank: only the sum has.
            before = (sum(entry[0] for entry in numbers) + numbers[0][1]) % MODULUS
            after = (sum(entry[2] for entry in numbers) + numbers[0][3]) % MODULUS
            self.content["ended"] |= {"checksum_before": f"{before:016x}", "checksum": f"{after:016x}"}
            if before != after and not self.content["ended"]["changed"]:
                self.content["ended"]["changed"] = ["the sum over all ranks"]
        self._agree("ended")

    def _look_at_gathered(self) -> None:
        watch = self._gathered
        if watch is None:
            return
        self.content["step"] = watch.report() if watch.is_possible else {}
        watch.begin_step()
        if self._num_steps >= _NUM_WATCHED_STEPS or not watch.is_possible:
            watch.stop()
            self.content["seconds"]["gathered_hooks"] = round(watch.seconds, 4)
            self._gathered = None

    def _drop_watches(self) -> None:
        if self._gathered is not None:
            self._gathered.stop()
        if self._gradients is not None:
            self._gradients.remove()
        self._gathered = self._gradients = None

    def _fingerprints(self, weights: list[Weight]) -> dict[str, Print]:
        return fingerprints(weights, num_ranks=self.world_size, rank=self.rank)

    @contextmanager
    def _moment(self, name: str) -> Iterator[None]:
        """What goes wrong in a probe is on record, and the training goes on."""
        begin = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the probe's fault and not the run's
            self.content["problems"].append(f"{name}: {type(error).__name__}: {error}")
            print(f"the probe failed ({name}); the training goes on\n{traceback.format_exc()}", file=sys.stderr)
        seconds = self.content["seconds"]
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - begin, 4)

    def _agree(self, moment: str, *numbers: int, judging: bool = True) -> list[list[int]]:
        """Exchange the failed checks and ``numbers`` (below 2**64), write the file, and say what is new."""
        findings: list[Finding] = []
        if judging:
            with self._moment("judging"):
                findings = judge(self.content)
        own = {finding.check: finding for finding in failures(findings)}
        mask = sum(1 << place for place, check in enumerate(CHECKS) if check in own)
        gathered = self._all_gather([mask, *numbers])
        if moment == "loaded":
            whole = {entry[2] for entry in gathered}
            total = (sum(entry[1] for entry in gathered) + gathered[0][2]) % MODULUS
            self.content["checksum"] = {
                "model": None if self._is_rehearsal else f"{total:016x}",
                "parts": f"{numbers[0]:016x}",
                "whole": f"{numbers[1]:016x}",
                "whole_agrees": len(whole) == 1,
            }
        if judging:
            self.content["failures"] = [
                {"check": finding.check, "sentence": spell_out(finding, [self.rank], self.world_size)}
                for finding in own.values()
            ]
            self._write()
            self._say(own, [entry[0] for entry in gathered])
        return [entry[1:] for entry in gathered]

    def _say(self, own: dict[str, Finding], masks: list[int]) -> None:
        if self.rank != 0 and not self._is_rehearsal:
            return
        for place, check in enumerate(CHECKS):
            ranks = [rank for rank, mask in enumerate(masks) if mask >> place & 1]
            if not ranks or check in self._said:
                continue
            self._said.add(check)
            if check in own:
                sentence = spell_out(own[check], ranks if self._talks else [self.rank], self.world_size)
            else:
                file = f"{self._path.parent.name}/rank-{ranks[0]:05d}.json"
                sentence = f"{CHECKS[check].doubt}: not as it should be on rank {ranks[0]}, see {file}"
            print(f"{FAILED} {sentence}", flush=True)

    def _write(self) -> None:
        try:
            write_json_atomic(self._path, self.content)
        except OSError as error:  # a full disk must not end the training
            print(f"the probe can't be written: {error}", file=sys.stderr)

    def _all_gather(self, numbers: list[int]) -> list[list[int]]:
        if not self._talks:
            return [numbers]
        signed = [number - MODULUS if number >= MODULUS // 2 else number for number in numbers]
        own = torch.tensor(signed, dtype=torch.int64, device=_communication_device())
        everything = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everything, own)
        return [[int(value) % MODULUS for value in entry.tolist()] for entry in everything]

    def _largest(self, values: list[float]) -> list[float]:
        if not self._talks:
            return values
        tensor = torch.tensor(values, device=_communication_device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]


def _communication_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def _persistent(weights: list[Weight], engine: Any) -> dict[str, Any]:
    """Frozen weights above the engine's threshold that DeepSpeed keeps whole all the same."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    threshold = getattr(offload, "param_numel_persistence_threshold", None)
    if threshold is None:
        return {"persistence_threshold": None, "beyond_threshold_bytes": None}
    beyond = [
        weight
        for weight in weights
        if getattr(weight.parameter, "ds_persist", False) and weight.parameter.ds_numel > threshold
    ]
    return {
        "persistence_threshold": int(threshold),
        "beyond_threshold_bytes": sum(weight.whole_bytes for weight in beyond),
        "beyond_threshold": compress(weight.name for weight in beyond)[:5],
    }
