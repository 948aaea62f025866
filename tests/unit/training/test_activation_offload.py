"""What a checkpoint saves of a layer's inputs goes to the host and comes back, and no gradient changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qz3_widgets.training.activation_offload import ActivationOffload


def run(
    layers: nn.ModuleList, inputs: torch.Tensor, *, use_reentrant: bool, offload: ActivationOffload | None
) -> list[torch.Tensor | None]:
    call = checkpoint if offload is None else offload.around(checkpoint)
    mask = torch.ones(inputs.shape[-1])
    hidden = inputs.clone().requires_grad_()
    last = hidden
    for layer in layers:
        last = call(
            lambda value, shared, layer=layer: layer(value).tanh() * shared, last, mask, use_reentrant=use_reentrant
        )
    last.square().sum().backward()
    gradients = [hidden.grad, *(parameter.grad for parameter in layers.parameters())]
    layers.zero_grad()
    return gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    inputs = torch.randn(4, 8)
    plain = run(layers, inputs, use_reentrant=use_reentrant, offload=None)
    offload = ActivationOffload(torch.device("cpu"))
    for _ in range(2):
        found = run(layers, inputs, use_reentrant=use_reentrant, offload=offload)
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_only_hidden_states_leave() -> None:
    """Three layers, two passes; the mask needs no gradient and stays, as does all that is computed inside."""
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    offload = ActivationOffload(torch.device("cpu"))
    run(layers, torch.randn(4, 8), use_reentrant=False, offload=offload)
    assert offload.offloaded_bytes == 3 * 4 * 8 * 4


def test_without_a_gradient_nothing_leaves() -> None:
    offload = ActivationOffload(torch.device("cpu"))
    with torch.no_grad():
        offload.around(lambda value: value * 2)(torch.randn(4))
    assert offload.offloaded_bytes == 0
