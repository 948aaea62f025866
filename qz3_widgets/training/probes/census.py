"""A count of the base model's weights on one rank: how many, in which form, and how much of each this rank holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..sharding.linear import STATISTICS
from .names import base_name, compress

Why16 = Literal["quantization_off", "embedding", "head", "listed", "fused", "kept", "not_linear", "unexplained"]

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class Weight:
    """One parameter of the base model, as it is at the moment."""

    name: str  # in the base model
    parameter: Any
    module: nn.Module

    @property
    def shape(self) -> torch.Size:
        """Of the whole stored tensor."""
        return cast("torch.Size", getattr(self.parameter, "ds_shape", self.parameter.shape))

    @property
    def state(self) -> Any:
        """The quantization state of a 4-bit weight, else ``None``."""
        return getattr(self.parameter, "quant_state", None)

    @property
    def is_statistics(self) -> bool:
        """Whether it holds scales that were taken off a quantization state."""
        return self.name.endswith(f".{STATISTICS}")

    @property
    def num_weights(self) -> int:
        """Weights of the model that it stands for: two to a byte of a 4-bit one, none for statistics."""
        if self.is_statistics:
            return 0
        return math.prod(self.state.shape if self.state is not None else self.shape)

    @property
    def whole_bytes(self) -> int:
        """Of the whole stored tensor, over all ranks."""
        return math.prod(self.shape) * int(self.parameter.element_size())

    @property
    def part(self) -> torch.Tensor | None:
        """This rank's part, padding included, where ZeRO-3 has cut the tensor."""
        return getattr(self.parameter, "ds_tensor", None)

    @property
    def is_partitioned(self) -> bool:
        """Whether ZeRO-3 holds it in parts."""
        return hasattr(self.parameter, "ds_id") and self.part is not None

    @property
    def held_bytes(self) -> int:
        """On this rank now: its part, and the whole if it is gathered."""
        data = self.parameter.data
        whole = 0 if data.device.type == "meta" else data.numel() * data.element_size()
        part = self.part
        return whole + (0 if part is None else part.numel() * part.element_size())

    @property
    def device(self) -> torch.device:
        """Where what this rank holds of it lies."""
        part = self.part
        return cast("torch.device", self.parameter.device if part is None else part.device)

    def part_bytes(self, num_ranks: int) -> int:
        """Of an equal part, padding included."""
        return -(-math.prod(self.shape) // num_ranks) * int(self.parameter.element_size())

    def whole_scales_bytes(self) -> int:
        """Scales that its quantization state holds whole, which every rank then does."""
        absmax = None if self.state is None else self.state.absmax
        return 0 if absmax is None else absmax.numel() * absmax.element_size()

    def nested_bytes(self) -> int:
        """What double quantization adds: small, and whole on every rank."""
        nested = None if self.state is None else self.state.state2
        return 0 if nested is None else nested.absmax.numel() * nested.absmax.element_size()


def base_weights(model: nn.Module, known: Collection[str] | None = None) -> Iterator[Weight]:
    """The base model's parameters, each once; ``known`` names them where an adapter has been added since."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = base_name(f"{path}.{leaf}" if path else leaf)
            if known is None or name in known:
                yield Weight(name, parameter, module)


def why_16_bit(weight: Weight, model: nn.Module, *, quantized: bool, listed: Collection[str]) -> Why16:
    """Why a weight with two dimensions or more is not in 4 bit.

    ``listed`` are the names that the user wants left out. ``kept`` means the loader's own list; ``unexplained`` is a
    plain linear layer on neither.
    """
    module = weight.module
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not quantized:
        return "quantization_off"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if module is head:
        return "head"
    path = weight.name.rpartition(".")[0]
    if listed and not should_convert_module(path, list(listed)):
        return "listed"
    if isinstance(module, _CONVOLUTIONS):
        return "not_linear"
    if len(weight.shape) > 2:
        return "fused"
    left_out = getattr(getattr(model, "hf_quantizer", None), "modules_to_not_convert", None)
    if left_out and not should_convert_module(path, list(left_out)):
        return "kept"
    return "unexplained" if type(module) is nn.Linear or isinstance(module, Conv1D) else "not_linear"


def explain_16_bit(model: nn.Module, *, quantized: bool, listed: Collection[str]) -> dict[str, Why16]:
    """Name to reason for every weight that is not in 4 bit and could be: vectors are none, nor are statistics."""
    return {
        weight.name: why_16_bit(weight, model, quantized=quantized, listed=listed)
        for weight in base_weights(model)
        if weight.state is None and not weight.is_statistics and len(weight.shape) > 1
    }


def take_census(
    weights: Collection[Weight], frozen: Collection[Weight], why: dict[str, Why16], *, num_ranks: int
) -> dict[str, Any]:
    """All counts of one rank at one moment, ready for JSON.

    Weights are counted as the model has them: two to a byte of a 4-bit tensor. ``frozen`` are those of ``weights``
    that are not trained.
    """
    packed = [weight for weight in weights if weight.state is not None]
    statistics = [weight for weight in weights if weight.is_statistics]
    whole_scales = sum(weight.whole_scales_bytes() for weight in weights)
    nested = sum(weight.nested_bytes() for weight in weights)
    num_weights = sum(weight.num_weights for weight in weights)
    num_packed = sum(weight.num_weights for weight in packed)
    total = sum(weight.whole_bytes for weight in weights) + whole_scales + nested
    packed_bytes = sum(weight.whole_bytes for weight in [*packed, *statistics]) + whole_scales + nested
    loose = [weight for weight in frozen if not weight.is_partitioned]
    num_frozen = sum(weight.num_weights for weight in frozen)
    by_dtype: Counter[str] = Counter()
    by_device: Counter[str] = Counter()
    for weight in weights:
        kind = str(weight.parameter.dtype).removeprefix("torch.")
        by_dtype["4bit" if weight.state is not None else "statistics" if weight.is_statistics else kind] += (
            weight.held_bytes
        )
        by_device[str(weight.device)] += weight.held_bytes
    return {
        "weights": num_weights,
        "bytes": total,
        "frozen_weights": num_frozen,
        "partitioned_fraction": 1 - sum(weight.num_weights for weight in loose) / max(1, num_frozen),
        "whole": compress(weight.name for weight in loose)[:20],
        "held_bytes": sum(weight.held_bytes for weight in weights) + whole_scales + nested,
        "expected_bytes": sum(weight.part_bytes(num_ranks) for weight in weights) + whole_scales + nested,
        "bytes_by_dtype": dict(by_dtype),
        "bytes_by_device": dict(by_device),
        "missing_weights": sum(weight.num_weights for weight in weights if weight.device.type == "meta"),
        "layers_4bit": len(packed),
        "weights_4bit": num_packed,
        "bytes_per_parameter": total / max(1, num_weights),
        "bytes_per_4bit_parameter": packed_bytes / num_packed if num_packed else None,
        "layers_16bit": _left_over(weights, why),
        "matrix_weights": num_packed + sum(weight.num_weights for weight in weights if weight.name in why),
        "statistics": {
            "sharded_bytes": sum(weight.whole_bytes for weight in statistics if weight.is_partitioned),
            "whole_bytes": whole_scales + sum(w.whole_bytes for w in statistics if not w.is_partitioned),
            "nested_bytes": nested,
        },
        "persistent_bytes": sum(
            weight.whole_bytes for weight in frozen if getattr(weight.parameter, "ds_persist", False)
        ),
    }


def _left_over(weights: Collection[Weight], why: dict[str, Why16]) -> list[dict[str, Any]]:
    """One entry for each reason: which weights are not in 4 bit, and how many bytes of the model that is."""
    entries = []
    for reason in dict.fromkeys(why.values()):
        found = [weight for weight in weights if why.get(weight.name) == reason]
        if found:
            entries.append(
                {
                    "why": reason,
                    "names": compress(weight.name for weight in found),
                    "tensors": len(found),
                    "weights": sum(weight.num_weights for weight in found),
                    "bytes": sum(weight.whole_bytes for weight in found),
                }
            )
    return entries
