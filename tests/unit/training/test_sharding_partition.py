"""DeepSpeed's partition arithmetic, and what a part must look like to be taken."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qz3_widgets.training.sharding.partition import Part, Partitioner, hollow, is_partitioned, padded, part_of


def test_parts_cover_everything_once() -> None:
    for num_elements in (0, 1, 2, 5, 12, 13, 1000):
        for num_ranks in (1, 2, 3, 4, 8):
            parts = [part_of(num_elements, num_ranks, rank) for rank in range(num_ranks)]
            assert {part.size for part in parts} == {-(-num_elements // num_ranks)}
            assert parts[0].begin == 0
            assert parts[-1].end == num_elements
            for before, after in itertools.pairwise(parts):
                assert before.end == after.begin
            assert all(part.end - part.begin <= part.size for part in parts)


def test_the_last_ranks_may_have_nothing() -> None:
    assert [part_of(5, 4, rank) for rank in range(4)] == [Part(0, 2, 2), Part(2, 4, 2), Part(4, 5, 2), Part(5, 5, 2)]


def test_padding_is_zeros() -> None:
    assert padded(torch.tensor([1, 2]), 4).tolist() == [1, 2, 0, 0]
    values = torch.tensor([1, 2])
    assert padded(values, 2) is values
    assert padded(torch.empty(0, dtype=torch.bfloat16), 3).tolist() == [0.0] * 3


def test_a_hollow_tensor_has_a_shape_and_no_memory() -> None:
    whole = hollow((1000, 1000), torch.bfloat16, torch.device("cpu"))
    assert whole.shape == (1000, 1000)
    assert whole.dtype == torch.bfloat16
    assert whole.untyped_storage().nbytes() == 2
    assert hollow((0, 3), torch.uint8, torch.device("cpu")).shape == (0, 3)


class FakeInit:
    """What of ``deepspeed.zero.Init`` the partitioner uses."""

    ds_process_group = None
    local_device = "cpu"
    pin_memory = False

    def __init__(self, num_ranks: int, rank: int, remote_device: str = "cpu") -> None:
        self.dp_world_size, self.rank, self.remote_device = num_ranks, rank, remote_device

    def _convert_to_deepspeed_param(self, parameter: Any) -> None:
        parameter.ds_id, parameter.ds_numel, parameter.ds_persist = 0, parameter.numel(), False
        parameter.partition = lambda: setattr(parameter, "data", torch.empty(0, dtype=parameter.dtype))


def partitioner(monkeypatch: pytest.MonkeyPatch, num_ranks: int, rank: int) -> tuple[Partitioner, list[Any]]:
    given: list[Any] = []

    def init(*, config_dict_or_path: Any, enabled: bool) -> FakeInit:
        given.append(config_dict_or_path)
        return FakeInit(num_ranks, rank)

    zero = SimpleNamespace(Init=init)
    monkeypatch.setattr("qz3_widgets.training.sharding.partition.deepspeed", SimpleNamespace(zero=zero))
    config = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "none"}},
    }
    made = Partitioner(config)
    assert config["train_batch_size"] == "auto"  # the run's own is left as it was
    return made, given


def test_what_is_still_auto_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = partitioner(monkeypatch, 2, 1)
    assert given == [
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}},
        }
    ]
    assert (made.num_ranks, made.rank, made.device) == (2, 1, torch.device("cpu"))


def test_a_part_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = partitioner(monkeypatch, 2, 1)
    parameter: Any = torch.nn.Parameter(hollow((5, 3), torch.bfloat16, made.device), requires_grad=False)
    assert not is_partitioned(parameter)
    part = torch.arange(8, dtype=torch.bfloat16)
    made.adopt(parameter, part)
    assert is_partitioned(parameter)
    assert torch.equal(parameter.ds_tensor, part)
    assert parameter.ds_tensor.ds_numel == 8
    assert parameter.ds_numel_aligned == 16
    assert parameter.numel() == 0


@pytest.mark.parametrize("part", [torch.zeros(7, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.float16)])
def test_a_part_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, part: torch.Tensor) -> None:
    made, _ = partitioner(monkeypatch, 2, 1)
    parameter = torch.nn.Parameter(hollow((5, 3), torch.bfloat16, made.device), requires_grad=False)
    with pytest.raises(ValueError, match=r"does not fit a parameter of 8 torch.bfloat16 elements on each rank"):
        made.adopt(parameter, part)
