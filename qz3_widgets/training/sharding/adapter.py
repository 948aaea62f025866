"""PEFT's adapted 4-bit layer with the same arithmetic and less around it.

An adapted 8B model has 224 of them, each called in forward and recomputation: a copy of each output that nobody needs
any more (PEFT makes it for an autograd function that ours replaces), a product with 1.0, calls of modules that do
nothing. Whatever is not the plain case goes PEFT's way.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit
from torch import nn
from torch.nn.functional import linear

from .linear import ShardedLinear4bit


class LeanAdaptedLinear4bit(AdaptedLinear4bit):  # type: ignore[misc]
    """``peft.tuners.lora.bnb.Linear4bit`` around a :class:`ShardedLinear4bit`; see :func:`make_lean`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's, rounding for rounding."""
        active = self.active_adapters
        if args or kwargs or len(active) != 1 or self.disable_adapters or self.merged or torch.is_autocast_enabled():
            return cast("torch.Tensor", super().forward(x, *args, **kwargs))
        name = active[0]
        modules = self._modules
        down = modules["lora_A"]._modules.get(name)
        if down is None or name in self.lora_variant:
            return cast("torch.Tensor", super().forward(x))
        up = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        result = cast("torch.Tensor", modules["base_layer"](x))
        weight = cast("torch.Tensor", down.weight)
        if x.dtype != weight.dtype:
            x = self._cast_input_dtype(x, weight.dtype)
        if not isinstance(dropout, nn.Identity):
            x = dropout(x)
        update = linear(linear(x, weight, down.bias), up.weight, up.bias)
        scaling = self.scaling[name]
        if scaling != 1.0:
            update = update * scaling
        return result + update.to(result.dtype)


def make_lean(model: nn.Module) -> int:
    """Give the adapted 4-bit layers of ``model`` the lean forward, in place; returns their number."""
    layers = [
        module
        for module in model.modules()
        if type(module) is AdaptedLinear4bit and isinstance(module.base_layer, ShardedLinear4bit)
    ]
    for layer in layers:
        layer.__class__ = LeanAdaptedLinear4bit
    return len(layers)
