"""Floating-point operations that a token costs in one training step, counted over the model's modules.

What the model needs, as model FLOPs utilization is defined (PaLM, arXiv 2204.02311, appendix B): a layer that is
computed again for its backward counts once. A frozen weight is multiplied twice, forward and for its input's gradient;
a trained one a third time, for its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Flops:
    """Operations for one token; a multiplication and an addition are two."""

    products: int  # with weights: layers, experts that a token is sent to, head
    attention: int  # scores and their sums, at the mean distance that a causal mask leaves

    @property
    def per_token(self) -> int:
        """All of them."""
        return self.products + self.attention

    def to_json(self) -> dict[str, int]:
        """For the probe's file."""
        return {**asdict(self), "per_token": self.per_token}


def count_flops(model: nn.Module, num_tokens: int) -> Flops:
    """Count for sequences of ``num_tokens``, of a model with its adapter; partitioned parameters will do."""
    config: Any = getattr(model, "config", None)
    shape = config.get_text_config()
    return Flops(_products(model, shape), _attention(shape, num_tokens))


def _products(model: nn.Module, shape: Any) -> int:
    total = 0.0
    originals = {name for name, _ in model.named_modules() if name.endswith(".original_module")}
    for name, module in model.named_modules():
        if any(name == each or name.startswith(f"{each}.") for each in originals):
            continue  # a trained copy is used in its place
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight
            size = module.in_features * module.out_features if isinstance(module, nn.Linear) else module.nx * module.nf
            total += size * _times(weight)
            continue
        for parameter in module.parameters(recurse=False):
            sizes = _sizes(parameter)
            if len(sizes) == 3:  # the matrices of all experts in one piece: num_experts x a x b
                total += sizes[1] * sizes[2] * _experts_per_token(shape, sizes[0]) * _times(parameter)
    return round(total)


def _times(parameter: Any) -> int:
    return 6 if parameter.requires_grad else 4


def _sizes(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _experts_per_token(shape: Any, num_experts: int) -> int:
    chosen = getattr(shape, "num_experts_per_tok", None) or getattr(shape, "top_k_experts", None)
    return int(chosen or num_experts)


def _attention(shape: Any, num_tokens: int) -> int:
    heads = int(shape.num_attention_heads)
    width = int(getattr(shape, "head_dim", None) or shape.hidden_size // heads)
    layers = int(shape.num_hidden_layers)
    kinds = getattr(shape, "layer_types", None) or ["full_attention"] * layers
    window = getattr(shape, "sliding_window", None) or num_tokens
    total = 0.0
    for kind in kinds[:layers]:
        seen = min(window, num_tokens) if kind == "sliding_attention" else num_tokens
        # Token i sees i tokens, or as many as the window has.
        mean = (seen * (seen + 1) / 2 + (num_tokens - seen) * seen) / num_tokens
        total += 3 * 2 * 2 * heads * width * mean
    return round(total)
