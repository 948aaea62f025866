"""The layer that lets go: bit for bit the stock layer, and nothing packed kept by autograd."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from qz3_widgets.training.sharding.linear import STATISTICS, ShardedLinear4bit, let_go, take_off_statistics

IN, OUT = 96, 64


def stock_layer(
    *,
    bias: bool = False,
    quant_type: str = "nf4",
    nested: bool = True,
    storage: torch.dtype = torch.bfloat16,
    compute: torch.dtype | None = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        IN,
        OUT,
        bias=bias,
        compute_dtype=compute,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    ).to("cpu")
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)  # what the stock layer does to it in its first forward
    layer.support_avx512bf16_for_cpu = False  # see keep_weights_trainable_on_cpu
    return layer


def both(*, statistics: bool, **options: Any) -> tuple[bnb.nn.Linear4bit, ShardedLinear4bit]:
    """A stock layer and one that lets go, with the same bytes."""
    stock, own = stock_layer(**options), stock_layer(**options)
    assert torch.equal(stock.weight.data.view(torch.uint8), own.weight.data.view(torch.uint8))
    layer = let_go(own)
    if statistics:
        take_off_statistics(layer)
    return stock, layer


def run(layer: nn.Module, dtype: torch.dtype, *, needs_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 5, IN, generator=generator).to(dtype).requires_grad_(needs_grad)
    output = layer(inputs)
    if output.requires_grad:
        output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return output.detach(), inputs.grad


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_outputs_and_gradients_are_the_stock_layers(
    storage: torch.dtype, bias: bool, dtype: torch.dtype, nested: bool, statistics: bool
) -> None:
    for quant_type in ("nf4", "fp4"):
        options: dict[str, Any] = {"bias": bias, "nested": nested, "storage": storage, "quant_type": quant_type}
        stock, layer = both(statistics=statistics, dtype=dtype, **options)
        for expected, found in zip(run(stock, dtype), run(layer, dtype), strict=True):
            assert expected is not None
            assert found is not None
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
        if bias:
            assert torch.equal(layer.bias.grad, stock.bias.grad)


@pytest.mark.parametrize("statistics", [True, False])
def test_without_gradients_and_in_eval_mode(statistics: bool) -> None:
    stock, layer = both(statistics=statistics)
    stock.eval()
    layer.eval()
    with torch.no_grad():
        assert torch.equal(run(layer, torch.bfloat16)[0], run(stock, torch.bfloat16)[0])
    output, grad = run(layer, torch.bfloat16, needs_grad=False)
    assert torch.equal(output, run(stock, torch.bfloat16, needs_grad=False)[0])
    assert grad is None
    # Training goes on after an evaluation: nothing was repacked.
    for expected, found in zip(run(stock.train(), torch.bfloat16), run(layer.train(), torch.bfloat16), strict=True):
        assert torch.equal(found, expected)  # type: ignore[arg-type]


def test_the_compute_type_is_found_as_the_stock_layer_finds_it() -> None:
    stock, layer = both(statistics=True, compute=None)
    for expected, found in zip(run(stock, torch.bfloat16), run(layer, torch.bfloat16), strict=True):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    assert layer.compute_dtype == stock.compute_dtype


def test_a_trained_bias_alone_gets_its_gradient() -> None:
    stock, layer = both(statistics=True, bias=True)
    run(stock, torch.bfloat16, needs_grad=False)
    run(layer, torch.bfloat16, needs_grad=False)
    assert torch.equal(layer.bias.grad, stock.bias.grad)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_the_statistics_become_a_parameter_of_the_same_bytes(nested: bool, storage: torch.dtype) -> None:
    layer = let_go(stock_layer(nested=nested, storage=storage))
    before = layer.weight.quant_state.absmax.clone()
    parameter = take_off_statistics(layer)
    assert getattr(layer, STATISTICS) is parameter
    assert parameter.dtype == storage
    assert not parameter.requires_grad
    assert layer.weight.quant_state.absmax is None
    _, state = layer.packed_weight()
    assert torch.equal(state.absmax.view(torch.uint8), before.view(torch.uint8))
    assert state.absmax.dtype == before.dtype
    assert layer.weight.quant_state.absmax is None  # what was handed out is a copy
    layer.to("cpu")  # what is left of the state moves without them
    assert torch.equal(run(layer, torch.bfloat16)[0], run(stock_layer(nested=nested), torch.bfloat16)[0])


def let_weights_go(layer: ShardedLinear4bit) -> tuple[torch.Tensor, torch.Tensor, StorageWeakRef]:
    """Do what DeepSpeed does after a forward: put nothing where the weight was. Returns copies of what was there."""
    statistics = getattr(layer, STATISTICS)
    kept = layer.weight.data.clone(), statistics.data.clone()
    alive = StorageWeakRef(layer.weight.data.untyped_storage())
    for parameter in (layer.weight, statistics):
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return (*kept, alive)


def gather(layer: ShardedLinear4bit, packed: torch.Tensor, statistics: torch.Tensor) -> None:
    layer.weight.data = packed
    getattr(layer, STATISTICS).data = statistics


@pytest.mark.parametrize("mode", ["none", "reentrant", "non_reentrant"])
def test_autograd_holds_nothing_packed(mode: str) -> None:
    stock, layer = both(statistics=True)
    inputs = torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True)
    expected = copy.deepcopy(inputs)
    stock(expected).sum().backward()

    output = layer(inputs) if mode == "none" else checkpoint(layer, inputs, use_reentrant=mode == "reentrant")
    packed, statistics, alive = let_weights_go(layer)
    assert alive.expired()
    gather(layer, packed, statistics)
    output.sum().backward()
    assert torch.equal(inputs.grad, expected.grad)  # type: ignore[arg-type]


def test_the_stock_layer_does_hold_it() -> None:
    """What the layer is there for; when this fails, bitsandbytes has mended it."""
    layer = stock_layer()
    output = layer(torch.randn(4, IN, dtype=torch.bfloat16, requires_grad=True))
    alive = StorageWeakRef(layer.weight.data.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=torch.bfloat16)
    assert not alive.expired()
    assert output is not None


def test_a_weight_that_is_not_gathered_is_an_error_in_words() -> None:
    layer = both(statistics=True)[1]
    packed, statistics, _ = let_weights_go(layer)
    with pytest.raises(RuntimeError, match=r"a 4-bit weight was used while it was partitioned"):
        run(layer, torch.bfloat16)
    gather(layer, packed, torch.empty(0, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"the statistics of a 4-bit weight were used while they were partitioned"):
        run(layer, torch.bfloat16)
    gather(layer, packed, statistics)
    run(layer, torch.bfloat16)
