from __future__ import annotations

import pytest
import torch
from torch import nn

from qz3_widgets.training.probes.gradients import MAX_STEPS, GradientWatch


class Adapted(nn.Module):
    """Layers with LoRA beside a frozen weight; B begins at zero."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "base": nn.Linear(8, 8, bias=False),
            "lora_A": nn.Linear(8, 2, bias=False),
            "lora_B": nn.Linear(2, 8, bias=False),
        }) for _ in range(layers))  # fmt: skip
        for layer in self.layers:
            layer["base"].requires_grad_(False)
            nn.init.zeros_(layer["lora_B"].weight)
        self.cut_after: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer["base"](x) + layer["lora_B"](layer["lora_A"](x))
            if number == self.cut_after:
                x = x.detach()
        return x


def watch(model: nn.Module) -> GradientWatch:
    return GradientWatch(model, lambda values: values, num_ranks=1, rank=0)


def step(model: nn.Module, *, rate: float = 0.1, times: int = 1) -> None:
    for _ in range(times):
        model(torch.randn(4, 8)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


def test_all_is_well_after_two_steps() -> None:
    model = Adapted()
    probe = watch(model)
    step(model, times=2)
    first = probe.end_step()
    assert (first["num_missing"], first["num_zero"], first["a_checked"]) == (0, 0, False)
    step(model)
    second = probe.end_step()
    assert (second["num_missing"], second["num_zero"], second["a_checked"], second["steps"]) == (0, 0, True, 2)
    assert probe.is_done
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_what_is_cut_off_is_missing() -> None:
    model = Adapted()
    model.cut_after = 1
    probe = watch(model)
    step(model)
    found = probe.end_step()
    assert found["num_missing"] == 4
    assert found["missing"] == ["layers.{0..1}.lora_A.weight", "layers.{0..1}.lora_B.weight"]


def test_a_gradient_that_is_exactly_zero_is_told() -> None:
    model = Adapted(layers=2)
    nn.init.zeros_(model.layers[1]["lora_A"].weight)  # then B's gradient is zero, and A's for ever
    probe = watch(model)
    for _ in range(2):
        step(model)
        found = probe.end_step()
    assert found["num_missing"] == 0
    assert found["zero"] == ["layers.1.lora_B.weight", "layers.1.lora_A.weight"]


def test_a_is_asked_only_when_b_has_moved() -> None:
    """A warm-up begins with a learning rate of 0."""
    model = Adapted()
    probe = watch(model)
    for rate in (0.0, 0.0, 0.1, 0.1):
        step(model, rate=rate)
        found = probe.end_step()
    assert (found["steps"], found["a_checked"], found["num_zero"]) == (4, True, 0)


def test_it_gives_up_in_the_end() -> None:
    model = Adapted()
    probe = watch(model)
    for _ in range(MAX_STEPS):
        assert not probe.is_done
        step(model, rate=0.0)
        found = probe.end_step()
    assert probe.is_done
    assert not found["a_checked"]


def test_a_b_that_is_not_zero_at_the_start_needs_one_step() -> None:
    """A resumed run."""
    model = Adapted()
    for layer in model.layers:
        nn.init.normal_(layer["lora_B"].weight)
    probe = watch(model)
    step(model)
    assert probe.end_step()["a_checked"]
    assert probe.is_done


def test_an_overflow_is_no_zero() -> None:
    model = Adapted()
    probe = watch(model)
    (model(torch.full((1, 8), torch.nan)).sum()).backward()
    found = probe.end_step()
    assert (found["num_missing"], found["num_zero"]) == (0, 0)


def test_padding_of_a_partitioned_b_is_not_looked_at() -> None:
    model = Adapted(layers=1)
    b = model.layers[0]["lora_B"].weight
    b.ds_tensor, b.ds_numel = torch.tensor([0.0] * 5 + [torch.nan]), 11  # rank 1 of 2 has 5 of 11 elements
    probe = GradientWatch(model, lambda values: values, num_ranks=2, rank=1)
    assert probe._b_was_zero


def test_an_expert_without_tokens_has_none() -> None:
    model = nn.ModuleDict({"experts": Adapted(layers=2)})
    probe = GradientWatch(nn.ModuleDict({"mlp": model}), lambda values: values, num_ranks=1, rank=0)
    model["experts"].layers[1]["base"](model["experts"].layers[1]["lora_B"](
        model["experts"].layers[1]["lora_A"](torch.randn(2, 8)))).sum().backward()  # fmt: skip
    assert probe.end_step()["num_missing"] == 0


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_what_another_rank_has_seen_counts(other: float) -> None:
    model = Adapted()
    model.cut_after = 2
    count = sum(parameter.requires_grad for parameter in model.parameters())
    probe = GradientWatch(model, lambda values: [max(value, other) for value in values], num_ranks=2, rank=0)
    assert probe.end_step()["num_missing"] == (0 if other else count)
