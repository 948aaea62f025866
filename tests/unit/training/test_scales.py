"""The statistics that the ranks keep apart, put together: the bytes of bitsandbytes' quantization of the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
import torch.distributed as dist

from qz3_widgets.training.sharding.linear import as_storage_elements
from qz3_widgets.training.sharding.quantize import Recipe, quantize_slice
from qz3_widgets.training.sharding.scales import Settled, Unsettled, settle_scales

SHAPES = [(64, 64), (24, 56), (1, 8), (264, 128), (5, 8)]

pytestmark = pytest.mark.usefixtures("one_thread")


class World:
    """Ranks as threads of this process, with collectives between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.num_bytes = 0  # that went from a rank to another
        self._here = threading.local()
        self._barrier = threading.Barrier(num_ranks, timeout=20)
        self._slots: list[Any] = [None] * num_ranks
        monkeypatch.setattr(dist, "all_to_all_single", self._all_to_all)
        monkeypatch.setattr(dist, "all_gather_into_tensor", self._all_gather)
        monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")

    def _meet(self, value: Any) -> list[Any]:
        self._barrier.wait()
        self._slots[self._here.rank] = value
        self._barrier.wait()
        return list(self._slots)

    def _all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, received: list[int], sent: list[int], group: Any
    ) -> None:
        assert sum(sent) == source.numel() > 0  # torch refuses to receive for nothing
        pieces = [other[self._here.rank] for other in self._meet(source.split(sent))]
        assert [piece.numel() for piece in pieces] == received
        output.copy_(torch.cat(pieces))
        self.num_bytes += output.numel() - received[self._here.rank]

    def _all_gather(self, output: torch.Tensor, own: torch.Tensor, group: Any = None) -> None:
        output.copy_(torch.cat(self._meet(own)))

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns."""
        results: list[Any] = [None] * self.num_ranks

        def be(rank: int) -> None:
            self._here.rank = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(result is not None for result in results), "a rank has failed"
        return results


def weights_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Noise with a row of zeros and an outlier, where scales are 0 or large."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    values[0], values[-1, -1] = 0, 30
    return values.to(dtype)


def settle(world: World, recipe: Recipe, weights: list[torch.Tensor]) -> list[list[Settled]]:
    def work(rank: int) -> list[Settled]:
        unsettled = []
        for weight in weights:
            flat = weight.reshape(-1)
            _, own, counts = quantize_slice(
                lambda begin, end, flat=flat: flat[begin:end],  # type: ignore[misc]
                flat.numel(),
                recipe,
                num_ranks=world.num_ranks,
                rank=rank,
            )
            unsettled.append(Unsettled(own, counts, weight.shape, weight.dtype, recipe))
        return settle_scales(unsettled, num_ranks=world.num_ranks, rank=rank)

    return world.run(work)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_parts_are_the_bytes_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, nested: bool, storage: torch.dtype, quant_type: str
) -> None:
    recipe = Recipe(64, quant_type, nested, storage)
    weights = [weights_of(shape, torch.bfloat16) for shape in SHAPES]
    results = settle(World(monkeypatch, num_ranks), recipe, weights)
    for index, weight in enumerate(weights):
        _, wanted = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=quant_type)
        whole = as_storage_elements(wanted.absmax, storage).view(torch.uint8)
        parts = torch.cat([results[rank][index].part.view(torch.uint8) for rank in range(num_ranks)])
        assert torch.equal(parts[: whole.numel()], whole)
        assert not parts[whole.numel() :].any()
        assert len({results[rank][index].part.numel() for rank in range(num_ranks)}) == 1
        for rank in range(num_ranks):
            state = results[rank][index].state
            assert state.absmax is None
            assert (state.shape, state.dtype, state.blocksize) == (wanted.shape, wanted.dtype, wanted.blocksize)
            assert (state.quant_type, state.nested) == (wanted.quant_type, wanted.nested)
            assert torch.equal(state.code, wanted.code)
            if nested:
                assert torch.equal(state.offset, wanted.offset)
                assert torch.equal(state.state2.absmax, wanted.state2.absmax)
                assert torch.equal(state.state2.code, wanted.state2.code)
                assert (state.state2.blocksize, state.state2.dtype) == (wanted.state2.blocksize, wanted.state2.dtype)


def test_weights_of_different_dtypes_settle_together(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(64, "nf4", True, torch.uint8)
    weights = [weights_of((64, 64), torch.float32) * 1.0001, weights_of((24, 56), torch.bfloat16)]
    results = settle(World(monkeypatch, 2), recipe, weights)
    for index, weight in enumerate(weights):
        _, wanted = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        parts = torch.cat([results[rank][index].part for rank in range(2)])
        assert torch.equal(parts[: wanted.absmax.numel()], wanted.absmax)


def test_little_goes_over_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 4)
    weights = [weights_of((64, 4096), torch.bfloat16) for _ in range(8)]
    settle(world, Recipe(64, "nf4", True, torch.uint8), weights)
    num_scales = sum(weight.numel() // 64 for weight in weights)
    # Two bytes of each scale to its owner, one byte to its keeper; an exchange among all would take 2 * 3 bytes.
    assert world.num_bytes <= 3 * num_scales + 64


def test_nothing_to_settle() -> None:
    assert settle_scales([], num_ranks=2, rank=0) == []


def test_more_ranks_than_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights_of((64, 64), torch.bfloat16)
    results = settle(World(monkeypatch, 4), Recipe(64, "nf4", True, torch.uint8), [weight])
    _, wanted = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(torch.cat([results[rank][0].part for rank in range(4)])[: wanted.absmax.numel()], wanted.absmax)
