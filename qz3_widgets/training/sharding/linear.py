"""A 4-bit linear layer that lets go of its weight between forward and backward.

bitsandbytes keeps the packed weight as a plain attribute of the autograd context (``MatMul4Bit.forward``), so under
ZeRO-3 every gathered layer stays alive from its forward to its backward: the whole model, on every rank, at the
peak of every step. Here the context holds the module alone. DeepSpeed gathers the module's parameters before its
forward and before its backward, and the weight is read from the module whenever it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import torch
from torch import nn

from .partition import padded

STATISTICS = "weight_statistics"
"""Name of the parameter that holds the scales: their bytes viewed in the weight's storage dtype, so that DeepSpeed
gathers them in the weight's own collective."""


class ShardedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """``Linear4bit`` whose weight, and scales if they were taken off, may be partitioned.

    Instances are made from loaded layers by :func:`let_go`; outputs and gradients equal those of ``Linear4bit`` on
    the same bytes.
    """

    compute_type_is_set: bool
    num_statistics: int
    statistics_dtype: torch.dtype
    read_packed: Callable[[], torch.Tensor] | None = None
    read_statistics: Callable[[], torch.Tensor] | None = None
    statistics_are_fixed: bool = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``Linear4bit.forward``, but for what autograd keeps."""
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        inputs = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        if torch.is_grad_enabled() and (inputs.requires_grad or (bias is not None and bias.requires_grad)):
            output = _ReadAgain.apply(inputs, self, bias)  # type: ignore[no-untyped-call]
        else:
            packed, state = self.packed_weight()
            output = bnb.matmul_4bit(inputs, packed, quant_state=state, bias=bias)
        return cast("torch.Tensor", output.to(x.dtype))

    def packed_weight(self) -> tuple[torch.Tensor, functional.QuantState]:
        """The gathered weight and its quantization state, whole.

        Raises:
            RuntimeError: the weight is not gathered.
        """
        weight = cast("Any", self._parameters["weight"])
        packed = weight.data if self.read_packed is None else self.read_packed()
        if packed.numel() == 0:
            raise RuntimeError(
                "a 4-bit weight was used while it was partitioned: the layer ran outside the DeepSpeed engine, or its "
                "module was called past its hooks"
            )
        state = weight.quant_state
        if state.absmax is None:
            state = copy.copy(state)
            state.absmax = self._statistics()
            if self.statistics_are_fixed:
                weight.quant_state = state
        return packed, state

    def read_from(self, name: str, view: Any) -> None:
        """Read parameter ``name``, the weight or its statistics, from ``view`` (:class:`.flat.View`) from now on."""
        read = view.read
        if view.is_fixed:
            fixed = view.read()
            read = lambda: fixed  # noqa: E731
        if name == STATISTICS:
            self.read_statistics, self.statistics_are_fixed = read, view.is_fixed
        else:
            self.read_packed = read

    def _statistics(self) -> torch.Tensor:
        stored = getattr(self, STATISTICS).data if self.read_statistics is None else self.read_statistics()
        if stored.numel() == 0:
            raise RuntimeError("the statistics of a 4-bit weight were used while they were partitioned")
        num_bytes = self.num_statistics * self.statistics_dtype.itemsize
        return cast("torch.Tensor", stored.view(torch.uint8)[:num_bytes].view(self.statistics_dtype))


class StateWithoutScales(functional.QuantState):  # type: ignore[misc]
    """A quantization state whose scales stand elsewhere: what remains of it moves between devices without them."""

    code: torch.Tensor
    offset: torch.Tensor
    nested: bool
    state2: Any

    def to(self, device: Any) -> None:
        """Move what is left."""
        self.code = self.code.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.absmax = self.state2.absmax.to(device)
            self.state2.code = self.state2.code.to(device)


class _ReadAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: ShardedLinear4bit, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        ctx.bias_dtype = bias.dtype if bias is not None and bias.requires_grad else None
        packed, state = layer.packed_weight()
        return _product(inputs, packed, state, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        (grad,) = grads
        grad_input = grad_bias = None
        if ctx.bias_dtype is not None:
            # Only the first dimension, as MatMul4Bit does: autograd sums the others, and the roundings are the same.
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            packed, state = ctx.layer.packed_weight()
            grad_input = torch.matmul(grad, functional.dequantize_4bit(packed, state).to(grad.dtype))
        return grad_input, None, grad_bias


def _product(
    inputs: torch.Tensor, packed: torch.Tensor, state: functional.QuantState, bias: torch.Tensor | None
) -> torch.Tensor:
    """What ``bnb.matmul_4bit`` computes, without its autograd function: inside one of ours nothing is recorded."""
    rows, columns = state.shape
    if (rows != columns and inputs.shape[-1] == rows) or inputs.numel() == 0:  # cases that it treats by themselves
        return cast("torch.Tensor", bnb.matmul_4bit(inputs.detach(), packed, quant_state=state, bias=bias))
    nested: dict[str, Any] = {}
    scales = state.absmax
    if state.nested:
        scales = state.state2.absmax
        nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    product = torch.ops.bitsandbytes.gemm_4bit.default(
        inputs, packed.view(-1, 1), state.shape, scales, state.blocksize, state.quant_type, bias=bias, **nested
    )
    return cast("torch.Tensor", product)


def let_go(layer: bnb.nn.Linear4bit) -> ShardedLinear4bit:
    """Turn a loaded layer into one that lets go, in place."""
    layer.__class__ = ShardedLinear4bit
    # A forward in eval mode would repack the weight for a kernel without a backward, on CPUs with AVX512-BF16.
    layer.support_avx512bf16_for_cpu = False
    return cast("ShardedLinear4bit", layer)


def take_off_statistics(layer: ShardedLinear4bit) -> nn.Parameter:
    """Make the scales of the quantization state a parameter of the layer, which ZeRO-3 can partition; returns it."""
    state = layer.weight.quant_state
    absmax = state.absmax
    elements = as_storage_elements(absmax, layer.weight.quant_storage)
    state.absmax = None
    state.__class__ = StateWithoutScales
    return give_statistics(layer, elements, absmax.numel(), absmax.dtype)


def give_statistics(
    layer: ShardedLinear4bit, elements: torch.Tensor, num_statistics: int, dtype: torch.dtype
) -> nn.Parameter:
    """Register ``elements``, storage elements that hold ``num_statistics`` scales of ``dtype``; returns the parameter.

    They may be hollow: a shape without the memory.
    """
    layer.num_statistics, layer.statistics_dtype = num_statistics, dtype
    parameter = nn.Parameter(elements, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined] # or transformers would initialize it
    layer.register_parameter(STATISTICS, parameter)
    return parameter


def num_storage_elements(num_bytes: int, storage: torch.dtype) -> int:
    """Storage elements that ``num_bytes`` of scales are kept in."""
    return -(-num_bytes // storage.itemsize)


def as_storage_elements(absmax: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """Scales as elements of the storage dtype, zeros behind them; a copy, 1-D."""
    raw = absmax.contiguous().view(-1).view(torch.uint8)
    size = num_storage_elements(raw.numel(), storage) * storage.itemsize
    return padded(raw, size).clone().view(storage)
