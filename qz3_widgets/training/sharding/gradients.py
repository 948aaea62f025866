"""The adapter's gradients, reduced in a few collectives after the backward.

DeepSpeed takes each gradient when it is there: a hook, a copy into a bucket, a copy out of it, a norm, for hundreds of
small tensors in every step. Parameters that are whole on all ranks (:mod:`.resident`) need none of that. They keep
their gradients until the backward is over; then these are put side by side, reduced, and written where DeepSpeed
expects this rank's part, with the arithmetic that DeepSpeed would have done. Its optimizer goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

PIECE_ELEMENTS = 20_000_000
"""Of whole gradients that are reduced at once: what lies beside them meanwhile."""

NORM_ELEMENTS = 2**22
"""Norms are summed in fp64, of so many elements at a time."""


class ResidentGradients:
    """The gradients of trained parameters that are whole on every rank, of one ZeRO-3 optimizer."""

    def __init__(self, optimizer: Any, parameters: Sequence[Any]) -> None:
        """``parameters``: in any order, the same ones on all ranks, of one process group and dtype."""
        self._optimizer = optimizer
        self._process_group = parameters[0].ds_process_group
        self._num_ranks = dist.get_world_size(self._process_group)
        wanted = {id(each) for each in parameters}
        self._pieces: list[_Piece] = []
        offset = 0
        for each in _grouped(optimizer):
            size = each.partition_numel()
            if id(each) in wanted:
                self._append(each, offset, size)
            offset += size

    def _append(self, parameter: Any, offset: int, size: int) -> None:
        last = self._pieces[-1] if self._pieces else None
        if last is None or last.end != offset or (last.end - last.begin + size) * self._num_ranks > PIECE_ELEMENTS:
            last = _Piece(offset, offset, [], [])
            self._pieces.append(last)
        last.parameters.append(parameter)
        last.sizes.append(size)
        last.end = offset + size

    @torch.no_grad()
    def reduce(self) -> None:
        """Average what the ranks have and keep this rank's part; the whole gradients are gone then. Collective.

        As with DeepSpeed's own, a step's first micro-batch replaces what was there and the others are added, and a
        parameter that got no gradient counts as one of zeros.
        """
        optimizer = self._optimizer
        for piece in self._pieces:
            dtype = optimizer.get_param_comm_dtype(piece.parameters[0])
            whole = torch.cat([self._rows(*each, dtype) for each in piece.each()], dim=1)
            for parameter in piece.parameters:
                parameter.grad = None
            whole.div_(self._num_ranks)
            own = whole[0]
            if self._num_ranks > 1:
                own = torch.empty(whole.shape[1], dtype=dtype, device=whole.device)
                dist.reduce_scatter_tensor(own, whole.view(-1), group=self._process_group)
            part = optimizer.grad_partitions_flat_buffer[piece.begin : piece.end]
            if optimizer.micro_step_id == 0:
                part.copy_(own)
            else:
                part.add_(own.to(part.dtype))

    def _rows(self, parameter: Any, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The gradient, a row a rank, with zeros behind the last where sizes do not divide."""
        gradient = parameter.grad
        if gradient is None:
            return torch.zeros(self._num_ranks, size, dtype=dtype, device=parameter.device)
        flat = gradient.reshape(-1).to(dtype)
        missing = self._num_ranks * size - flat.numel()
        return (pad(flat, (0, missing)) if missing else flat).view(self._num_ranks, size)


@dataclass
class _Piece:
    """Parameters whose parts lie side by side in DeepSpeed's buffer of gradients."""

    begin: int
    end: int
    parameters: list[Any]
    sizes: list[int]  # of a part, in elements

    def each(self) -> Iterator[tuple[Any, int]]:
        return zip(self.parameters, self.sizes, strict=True)


def reduce_together(optimizer: Any, parameters: Sequence[Any]) -> bool:
    """Take the gradients of ``parameters`` out of DeepSpeed's hooks: those of leaf modules that are whole on all ranks.

    Returns:
        Whether it was done. It is not where the optimizer's state is on the CPU, or something else is asked of
        DeepSpeed that happens while gradients are reduced, or its insides are not those that are known.
    """
    kinds = {(each.ds_process_group, each.dtype) for each in parameters}
    if len(kinds) != 1 or not _is_known(optimizer):
        return False
    ours = {id(each) for each in parameters}
    if not ours <= {id(each) for inside in optimizer.leaf_parameters.values() for each in inside}:
        return False  # one of them has a hook of its own
    # DeepSpeed's hooks hold these very lists.
    for handle, (module, inside) in zip(
        list(optimizer._leaf_module_hooks), list(optimizer.leaf_parameters.items()), strict=True
    ):
        inside[:] = [each for each in inside if id(each) not in ours]
        if not inside:
            handle.remove()
            optimizer._leaf_module_hooks.remove(handle)
            del optimizer.leaf_parameters[module]
    if not optimizer.leaf_parameters and not optimizer._grad_acc_hooks:
        for bucket in optimizer.ipg_buckets.values():
            bucket.buffer = None  # nothing comes into it any more
    gradients = ResidentGradients(optimizer, parameters)
    their_epilogue = optimizer.independent_gradient_partition_epilogue

    def epilogue() -> None:
        gradients.reduce()
        their_epilogue()
        _join_parts(optimizer)

    optimizer.independent_gradient_partition_epilogue = epilogue
    return True


def _join_parts(optimizer: Any) -> None:
    """Have the norm of a step's gradients taken of a few large parts; DeepSpeed would go by parameters."""
    offset = 0
    for number, group in enumerate(optimizer.fp16_groups):
        size = sum(each.partition_numel() for each in group)
        part = optimizer.grad_partitions_flat_buffer[offset : offset + size]
        # Not more parts than parameters: DeepSpeed walks along both.
        optimizer.averaged_gradients[number] = list(part.split(max(NORM_ELEMENTS, -(-size // len(group)))))
        offset += size


def _grouped(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.fp16_groups:
        yield from group


_PLAIN = {
    "offload_optimizer": False, "zenflow": False, "use_muon": False, "all2all_process_group": None,
    "gradient_predivide_factor": 1.0, "sequence_parallel_size": 1, "autoep_folding_tp_group": None,
}  # fmt: skip


def _is_known(optimizer: Any) -> bool:
    if any(getattr(optimizer, name, plain) != plain for name, plain in _PLAIN.items()):
        return False
    try:
        hooks, leaves = optimizer._leaf_module_hooks, optimizer.leaf_parameters
        buffer, groups = optimizer.grad_partitions_flat_buffer, list(_grouped(optimizer))
        callables = (optimizer.independent_gradient_partition_epilogue, optimizer.get_param_comm_dtype)
        is_counted = isinstance(optimizer.micro_step_id, int) and isinstance(optimizer.averaged_gradients, dict)
        optimizer._grad_acc_hooks, optimizer.ipg_buckets  # noqa: B018 - whether they are there
    except AttributeError:
        return False
    return (
        is_counted
        and len(hooks) == len(leaves)
        and all(map(callable, callables))
        and all(each.requires_grad for each in groups)
        and buffer.numel() == sum(each.partition_numel() for each in groups)
    )
