"""Parts side by side, gathered at once and read one by one, against parameters cut by hand; real ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from qz3_widgets.training.sharding import flat, resident
from qz3_widgets.training.sharding.flat import FlatShard
from qz3_widgets.training.sharding.partition import padded, part_of
from qz3_widgets.training.sharding.resident import ResidentParameters

CPU = torch.device("cpu")


class Ranks:
    """Collectives of some ranks, each a thread."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.local = threading.local()
        self.barrier = threading.Barrier(num_ranks, timeout=30)
        self.sent: list[torch.Tensor | None] = [None] * num_ranks

    def get_world_size(self, group: object = None) -> int:
        return self.num_ranks

    def all_gather_into_tensor(
        self, whole: torch.Tensor, own: torch.Tensor, group: object = None, async_op: bool = False
    ) -> Any:
        self.sent[self.local.rank] = own
        self.barrier.wait()
        whole.copy_(torch.cat([each for each in self.sent if each is not None]))
        self.barrier.wait()
        return SimpleNamespace(wait=lambda: None)

    def run(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                work(rank)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


@pytest.fixture(params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    made = Ranks(request.param)
    for module in (flat, resident):
        monkeypatch.setattr(
            module,
            "dist",
            SimpleNamespace(
                get_world_size=made.get_world_size,
                all_gather_into_tensor=made.all_gather_into_tensor,
                ProcessGroup=dist.ProcessGroup,
            ),
        )
    return made


class Parameter:
    """What is used of a parameter that DeepSpeed has partitioned."""

    def __init__(self, values: torch.Tensor, num_ranks: int, rank: int, *, trained: bool = False) -> None:
        part = part_of(values.numel(), num_ranks, rank)
        self.ds_tensor = padded(values.view(-1)[part.begin : part.end].clone(), part.size)
        self.ds_shape = values.shape
        self.ds_process_group = "all"
        self.ds_status = ZeroParamStatus.NOT_AVAILABLE
        self.requires_grad = trained
        self.data = torch.empty(0, dtype=values.dtype)

    def partition(self) -> None:
        self.data, self.ds_status = torch.empty(0), ZeroParamStatus.NOT_AVAILABLE


def some_values(*dtypes: torch.dtype) -> list[torch.Tensor]:
    # The ranks are threads, and torch's own generator is shared by them.
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (64, 1), (3,), (1,)]
    return [
        torch.randint(0, 100, shape, generator=generator).to(dtypes[place % len(dtypes)])
        for place, shape in enumerate(shapes)
    ]  # whole numbers: exact in every dtype


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.uint8, torch.float32)])
def test_what_is_read_is_what_was_cut(ranks: Ranks, dtypes: tuple[torch.dtype, ...]) -> None:
    def work(rank: int) -> None:
        values = some_values(*dtypes)
        parameters = [Parameter(each, ranks.num_ranks, rank) for each in values]
        before = [each.ds_tensor.clone() for each in parameters]
        shard = FlatShard(parameters, CPU)
        for _ in range(2):
            shard.gather() if not shard.is_always_whole else None
            shard.wait()
            for parameter, expected in zip(parameters, values, strict=True):
                found = shard.view(parameter).read()
                assert found.dtype == expected.dtype
                assert found.is_contiguous()
                assert torch.equal(found, expected)
            shard.release()
        for parameter, part in zip(parameters, before, strict=True):
            assert torch.equal(parameter.ds_tensor, part)  # the parts are where DeepSpeed looks for them
        assert len({parameter.ds_tensor.untyped_storage().data_ptr() for parameter in parameters}) == 1

    ranks.run(work)


def test_what_is_not_gathered_cant_be_read(ranks: Ranks) -> None:
    def work(rank: int) -> None:
        parameters = [Parameter(each, ranks.num_ranks, rank) for each in some_values(torch.bfloat16)]
        shard = FlatShard(parameters, CPU)
        if shard.is_always_whole:
            assert shard.whole_bytes == 0
            assert shard.view(parameters[0]).is_fixed
            return
        with pytest.raises(RuntimeError, match="used while it was partitioned"):
            shard.view(parameters[0]).read()

    ranks.run(work)


def test_residents_follow_the_optimizer(ranks: Ranks) -> None:
    """What the optimizer writes into the parts is what all ranks have after the next gathering."""

    def work(rank: int) -> None:
        values = some_values(torch.float32)
        parameters = [Parameter(each, ranks.num_ranks, rank, trained=True) for each in values]
        kept = ResidentParameters(parameters, CPU)
        for parameter, expected in zip(parameters, values, strict=True):
            assert torch.equal(parameter.data, expected)
        kept.partition()
        assert all(parameter.data.numel() == 0 for parameter in parameters)
        for parameter in parameters:
            parameter.ds_tensor.mul_(2)
        kept.all_gather([kept])
        for parameter, expected in zip(parameters, values, strict=True):
            assert parameter.ds_status == ZeroParamStatus.AVAILABLE
            assert torch.equal(parameter.data, 2 * expected)

    ranks.run(work)
