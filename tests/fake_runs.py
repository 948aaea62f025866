"""Run directories made up for tests: real files in the real formats, with curves as runs have them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from qz3_widgets.config.schema import RunConfig
from qz3_widgets.runs.layout import RunLayout

GIB, MIB = 2**30, 2**20
EPOCH = 1_790_000_000.0  # an arbitrary start, so that what is made is the same every time


@dataclass(frozen=True)
class Shape:
    """How much each phase of one rank holds (bytes) and how long it takes (seconds)."""

    capacity: int
    loaded: int
    load_peak: int
    ready: int
    step_peak: int
    start_seconds: float = 6.0
    load_seconds: float = 5.0
    attach_seconds: float = 0.6
    data_seconds: float = 1.6
    engine_seconds: float = 2.0
    step_seconds: float = 2.2
    eval_seconds: float = 3.0
    save_seconds: float = 0.8
    device: str = "cpu"
    device_name: str = "CPU, 2 cores"
    source: str = "cpu-counting"


CPU_135M = Shape(round(23.4 * GIB), round(104.7 * MIB), round(161 * MIB), round(61.5 * MIB), round(318 * MIB))
"""SmolLM2-135M in 4-bit, two ranks on a CPU."""
CPU_135M_SHORT = Shape(round(23.4 * GIB), round(104.7 * MIB), round(161 * MIB), round(61.5 * MIB), round(204 * MIB))
GPU_70B = Shape(
    80 * GIB - 600 * MIB, round(36.8 * GIB), round(37.2 * GIB), round(5.9 * GIB), round(39.96 * GIB),
    start_seconds=14, load_seconds=170, attach_seconds=4, data_seconds=9, engine_seconds=21, step_seconds=4.0,
    eval_seconds=30, save_seconds=5, device="cuda", device_name="NVIDIA H100 80GB HBM3", source="cuda",
)  # fmt: skip
GPU_70B_SHARDED = Shape(
    80 * GIB - 600 * MIB, round(5.5 * GIB), round(7.4 * GIB), round(5.9 * GIB), round(10.8 * GIB),
    start_seconds=14, load_seconds=95, attach_seconds=4, data_seconds=9, engine_seconds=12, step_seconds=3.4,
    eval_seconds=25, save_seconds=5, device="cuda", device_name="NVIDIA H100 80GB HBM3", source="cuda",
)  # fmt: skip


@dataclass
class Fake:
    """What to make. ``end`` says how it went: it ends well, dies at a step or in a phase, or is still at work."""

    run_id: str = "demo-r8-20260917-121314"
    world_size: int = 2
    shape: Shape = CPU_135M
    num_steps: int = 12
    max_steps: int | None = None
    eval_steps: int | None = 6
    eval_on_start: bool = True
    state: str = "succeeded"
    failed_rank: int = 1
    fail_phase: str = "step"
    error: str | None = None
    missing_ranks: Sequence[int] = ()
    torn: Mapping[int, int] = field(default_factory=dict)  # rank to lines to tear
    attempts: int = 1
    loss: tuple[float, float] = (5.5, 2.1)
    nan_at: int | None = None
    sample_seconds: float = 0.2
    seed: int = 0
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name: str | None = None
    spread: float = 0.004  # how much fuller rank 0 is than the last


def make_run(runs_dir: Path, fake: Fake | None = None, /, **changes: Any) -> Path:
    """Write a run directory below ``runs_dir`` and return it. ``changes`` replace fields of ``fake``."""
    fake = Fake(**{**vars(fake or Fake()), **changes})
    layout = RunLayout(runs_dir / fake.run_id)
    layout.make_folders()
    config = fake_config(fake)
    given = {section: dict(values) for section, values in fake.config.items()}
    document = {"preset": "demo", "given": given, "resolved": config.model_dump(mode="json")}
    layout.run_yaml.write_text(yaml.safe_dump(document, sort_keys=False))
    write_json(layout.plan_json, {"world_size": fake.world_size})
    manifest = {
        "argv": ["accelerate", "launch", "--config_file", "accelerate.yaml", "train_qlora.py"],
        "created": iso(EPOCH),
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "branch": "main", "dirty": False},
        "python": "3.11.2",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "host": "box",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8", "bitsandbytes": "0.50.2"},
    }
    write_json(layout.manifest_json, manifest)
    origin = EPOCH + 3.0
    seconds = 0.0
    for attempt in range(fake.attempts):
        last = attempt == fake.attempts - 1
        seconds = max(
            [write_rank(layout, fake, rank, origin, last) for rank in range(fake.world_size)
             if rank not in fake.missing_ranks],
            default=0.0,
        )  # fmt: skip
        if attempt == 0 or last:
            write_metrics(layout, fake, origin, resumed=attempt > 0)
        if not last:
            origin += seconds + 3600.0
    write_logs(layout, fake)
    write_json(layout.status_json, fake_status(fake, origin, origin + seconds))
    return layout.root


def fake_config(fake: Fake) -> RunConfig:
    """The configuration of a fake run."""
    values: dict[str, Any] = {
        "name": fake.name or fake.run_id.rsplit("-", 2)[0],
        "model": {"name_or_path": "SmolLM2-135M-Instruct"},
        "training": {"max_steps": fake.max_steps or fake.num_steps, "eval_steps": fake.eval_steps},
        "launch": {"num_processes": fake.world_size},
    }
    for section, fields in fake.config.items():
        values[section] = {**values.get(section, {}), **fields}
    return RunConfig.model_validate(values)


def fake_status(fake: Fake, origin: float, ended: float) -> dict[str, Any]:
    """The content of ``status.json``."""
    over = fake.state not in ("pending", "running")
    status: dict[str, Any] = {
        "schema_version": 1,
        "run_id": fake.run_id,
        "state": fake.state,
        "created": iso(EPOCH),
        "launched_by": "supervisor",
        "attempt": fake.attempts,
        "num_ranks": fake.world_size,
        "host": "another-box",  # so that nobody looks for its processes here
        "started": iso(origin - 2.6) if fake.state != "pending" else None,
        "ended": iso(ended) if over else None,
        "exit_code": {"succeeded": 0, "failed": 1, "cancelled": -15}.get(fake.state),
    }
    if fake.state == "failed":
        status |= {
            "failed_rank": fake.failed_rank,
            "failed_at": iso(ended),
            "error": fake.error or "killed by SIGKILL",
            "signal": None if fake.error else "SIGKILL",
        }
    return status


def write_rank(layout: RunLayout, fake: Fake, rank: int, origin: float, last: bool) -> float:
    """Append one attempt of one rank to its trace; returns how long it took."""
    noise = random.Random(fake.seed * 1000 + rank)
    shape = fake.shape
    late = 0.05 * rank  # ranks don't start at the same moment
    share = 1.0 + fake.spread * (1 - rank / max(1, fake.world_size - 1))
    header = {
        "schema_version": 1, "clock_origin": origin + late, "rank": rank, "local_rank": rank,
        "world_size": fake.world_size, "host": "box", "pid": 1000 + rank, "pid_created": origin,
        "device": "cpu" if shape.device == "cpu" else f"cuda:{rank}", "device_name": shape.device_name,
        "capacity_bytes": shape.capacity, "source": shape.source, "rehearsal": False, "kind": "header",
    }  # fmt: skip
    lines = [json.dumps(header, separators=(",", ":"))]
    time, moment, before = 0.0, 0.0, 0.0
    for phase, step, event, seconds, level, peak in _profile(fake, last):
        time += seconds
        moment = max(moment, time + noise.gauss(0, 0.004))
        size = int(level * share * (1 + noise.gauss(0, 0.0008))) if level else 0
        top = max(int(peak * share), size, int(before))
        record = {
            "time_seconds": round(moment, 6), "kind": "memory", "phase": phase,
            "step": step, "event": event, "allocated_bytes": size,
            "reserved_bytes": size if shape.device == "cpu" else int(top * 1.06), "peak_allocated_bytes": top,
            "device_used_bytes": int(top * 1.06) + (2 * GIB if shape.device == "cuda" else 0),
            "host_rss_bytes": int(0.9 * GIB + top * 0.5), "host_used_bytes": int(4 * GIB + 0.2 * time * MIB),
        }  # fmt: skip
        before = size
        lines.append(json.dumps(record, separators=(",", ":")))
    phase, step = record["phase"], record["step"]
    end = {"time_seconds": round(moment, 6), "kind": "end", "phase": phase, "step": step, "outcome": "succeeded"}
    if fake.state == "succeeded" and last:
        lines.append(json.dumps({**end, "error": None}))
    elif fake.state == "failed" and last and fake.error and rank == fake.failed_rank:
        lines.append(json.dumps({**end, "outcome": "failed", "error": fake.error}))
    elif fake.state == "failed" and last and rank != fake.failed_rank:
        lines.append(json.dumps({**end, "outcome": "cancelled", "error": "ended by SIGTERM"}))
    for i in range(fake.torn.get(rank, 0)):
        at = (i + 1) * len(lines) // (fake.torn[rank] + 1)
        lines[at] = lines[at][: len(lines[at]) // 2]
    with open(layout.memory_trace(rank), "a") as file:
        file.write("\n".join(lines) + "\n")
    return time


def _profile(fake: Fake, last: bool) -> list[tuple[str, int, str, float, float, float]]:
    """(phase, step, event, seconds since the record before, allocated, peak) of one rank."""
    shape, found = fake.shape, []

    def stretch(phase: str, step: int, seconds: float, levels: Sequence[float], peak: float = 0.0) -> None:
        found.append((phase, step, "phase_begin", 0.001, levels[0], 0.0))
        count = max(1, int(seconds / fake.sample_seconds))
        for i in range(count):
            place = (i + 1) / count * (len(levels) - 1)
            low = min(int(place), len(levels) - 2)
            level = levels[low] + (levels[low + 1] - levels[low]) * (place - low)
            found.append((phase, step, "sample", seconds / count, level, peak if i == count // 2 else level))
        found.append((phase, step, "phase_end", 0.001, levels[-1], 0.0))

    stretch("start", 0, shape.start_seconds, [0, 0.001 * shape.loaded])
    stretch("data", 0, shape.data_seconds, [0.001 * shape.loaded] * 2)
    stretch("load", 0, shape.load_seconds, [0.001 * shape.loaded, 0.6 * shape.loaded, shape.loaded], shape.load_peak)
    if _dies(fake, last, "load", 0):
        return found[: -int(len(found) * 0.3)]
    lora = 0.02 * shape.ready
    stretch("attach", 0, shape.attach_seconds, [shape.loaded, shape.loaded + lora])
    stretch("engine", 0, shape.engine_seconds, [shape.loaded + lora, shape.ready], 1.1 * shape.loaded)
    ready = shape.ready
    if fake.eval_on_start and fake.eval_steps:
        stretch("eval", 0, shape.eval_seconds, [ready, 1.3 * ready, ready], 0.6 * shape.step_peak)
    num_steps = fake.num_steps if last else fake.num_steps // 2
    found.append(("step", 1, "phase_begin", 0.001, ready, 0.0))
    for step in range(1, num_steps + 1):
        seconds = shape.step_seconds * (2.5 if step == 1 else 1.0)
        events = [("step_begin", 0.01, 0.0), ("sample", 0.2, 0.4), ("forward_end", 0.2, 0.8), ("sample", 0.3, 0.6)]
        for event, part, level in [*events, ("backward_end", 0.2, 0.1), ("step_end", 0.09, 0.02)]:
            size = ready + level * (shape.step_peak - ready) * (0.9 if level else 0)
            found.append(("step", step, event, seconds * part, size, shape.step_peak if event == "backward_end" else 0))
            if event == "sample" and level == 0.6 and _dies(fake, last, "step", step, num_steps):
                return found
        if fake.eval_steps and step % fake.eval_steps == 0 and step < num_steps + 1:
            found.append(("step", step, "phase_end", 0.001, ready, 0.0))
            stretch("eval", step, shape.eval_seconds, [ready, 1.3 * ready, ready], 0.6 * shape.step_peak)
            found.append(("step", step, "phase_begin", 0.001, ready, 0.0))
    if fake.state == "running" or not last:
        return found
    found.append(("step", num_steps, "phase_end", 0.001, ready, 0.0))
    stretch("save", num_steps, shape.save_seconds, [ready, 1.1 * ready, ready])
    found.append(("save", num_steps, "end", 0.01, ready, 0.0))
    return found


def _dies(fake: Fake, last: bool, phase: str, step: int, num_steps: int = 0) -> bool:
    return last and fake.state in ("failed", "lost") and fake.fail_phase == phase and step == num_steps


def write_metrics(layout: RunLayout, fake: Fake, origin: float, *, resumed: bool) -> None:
    """Append the metrics of one attempt; a resumed one goes on a little before the place where the first ended."""
    noise = random.Random(fake.seed + 7)
    if fake.fail_phase == "load" and fake.state in ("failed", "lost"):
        return
    total = fake.max_steps or fake.num_steps
    lines: list[dict[str, Any]] = [{"schema_version": 1, "clock_origin": origin, "kind": "header"}]
    first = fake.num_steps // 2 - 1 if resumed else 1
    num_steps = fake.num_steps if resumed or fake.attempts == 1 else fake.num_steps // 2
    if fake.state == "failed":
        num_steps -= 1

    def loss_at(step: float) -> float:
        high, low = fake.loss
        return low + (high - low) * math.exp(-4 * step / total)

    shape = fake.shape
    begin = shape.start_seconds + shape.load_seconds + shape.attach_seconds + shape.data_seconds + shape.engine_seconds
    time = begin
    if fake.eval_on_start and fake.eval_steps and not resumed:
        time += shape.eval_seconds
        lines.append(_eval(time, 0, loss_at(0) + 0.05, shape.eval_seconds))
    for step in range(first, num_steps + 1):
        seconds = shape.step_seconds * (2.5 if step == first else 1.0) * (1 + noise.gauss(0, 0.02))
        time += seconds
        tokens = 1024 * fake.world_size
        loss: float | None = loss_at(step) * (1 + noise.gauss(0, 0.03))
        if fake.nan_at is not None and step >= fake.nan_at:
            loss = None
        lines.append(
            {
                "time_seconds": round(time, 6), "kind": "metrics", "event": "step", "step": step,
                "epoch": step / total, "max_steps": total, "loss": loss,
                "learning_rate": 1e-3 * (1 - step / total), "grad_norm": abs(noise.gauss(0.8, 0.1)),
                "num_tokens": step * tokens, "step_seconds": seconds, "tokens_per_second": tokens / seconds,
            }
        )  # fmt: skip
        if fake.eval_steps and step % fake.eval_steps == 0:
            time += shape.eval_seconds
            lines.append(_eval(time, step, loss_at(step) + 0.08, shape.eval_seconds))
    with open(layout.metrics, "a") as file:
        file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def _eval(time: float, step: int, loss: float, seconds: float) -> dict[str, Any]:
    return {"time_seconds": time, "kind": "metrics", "event": "eval", "step": step, "eval_loss": loss,
            "eval_seconds": seconds}  # fmt: skip


def write_logs(layout: RunLayout, fake: Fake) -> None:
    """The launcher's log and the ranks' own; a failed rank's ends in a traceback."""
    lines = [f"[rank 0] step {step} of {fake.num_steps}" for step in range(1, fake.num_steps + 1)]
    layout.launcher_log.write_text("\n".join(["starting <accelerate>", *lines]) + "\n")
    for rank in range(fake.world_size):
        text = "loading SmolLM2-135M-Instruct\n"
        if fake.state == "failed" and rank == fake.failed_rank and fake.error:
            text += f'Traceback (most recent call last):\n  File "train_qlora.py", line 7, in <module>\n{fake.error}\n'
        layout.rank_log(rank).write_text(text)


def iso(seconds: float) -> str:
    """Seconds since the epoch as status files have it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document."""
    path.write_text(json.dumps(content, indent=2) + "\n")
