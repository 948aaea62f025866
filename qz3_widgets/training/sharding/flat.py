"""A rank's parts of several parameters in one piece of memory: gathered in one collective, without a copy.

DeepSpeed gathers a list of parameters by copying each one's part into a buffer, and each one's parts out of what
arrives. Parts that lie side by side for good need neither: what arrives is used where it is, one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

ALIGNMENT = 256
"""Bytes, where parameters are read in place: what torch's allocators give at least, and kernels may rely on."""

PART_ALIGNMENT = 16
"""Bytes, where parts are put together in memory of their own: enough for a view in any dtype."""


class FlatShard:
    """One rank's parts of partitioned parameters, and, while they are gathered, the whole of them.

    The parameters stay DeepSpeed's: each one's ``ds_tensor`` becomes a view of its place here.
    """

    def __init__(self, parameters: Sequence[Any], device: torch.device) -> None:
        """Move the parts of ``parameters``, which are partitioned over one group; gathered on ``device``."""
        self._group = parameters[0].ds_process_group
        self._num_ranks = dist.get_world_size(self._group)
        self._device = device
        dtypes = {parameter.ds_tensor.dtype for parameter in parameters}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
        sizes = [parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in parameters]
        alignment = ALIGNMENT if self._num_ranks == 1 else PART_ALIGNMENT
        rounded = [-(-size // alignment) * alignment for size in sizes]
        beginnings = [sum(rounded[:place]) for place in range(len(rounded))]
        width = self._dtype.itemsize
        first = parameters[0].ds_tensor
        self._shard = torch.zeros(
            sum(rounded) // width, dtype=self._dtype, device=first.device, pin_memory=first.is_pinned()
        )
        self._views: dict[int, View] = {}
        for parameter, begin, size in zip(parameters, beginnings, sizes, strict=True):
            part = self._shard[begin // width : (begin + size) // width]
            part.view(parameter.ds_tensor.dtype).copy_(parameter.ds_tensor)
            parameter.ds_tensor.data = part.view(parameter.ds_tensor.dtype)
            self._views[id(parameter)] = View(self, parameter, begin // width, size // width)
        self.whole: torch.Tensor | None = None
        self._work: Any = None
        if self.is_always_whole:
            self.whole = self._shard

    @property
    def is_always_whole(self) -> bool:
        """Whether this rank's parts are all there is, and are where they are used."""
        return self._num_ranks == 1 and self._shard.device.type == self._device.type

    @property
    def num_ranks(self) -> int:
        """Number of parts."""
        return self._num_ranks

    @property
    def whole_bytes(self) -> int:
        """What is taken while the parameters are gathered."""
        return 0 if self.is_always_whole else self._num_ranks * self._shard.numel() * self._dtype.itemsize

    def view(self, parameter: Any) -> View:
        """Where ``parameter`` is read."""
        return self._views[id(parameter)]

    def gather(self) -> None:
        """Begin to gather; collective. The memory is taken now, in the order of the current stream."""
        shard = self._shard.to(self._device, non_blocking=True)
        if self._num_ranks == 1:
            self.whole = shard
            return
        self.whole = torch.empty(self._num_ranks * shard.numel(), dtype=self._dtype, device=self._device)
        self._work = dist.all_gather_into_tensor(self.whole, shard, group=self._group, async_op=True)

    def wait(self) -> None:
        """Have what follows come after the gathering: on a GPU in its stream, on a CPU by waiting."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def release(self) -> None:
        """Let go of what was gathered."""
        if not self.is_always_whole:
            self.wait()
            self.whole = None


class View:
    """A parameter's place in a :class:`FlatShard`."""

    __slots__ = ("_begin", "_dtype", "_num_elements", "_shape", "_shard", "_size")

    def __init__(self, shard: FlatShard, parameter: Any, begin: int, size: int) -> None:
        """``begin`` and ``size``: of one rank's part, in elements of the shard's dtype."""
        self._shard = shard
        self._begin, self._size = begin, size
        self._dtype = parameter.ds_tensor.dtype
        self._shape = tuple(parameter.ds_shape)
        self._num_elements = math.prod(self._shape)

    @property
    def is_fixed(self) -> bool:
        """Whether every reading gives the same memory."""
        return self._shard.is_always_whole

    def read(self) -> torch.Tensor:
        """The whole parameter, in its shape: of several parts a contiguous copy, whose memory is the reader's.

        Raises:
            RuntimeError: it is not gathered.
        """
        whole = self._shard.whole
        if whole is None:
            raise RuntimeError(
                "a weight was used while it was partitioned: its layer ran outside of its decoder layer's forward and "
                "backward"
            )
        parts = whole.view(self._shard.num_ranks, -1)[:, self._begin : self._begin + self._size]
        # Not reshape(): it would give parts of one element each as a view with gaps.
        return parts.contiguous().view(-1).view(self._dtype)[: self._num_elements].view(self._shape)
