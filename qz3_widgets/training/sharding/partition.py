"""Giving DeepSpeed parameters that are partitioned already: its arithmetic, and its own conversion of one parameter.

DeepSpeed cuts a parameter's flattened storage elements into equal parts, one a rank, the last ones padded
(``_partition_param`` in ``deepspeed/runtime/zero/partition_parameters.py``). The engine takes what carries
``ds_id`` as it is, so a parameter can be partitioned the moment it exists, long before ``deepspeed.initialize``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus


@dataclass(frozen=True)
class Part:
    """One rank's part of ``num_elements`` storage elements: ``[begin, end)``, and ``size`` with its padding."""

    begin: int
    end: int
    size: int


def part_of(num_elements: int, num_ranks: int, rank: int) -> Part:
    """The part of ``rank`` in DeepSpeed's partition."""
    size = -(-num_elements // num_ranks)
    return Part(min(rank * size, num_elements), min((rank + 1) * size, num_elements), size)


def padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """``values`` with zeros behind them up to ``size`` elements; 1-D."""
    if values.numel() == size:
        return values
    out = torch.zeros(size, dtype=values.dtype, device=values.device)
    out[: values.numel()] = values
    return out


class Partitioner:
    """Turns single parameters into ZeRO-3 parameters, in the process group of all ranks."""

    def __init__(self, deepspeed_config: dict[str, Any]) -> None:
        """``deepspeed_config`` is the run's own; what in it is still ``auto`` takes DeepSpeed's default.

        Communication must be up (``deepspeed.init_distributed``).
        """
        config = _without_auto(copy.deepcopy(deepspeed_config))
        # Batch sizes have nothing to do with partitioning, but DeepSpeed wants them consistent.
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            config.pop(name, None)
        config["train_micro_batch_size_per_gpu"] = 1
        # Only made, never entered: entering would patch torch's module constructors.
        self._init = deepspeed.zero.Init(config_dict_or_path=config, enabled=True)
        self.num_ranks: int = self._init.dp_world_size
        self.rank: int = self._init.rank
        self.group = self._init.ds_process_group

    @property
    def device(self) -> torch.device:
        """Where gathered parameters live."""
        return torch.device(self._init.local_device)

    def partition(self, parameter: Any) -> None:
        """Keep only this rank's part of a parameter that is whole."""
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    def adopt(self, parameter: Any, part: torch.Tensor) -> None:
        """Make ``part`` this rank's part of a parameter whose values nobody has: see :func:`hollow`.

        Args:
            parameter: has the whole shape and no memory.
            part: this rank's elements, 1-D and padded to the size of a part.

        Raises:
            ValueError: ``part`` has another size or dtype than DeepSpeed's partition of the parameter.
        """
        self._init._convert_to_deepspeed_param(parameter)
        size = part_of(parameter.ds_numel, self.num_ranks, self.rank).size
        if part.numel() != size or part.dtype != parameter.dtype:
            raise ValueError(
                f"a part of {part.numel()} {part.dtype} elements does not fit a parameter of "
                f"{size} {parameter.dtype} elements on each rank"
            )
        tensor: Any = self._placed(parameter, part)
        tensor.requires_grad = False
        tensor.ds_numel = size
        tensor.status = PartitionedParamStatus.AVAILABLE
        tensor.final_location = None
        parameter.ds_tensor = tensor
        parameter.ds_numel_aligned = size * self.num_ranks
        parameter.partition()  # the part is there already: this frees the hollow storage and sets the status

    def _placed(self, parameter: Any, part: torch.Tensor) -> torch.Tensor:
        """``part`` where DeepSpeed would have put it: offloaded ones on the host, pinned if the run says so."""
        device = self._init.local_device if parameter.ds_persist else self._init.remote_device
        offloaded = device == OffloadDeviceEnum.cpu
        placed = part.to("cpu" if offloaded else torch.device(device))
        if offloaded and self._init.pin_memory:
            placed = get_accelerator().pin_memory(placed)
        return placed


def hollow(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the whole shape over one element of memory, for :meth:`Partitioner.adopt`."""
    return (
        torch.empty(1, dtype=dtype, device=device).expand(tuple(shape))
        if math.prod(shape)
        else torch.empty(tuple(shape), dtype=dtype, device=device)
    )


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed holds the parameter in parts."""
    return hasattr(parameter, "ds_id")


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != "auto"
    }
