"""Parameters that every rank keeps whole: norms, and the adapter where it is small.

DeepSpeed brings them up to date after each optimizer step with one collective a parameter, of which an adapter has
hundreds. Here it is one for all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

MAX_ADAPTER_BYTES = 2**29
"""An adapter up to this size is kept whole: gathered with each layer it costs more time than its memory is worth."""


class ResidentParameters:
    """Stands in DeepSpeed's list of persistent parameters, for all of them.

    DeepSpeed calls ``persistent_parameters[0].all_gather(persistent_parameters)`` whenever they may have changed (after
    a step, a saved or a loaded checkpoint), and ``partition`` before it loads one.
    """

    def __init__(self, parameters: Sequence[Any], device: torch.device) -> None:
        """Collective: they are whole from now on."""
        self.parameters = tuple(parameters)
        waiting = [each for each in parameters if each.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        frozen = [each for each in waiting if not each.requires_grad]
        if frozen:
            frozen[0].all_gather(frozen)
        self._frozen = {each: each.data for each in parameters if not each.requires_grad}
        groups: dict[Any, list[Any]] = defaultdict(list)
        for each in parameters:
            if each.requires_grad:
                groups[each.ds_process_group, each.ds_tensor.dtype].append(each)
        self._groups = [_Group(members, device) for members in groups.values()]
        self.all_gather()

    def all_gather(self, parameters: object = None, **unused: object) -> None:
        """Bring the trained ones up to date, and have all of them whole; collective."""
        for group in self._groups:
            group.refresh()
        for parameter, value in self._frozen.items():
            if parameter.ds_status != ZeroParamStatus.AVAILABLE:
                parameter.data = value
                parameter.ds_status = ZeroParamStatus.AVAILABLE

    def partition(self, parameters: object = None, **unused: object) -> None:
        """Leave only the parts."""
        for parameter in self.parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()


class _Group:
    """Trained parameters of one process group and dtype."""

    def __init__(self, parameters: Sequence[Any], device: torch.device) -> None:
        self._parameters = parameters
        self._process_group = parameters[0].ds_process_group
        self._num_ranks = dist.get_world_size(self._process_group)
        self._device = device
        self._sizes = [each.ds_tensor.numel() for each in parameters]
        self._total = sum(self._sizes)
        if self._num_ranks > 1:
            dtype = parameters[0].ds_tensor.dtype
            values = torch.empty(self._num_ranks * self._total, dtype=dtype, device=device)
            pieces = values.split([self._num_ranks * size for size in self._sizes])
            self._parts = [piece.view(self._num_ranks, -1) for piece in pieces]  # of each parameter, a row a rank
            self._values = [
                piece[: math.prod(each.ds_shape)].view(each.ds_shape)
                for piece, each in zip(pieces, parameters, strict=True)
            ]

    def refresh(self) -> None:
        if self._num_ranks == 1:
            for each in self._parameters:
                # On the device it is the part itself, which the optimizer writes: once set, it stays so.
                part = each.ds_tensor.data.to(self._device)
                if each.ds_status != ZeroParamStatus.AVAILABLE or each.data_ptr() != part.data_ptr():
                    self._set(each, part.view(-1)[: math.prod(each.ds_shape)].view(each.ds_shape))
            return
        own = torch.cat([each.ds_tensor.data.view(-1).to(self._device) for each in self._parameters])
        everything = torch.empty(self._num_ranks * self._total, dtype=own.dtype, device=self._device)
        dist.all_gather_into_tensor(everything, own, group=self._process_group)
        arrived = everything.view(self._num_ranks, -1).split(self._sizes, dim=1)
        torch._foreach_copy_(self._parts, list(arrived))
        for each, value in zip(self._parameters, self._values, strict=True):
            self._set(each, value)

    @staticmethod
    def _set(parameter: Any, value: torch.Tensor) -> None:
        parameter.data = value
        parameter.ds_status = ZeroParamStatus.AVAILABLE
