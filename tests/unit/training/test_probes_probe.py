"""A rank's probe from its first word to its last, on one rank; and that no fault of its own ends a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from qz3_widgets.config.changes import with_changes
from qz3_widgets.config.schema import RunConfig
from qz3_widgets.runs.layout import RunLayout
from qz3_widgets.training.probes import probe as probes
from qz3_widgets.training.probes.probe import RankProbe
from qz3_widgets.training.recorder import MemoryRecorder
from qz3_widgets.training.session import RankIdentity


class Tiny(nn.Module):
    """A frozen 16-bit layer with LoRA beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.base.requires_grad_(False)

    def adapt(self) -> None:
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def step(self) -> None:
        x = torch.randn(3, 8)
        (self.base(x) + self.lora_B(self.lora_A(x))).square().sum().backward()
        with torch.no_grad():
            for parameter in (self.lora_A.weight, self.lora_B.weight):
                parameter -= 0.1 * cast("torch.Tensor", parameter.grad)
                parameter.grad = None


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "run")


def make(layout: RunLayout, *, rank: int = 0, world_size: int = 1, rehearsal: bool = False) -> RankProbe:
    config = with_changes(RunConfig(), {"zero.zero_stage": 0, "quantization.load_in_4bit": False})
    recorder = cast("MemoryRecorder", SimpleNamespace(allocated_bytes=100))
    identity = RankIdentity(
        rank=rank, local_rank=rank, world_size=world_size, host="here", pid=1, pid_created=0.0, rehearsal=rehearsal
    )
    return RankProbe(config, layout, recorder, identity)


def content(layout: RunLayout, rank: int = 0) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(layout.probe(rank).read_text(encoding="utf-8")))


def test_the_file_grows_from_moment_to_moment(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    probe, model = make(layout), Tiny()
    assert not layout.probe(0).exists()
    probe.loaded(model)
    assert "ready" not in content(layout)
    assert content(layout)["asked"]["load_strategy"] == "replicated"
    model.adapt()
    probe.ready(model, engine=None)
    assert content(layout)["ready"]["trainable_tensors"] == 2
    for _ in range(3):
        model.step()
        probe.step_ended()
    assert content(layout)["gradients"]["a_checked"]
    probe.ended(model)
    found = content(layout)
    assert found["ended"]["changed"] == []
    assert found["ended"]["checksum"] == found["checksum"]["model"]
    assert found["problems"] == []
    assert [failure["check"] for failure in found["failures"]] == ["quantized"]
    said = capsys.readouterr().out
    assert said == "PROOF FAILED: no weight is in 4 bit: quantization.load_in_4bit is off\n"


def test_a_frozen_weight_that_changes_is_noticed(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    probe, model = make(layout), Tiny()
    probe.loaded(model)
    model.adapt()
    probe.ready(model, engine=None)
    model.base.bias.data[3] += 1e-3
    probe.ended(model)
    assert content(layout)["ended"]["changed"] == ["base.bias"]
    assert "PROOF FAILED: the frozen weights have changed during the training: base.bias\n" in capsys.readouterr().out


def test_a_fault_of_the_probe_is_on_record_and_ends_nothing(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory, say")

    for name in ("take_census", "GatheredWatch", "fingerprints"):
        monkeypatch.setattr(probes, name, broken)
    probe, model = make(layout), Tiny()
    probe.loaded(model)
    model.adapt()
    probe.ready(model, engine=None)
    model.step()
    probe.step_ended()
    probe.ended(model)
    assert content(layout)["problems"] == [
        f"{moment}: RuntimeError: out of memory, say" for moment in ("loaded", "ready", "ended")
    ]
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert "the probe failed (loaded); the training goes on" in capsys.readouterr().err


def test_a_full_disk_ends_nothing(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probes, "write_json_atomic", full)
    make(layout).loaded(Tiny())


def test_an_earlier_attempts_file_is_gone(layout: RunLayout) -> None:
    make(layout).loaded(Tiny())
    make(layout)
    assert not layout.probe(0).exists()


def test_in_a_rehearsal_no_other_rank_is_spoken_of(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    probe = make(layout, rank=3, world_size=8, rehearsal=True)
    probe.loaded(Tiny())
    found = content(layout, rank=3)
    assert (found["rehearsal"], found["rank"], found["world_size"]) == (True, 3, 8)
    assert found["checksum"]["model"] is None
    assert "PROOF FAILED: no weight is in 4 bit" in capsys.readouterr().out
