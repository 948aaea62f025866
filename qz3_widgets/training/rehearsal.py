"""Being one rank of many on one device: collectives that do nothing, and data that nobody has to have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from datasets import Dataset
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero import utils as checks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..config.schema import RunConfig
from .session import RankIdentity


def connect_alone(identity: RankIdentity) -> None:
    """Make the default process group one whose collectives return at once, with whatever their buffers held."""
    os.environ.update(RANK=str(identity.rank), WORLD_SIZE=str(identity.world_size), LOCAL_WORLD_SIZE="1")
    # DeepSpeed compares some counts with rank 0's, which nobody sends: what this rank has is what rank 0 would have.
    checks.get_lst_from_rank0 = list
    checks.assert_lst_len_same_as_other_ranks = lambda lst: None
    # Nor may a step be thrown away, with the optimizer's state that it would have made, because a norm of values that
    # nobody computed is no number.
    stage3.is_invalid_grad_norm = lambda norm: False
    stage3.DeepSpeedZeroOptimizer_Stage3.check_overflow = lambda self, *args, **kwargs: None
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=identity.rank, world_size=identity.world_size)
    # The fake group writes into views, which autograd refuses where what is gathered requires a gradient (the loss of
    # a router); real ones write past it.
    torch.distributed.all_gather_into_tensor = torch.no_grad()(torch.distributed.all_gather_into_tensor)


def random_examples(config: RunConfig, vocab_size: int) -> Dataset:
    """Token sequences of full length, enough for every step: what they say has no influence on memory."""
    training = config.training
    # Data-parallel samplers deal the examples out to all ranks, the absent ones too; a few more than needed cost
    # nothing.
    world_size = torch.distributed.get_world_size()
    count = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    count *= (training.max_steps or 1) + 1
    generator = torch.Generator().manual_seed(training.seed)
    tokens = torch.randint(0, vocab_size, (count, config.data.max_length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def computes() -> bool:
    """Whether the run computes: only a rehearsal can do without; see ``make_rehearsal``."""
    return os.environ.get("QZ3_REHEARSAL_ARITHMETIC", "1") != "0"


def take_the_loss_as_on_a_gpu() -> None:
    """Give the fused loss the memory on a CPU that its kernels take on a GPU: none beside the tile of logits.

    TRL's stand-ins for these kernels make ten copies of a tile in fp32, and outweigh the rest of a step by far.
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    chunked_logprob._forward_tile = chunked_logprob._backward_tile = lambda *args, **kwargs: None
    chunked_logprob._addmm_fp32 = lambda *args: None
    utils._use_triton = lambda device: True  # only tokens that count are scored; the kernels themselves stay away


class WithoutArithmetic(TorchDispatchMode):
    """Operators on large floating-point tensors give memory of the right size and unknown content.

    What memory a step takes does not depend on what is computed, and the computing is nearly all of its time. What
    changes a tensor in place leaves it as it is; views, small tensors, integers, communication, and whatever has a
    shape that depends on values, run as always.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for every operator."""
        kwargs = kwargs or {}
        stand_in = _stand_ins().get(func)
        if stand_in is not None:
            return stand_in(*args, **kwargs)
        if func.namespace == "c10d" and "gather" in func.name():
            # The fake collective copies this rank's part to everybody's place: one element of each will do.
            args = (_beginning(args[0], torch.distributed.get_world_size()), _beginning(args[1], 1), *args[2:])
        if _is_skipped(func, args, kwargs):
            target = kwargs.get("out", args[0] if func._schema.is_mutable else None)
            if target is not None:
                return target
            try:
                shapes = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
            except (NotImplementedError, RuntimeError):  # its shape depends on values
                return func(*args, **kwargs)
            device = kwargs.get("device") or next(each.device for each in tree_leaves(args) if _is_tensor(each))
            return tree_map(partial(_allocated, device=device), shapes)
        return func(*args, **kwargs)


_LARGE = 2**16  # elements


def _is_skipped(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if func.namespace != "aten" or func in _KEPT:
        return False
    schema = func._schema
    if any(each.alias_info is not None and not each.alias_info.is_write for each in schema.arguments):
        return False  # a view
    if schema.is_mutable and "out" not in kwargs:
        written = schema.arguments[0].alias_info
        if written is None or not args or not _is_tensor(args[0]):
            return False  # it writes somewhere else, or several
    tensors = [each for each in tree_leaves((args, kwargs)) if _is_tensor(each)]
    floating = [each.numel() for each in tensors if each.is_floating_point()]
    return max(floating, default=0) >= _LARGE and not any(each.is_meta for each in tensors)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _beginning(tensor: Any, count: int) -> Any:
    whole = _is_tensor(tensor) and tensor.is_contiguous() and tensor.numel() > count
    return tensor.view(-1)[:count] if whole else tensor


def _meta(value: Any) -> Any:
    if _is_tensor(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _allocated(value: Any, device: torch.device) -> Any:
    if _is_tensor(value):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        # Whole numbers are places that something is taken from (experts, of the largest scores): 0 is always there.
        return made if value.is_floating_point() else made.zero_()
    return value


def _attention(query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Strided as the kernel's own result: [batch, tokens, heads, width] under the names of the inputs.
    batch, heads, tokens, width = query.shape
    output = query.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return output, query.new_empty((batch, tokens, heads), dtype=torch.float32).transpose(1, 2)


def _attention_backward(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _dequantized(
    packed: torch.Tensor, _absmax: Any, _blocksize: int, _quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _quantized(
    weights: torch.Tensor, blocksize: int, _quant_type: str, storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = weights.new_empty((-(-weights.numel() // 2) // storage.itemsize, 1), dtype=storage)
    return packed, weights.new_zeros(-(-weights.numel() // blocksize), dtype=torch.float32)


def _product_4bit(
    inputs: torch.Tensor, _packed: Any, shape: Sequence[int], _absmax: Any, blocksize: int, *_: Any, **__: Any
) -> torch.Tensor:
    # As the fallback of all devices: scales in fp32, the weight in the inputs' dtype, then the product.
    scales = inputs.new_empty(-(-math.prod(shape) // blocksize), dtype=torch.float32)
    weight = inputs.new_empty(tuple(shape))
    product = inputs.new_empty((*inputs.shape[:-1], shape[0]))
    del scales, weight
    return product


@cache
def _stand_ins() -> dict[Any, Callable[..., Any]]:
    """Operators that have no meta form, or whose kernels take memory inside."""
    import bitsandbytes  # noqa: F401 - registers its operators

    aten, bnb = torch.ops.aten, torch.ops.bitsandbytes
    return {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
        bnb.dequantize_4bit.default: _dequantized,
        bnb.gemm_4bit.default: _product_4bit,
        bnb.quantize_4bit.default: _quantized,
    }


_KEPT = frozenset(
    {
        torch.ops.aten.set_.source_Tensor,
        torch.ops.aten.resize_.default,
        torch.ops.aten.record_stream.default,
        torch.ops.aten._unsafe_view.default,  # a view that does not say so
    }
)
