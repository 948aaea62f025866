"""Gradients that are reduced together: what DeepSpeed's buffer holds afterwards, and when it is left to DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qz3_widgets.training.sharding import gradients
from qz3_widgets.training.sharding.gradients import reduce_together


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def parameter(group: Any, *shape: int) -> Any:
    made: Any = nn.Parameter(torch.zeros(*shape))
    made.ds_process_group = group
    made.partition_numel = lambda: made.numel()
    return made


class Optimizer(SimpleNamespace):
    """What of ZeRO-3's optimizer is touched."""

    def __init__(self, groups: list[list[Any]], leaves: list[list[Any]]) -> None:
        modules = [nn.Identity() for _ in leaves]
        self.removed: list[int] = []
        size = sum(each.numel() for members in groups for each in members)
        super().__init__(
            fp16_groups=groups,
            leaf_parameters=dict(zip(modules, leaves, strict=True)),
            _leaf_module_hooks=[
                SimpleNamespace(remove=lambda number=number: self.removed.append(number))
                for number in range(len(leaves))
            ],
            _grad_acc_hooks=[],
            ipg_buckets={torch.float32: SimpleNamespace(buffer=torch.zeros(4))},
            grad_partitions_flat_buffer=torch.full((size,), 7.0),
            averaged_gradients={},
            micro_step_id=0,
            epilogues=0,
        )

    def get_param_comm_dtype(self, parameter: Any) -> torch.dtype:
        return torch.float32

    def independent_gradient_partition_epilogue(self) -> None:
        self.epilogues += 1


def test_gradients_end_where_deepspeed_looks_for_them(group: Any) -> None:
    first, second, other = parameter(group, 2, 3), parameter(group, 4), parameter(group, 2)
    optimizer = Optimizer([[first, other], [second]], [[first], [second]])
    assert reduce_together(optimizer, [second, first])
    assert optimizer.removed == [0, 1]
    assert (optimizer.leaf_parameters, optimizer._leaf_module_hooks) == ({}, [])
    assert optimizer.ipg_buckets[torch.float32].buffer is None
    first.grad, second.grad = torch.arange(6.0).view(2, 3), torch.ones(4)
    optimizer.independent_gradient_partition_epilogue()
    assert (first.grad, second.grad) == (None, None)
    expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 7.0, 1.0, 1.0, 1.0, 1.0]  # 7: of the one that is not ours
    assert optimizer.grad_partitions_flat_buffer.tolist() == expected
    assert optimizer.epilogues == 1
    joined = [torch.cat(optimizer.averaged_gradients[number]).tolist() for number in (0, 1)]
    assert joined == [expected[:8], expected[8:]]


def test_micro_batches_are_added_and_a_missing_gradient_is_zero(group: Any) -> None:
    one = parameter(group, 3)
    optimizer = Optimizer([[one]], [[one]])
    assert reduce_together(optimizer, [one])
    for step, gradient in enumerate([torch.ones(3), torch.full((3,), 2.0), None]):
        optimizer.micro_step_id, one.grad = step, gradient
        optimizer.independent_gradient_partition_epilogue()
    assert optimizer.grad_partitions_flat_buffer.tolist() == [3.0, 3.0, 3.0]
    optimizer.micro_step_id, one.grad = 0, None
    optimizer.independent_gradient_partition_epilogue()
    assert optimizer.grad_partitions_flat_buffer.tolist() == [0.0, 0.0, 0.0]


def test_pieces_are_bounded(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "PIECE_ELEMENTS", 8)
    several = [parameter(group, 4) for _ in range(5)]
    optimizer = Optimizer([several], [list(several)])
    assert reduce_together(optimizer, several)
    for number, each in enumerate(several):
        each.grad = torch.full((4,), float(number))
    optimizer.independent_gradient_partition_epilogue()
    assert optimizer.grad_partitions_flat_buffer.tolist() == [float(number) for number in range(5) for _ in range(4)]


def test_norms_are_taken_of_no_more_parts_than_parameters(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "NORM_ELEMENTS", 2)
    several = [parameter(group, 5) for _ in range(3)]
    optimizer = Optimizer([several], [list(several)])
    assert reduce_together(optimizer, several)
    optimizer.independent_gradient_partition_epilogue()
    assert [len(part) for part in optimizer.averaged_gradients[0]] == [5, 5, 5]


@pytest.mark.parametrize(
    "changes",
    [
        {"offload_optimizer": True},
        {"gradient_predivide_factor": 2.0},
        {"all2all_process_group": "a group"},
        {"_leaf_module_hooks": []},
        {"grad_partitions_flat_buffer": torch.zeros(1)},
        {"micro_step_id": None},
    ],
)
def test_what_is_not_known_is_left_to_deepspeed(group: Any, changes: dict[str, Any]) -> None:
    one = parameter(group, 3)
    optimizer = Optimizer([[one]], [[one]])
    for name, value in changes.items():
        setattr(optimizer, name, value)
    assert not reduce_together(optimizer, [one])
    assert list(optimizer.leaf_parameters.values()) == [[one]]
    assert optimizer.removed == []


def test_a_parameter_with_a_hook_of_its_own_is_left_to_deepspeed(group: Any) -> None:
    inside, outside = parameter(group, 3), parameter(group, 3)
    optimizer = Optimizer([[inside, outside]], [[inside]])
    assert not reduce_together(optimizer, [inside, outside])
    assert list(optimizer.leaf_parameters.values()) == [[inside]]
