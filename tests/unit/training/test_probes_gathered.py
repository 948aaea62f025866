"""What is alive of what was gathered, with a coordinator that gathers and releases as it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qz3_widgets.training.probes.census import Weight
from qz3_widgets.training.probes.gathered import GatheredWatch

ELEMENTS = 1000
BYTES = 2 * ELEMENTS


class Coordinator:
    """Gathers into new storage, as DeepSpeed does."""

    def __init__(self) -> None:
        self.fetched: list[tuple[nn.Module, bool]] = []

    def fetch_sub_module(self, current_submodule: nn.Module, forward: bool) -> None:
        self.fetched.append((current_submodule, forward))
        for parameter in current_submodule.parameters(recurse=False):
            if parameter.data.numel() == 0:
                parameter.data = torch.zeros(ELEMENTS, dtype=torch.bfloat16)

    def release(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=torch.bfloat16)


class Layers:
    """Four partitioned 4-bit layers under one engine."""

    def __init__(self) -> None:
        self.modules = [nn.Module() for _ in range(4)]
        self.coordinator = Coordinator()
        weights = []
        for number, module in enumerate(self.modules):
            parameter: Any = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
            parameter.ds_id, parameter.ds_shape, parameter.ds_numel = number, torch.Size([ELEMENTS, 1]), ELEMENTS
            parameter.ds_tensor = torch.zeros(ELEMENTS // 2, dtype=torch.bfloat16)
            parameter.quant_state = SimpleNamespace(shape=torch.Size([4 * ELEMENTS]))
            module.register_parameter("weight", parameter)
            weights.append(Weight(f"layers.{number}.weight", parameter, module))
        offload = SimpleNamespace(get_param_coordinator=lambda: self.coordinator)
        engine = SimpleNamespace(optimizer=SimpleNamespace(parameter_offload=offload))
        self.watch = GatheredWatch(engine, weights)

    def pass_over(self, held: list[torch.Tensor] | None = None) -> None:
        """A forward; ``held`` keeps each weight past its release."""
        for module in self.modules:
            self.coordinator.fetch_sub_module(module, forward=True)
            if held is not None:
                held.append(module.weight.data)
            self.coordinator.release(module)


@pytest.fixture
def layers() -> Layers:
    made = Layers()
    assert made.watch.is_possible
    made.watch.start()
    return made


def test_one_layer_at_a_time(layers: Layers) -> None:
    layers.pass_over()
    report = layers.watch.report()
    assert report["peaks"] == [{"alive_bytes": BYTES, "needed_bytes": BYTES, "when": "forward", "where": "layers.0"}]
    assert report["leaked_bytes"] == 0
    assert (report["model_bytes"], report["largest_unit_bytes"], report["fetches"]) == (4 * BYTES, BYTES, 4)


def test_what_autograd_keeps_is_found(layers: Layers) -> None:
    """DeepSpeed has released it, and it is alive."""
    held: list[torch.Tensor] = []
    layers.pass_over(held)
    report = layers.watch.report()
    assert report["peaks"][0]["alive_bytes"] == 4 * BYTES
    assert report["peaks"][0]["needed_bytes"] == BYTES
    assert report["peaks"][0]["where"] == "layers.3"
    assert report["leaked_bytes"] == 3 * BYTES


def test_what_deepspeed_keeps_is_needed(layers: Layers) -> None:
    for module in layers.modules:
        layers.coordinator.fetch_sub_module(module, forward=True)
    report = layers.watch.report()
    assert report["peaks"][0]["alive_bytes"] == report["peaks"][0]["needed_bytes"] == 4 * BYTES
    assert report["leaked_bytes"] == 0


def test_backward_and_recomputation_are_told_apart(layers: Layers) -> None:
    layers.coordinator.fetch_sub_module(layers.modules[2], False)
    assert layers.watch.report()["peaks"][0]["when"] == "backward"

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            layers.coordinator.fetch_sub_module(layers.modules[1], forward=True)
            return grads[0]

    InBackward.apply(torch.ones(1, requires_grad=True)).backward()
    assert layers.watch.report()["peaks"][0]["when"] == "recomputation"


def test_each_step_has_its_own_peak_and_the_watch_holds_nothing(layers: Layers) -> None:
    held: list[torch.Tensor] = []
    layers.pass_over(held)
    held.clear()
    layers.watch.begin_step()
    layers.pass_over()
    assert [peak["alive_bytes"] for peak in layers.watch.report()["peaks"]] == [4 * BYTES, BYTES]


def test_it_leaves_no_trace(layers: Layers) -> None:
    layers.watch.stop()
    assert layers.coordinator.fetch_sub_module.__func__ is Coordinator.fetch_sub_module
    layers.pass_over()
    assert layers.watch.report()["fetches"] == 0
    assert len(layers.coordinator.fetched) == 4


def test_without_zero_3_there_is_nothing_to_watch() -> None:
    watch = GatheredWatch(SimpleNamespace(optimizer=None), [])
    assert not watch.is_possible
    watch.stop()
