"""Does every trainable tensor get a gradient? Asked of autograd itself in the first steps.

A hook on each tensor notes that its gradient came, and how large it was at most; one collective at the end of the step
tells all ranks. In LoRA's usual start B is zero, so that A's gradients are zero until B has moved: A is asked for more
than zero in the first step that begins with a B that is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..sharding.partition import part_of
from .names import base_name, compress

MAX_STEPS = 20
"""Steps after which the question for A is given up: a warm-up whose first learning rates are 0, or fp16 steps that were
skipped, keep B at zero for a while."""

_A = ("lora_A", "lora_embedding_A")
_B = ("lora_B", "lora_embedding_B")


class GradientWatch:
    """Hooks on all trainable parameters, until :attr:`is_done`."""

    def __init__(
        self, model: nn.Module, reduce_max: Callable[[list[float]], list[float]], *, num_ranks: int, rank: int
    ) -> None:
        """``reduce_max`` gives the largest of all ranks' values, entry by entry; a collective call."""
        trainable: list[tuple[str, Any]] = [
            (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
        ]
        self.names = [name for name, _ in trainable]
        self.seconds = 0.0
        self.is_done = False
        self._reduce_max = reduce_max
        self._num_ranks, self._rank = num_ranks, rank
        self._largest: dict[int, torch.Tensor] = {}
        self._b = [parameter for name, parameter in trainable if any(part in name for part in _B)]
        self._b_was_zero = self._is_b_zero()
        self._steps = 0
        self._found: dict[str, Any] = {"tensors": len(self.names), "missing": [], "zero": [], "a_checked": False}
        self._handles = [
            parameter.register_hook(self._noter(number)) for number, (_, parameter) in enumerate(trainable)
        ]

    def end_step(self) -> dict[str, Any]:
        """Ask all ranks and judge the step that ends; a collective call. Returns what is known so far."""
        begin = time.perf_counter()
        count = len(self.names)
        fired = [float(number in self._largest) for number in range(count)]
        sizes = dict(zip(self._largest, _numbers(self._largest.values()), strict=True))
        # Not a number counts as not zero: an overflow is another matter than no gradient.
        not_zero = [float(sizes.get(number, 0.0) != 0.0) for number in range(count)]
        *both, b_moved = self._reduce_max([*fired, *not_zero, float(not self._b_was_zero)])
        self._judge([value > 0 for value in both[:count]], [value > 0 for value in both[count:]], b_moved > 0)
        self._largest.clear()
        if self.is_done:
            self.remove()
        else:
            self._b_was_zero = self._is_b_zero()
        self.seconds += time.perf_counter() - begin
        return {**self._found, "steps": self._steps}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _judge(self, fired: list[bool], not_zero: list[bool], b_moved: bool) -> None:
        self._steps += 1
        if self._steps == 1:
            routed = any(came and ".experts." in name for name, came in zip(self.names, fired, strict=True))
            # An expert to which no token was sent has no gradient, and that is as it should be.
            excused = {name for name in self.names if routed and ".experts." in name}
            missing = [n for n, came in zip(self.names, fired, strict=True) if not came and n not in excused]
            self._found["missing"], self._found["num_missing"] = _short(missing), len(missing)
        checked = [*([_A] if b_moved else []), *([_B] if self._steps == 1 else [])]
        zero = [
            name
            for name, came, more in zip(self.names, fired, not_zero, strict=True)
            if came and not more and any(part in name for parts in checked for part in parts)
        ]
        self._found["zero"] = [*self._found["zero"], *_short(zero)]
        self._found["num_zero"] = self._found.get("num_zero", 0) + len(zero)
        self._found["a_checked"] = b_moved
        self.is_done = b_moved or not self._b or self._steps >= MAX_STEPS

    def _noter(self, number: int) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            begin = time.perf_counter()
            if gradient.numel() == 0:
                return
            largest = torch.linalg.vector_norm(gradient.detach(), math.inf)
            before = self._largest.get(number)
            self._largest[number] = largest if before is None else torch.maximum(before, largest)
            self.seconds += time.perf_counter() - begin

        return note

    def _is_b_zero(self) -> bool:
        """On this rank: of a partitioned B its part alone is here, without the padding, which may be anything."""
        counts = []
        for parameter in self._b:
            values = parameter.detach()
            stored = getattr(parameter, "ds_tensor", None)
            if stored is not None:
                part = part_of(parameter.ds_numel, self._num_ranks, self._rank)
                values = stored[: part.end - part.begin]
            counts.append(torch.count_nonzero(values))
        return not any(_numbers(counts))


def _numbers(values: Iterable[torch.Tensor]) -> list[float]:
    """0-dimensional tensors as numbers; where they are all on one device, with one transfer."""
    tensors = list(values)
    if len({tensor.device for tensor in tensors}) == 1:
        return [float(value) for value in torch.stack([tensor.float() for tensor in tensors]).tolist()]
    return [float(tensor) for tensor in tensors]


def _short(names: list[str]) -> list[str]:
    return compress(base_name(name) for name in names)
