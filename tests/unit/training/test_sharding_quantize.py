"""What the ranks quantize apart, put together: the bytes of bitsandbytes' own quantization of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch

from qz3_widgets.training.sharding import quantize
from qz3_widgets.training.sharding.quantize import Recipe, exchange_scales, make_state, quantize_slice

STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
# Whole blocks; blocks cut by the parts; less than a block; no weights for the last ranks; many nested blocks.
SHAPES = [(64, 64), (24, 56), (5, 8), (1, 8), (264, 128)]

pytestmark = pytest.mark.usefixtures("one_thread")


class Ranks:
    """All ranks of a collective in this one process: the first round writes down what each sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.rank = 0
        self.sent: dict[int, torch.Tensor] = {}
        self.calls = 0
        monkeypatch.setattr(quantize.dist, "all_gather_into_tensor", self._gather)

    def _gather(self, output: torch.Tensor, own: torch.Tensor, group: Any = None) -> None:
        self.calls += 1
        self.sent[self.rank] = own.clone()
        assert output.numel() == own.numel() * self.num_ranks
        if len(self.sent) == self.num_ranks:
            output.copy_(torch.cat([self.sent[rank] for rank in range(self.num_ranks)]))

    def exchange(
        self, scales: Sequence[Sequence[torch.Tensor]], counts: Sequence[Sequence[int]]
    ) -> list[list[torch.Tensor]]:
        """Of each rank the scales of all weights -> of each rank what it knows afterwards."""
        for _ in range(2):
            known = []
            for rank, own in enumerate(scales):
                self.rank = rank
                known.append(exchange_scales(own, counts))
        return known


def weights_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Noise with a row of zeros and an outlier, where scales are 0 or large."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values[0] = 0.0
    values[-1, -1] = 50.0
    return values.to(dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes: floats would take two NaNs for different, and 0 and -0 for the same."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_state(found: functional.QuantState, expected: functional.QuantState) -> None:
    assert torch.equal(raw(found.absmax), raw(expected.absmax))
    assert found.absmax.dtype == expected.absmax.dtype
    assert torch.equal(raw(found.code), raw(expected.code))
    assert found.nested == expected.nested
    if expected.nested:
        assert torch.equal(raw(found.offset), raw(expected.offset))
        assert torch.equal(raw(found.state2.absmax), raw(expected.state2.absmax))
        assert torch.equal(raw(found.state2.code), raw(expected.state2.code))
        assert found.state2.blocksize == expected.state2.blocksize
    for name in ("shape", "dtype", "blocksize", "quant_type"):
        assert getattr(found, name) == getattr(expected, name), name


def shards(
    weight: torch.Tensor, recipe: Recipe, num_ranks: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Every rank's part and scales."""
    flat = weight.reshape(-1)
    parts, scales, all_counts = [], [], []
    for rank in range(num_ranks):
        part, own, counts = quantize_slice(
            lambda begin, end: flat[begin:end], flat.numel(), recipe, num_ranks=num_ranks, rank=rank
        )
        parts.append(part)
        scales.append(own)
        all_counts.append(counts)
    assert all(counts == all_counts[0] for counts in all_counts)
    assert [own.numel() for own in scales] == all_counts[0]
    return parts, scales, all_counts[0]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_parts_are_the_bytes_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, quant_type: str, nested: bool, storage: torch.dtype
) -> None:
    ranks = Ranks(monkeypatch, num_ranks)
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = weights_of(shape, dtype, seed=number)
            recipe = Recipe(64, quant_type, nested, storage)
            whole, state = functional.quantize_4bit(
                weight, blocksize=64, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
            )
            parts, scales, counts = shards(weight, recipe, num_ranks)
            assert {part.dtype for part in parts} == {storage}
            assert len({part.numel() for part in parts}) == 1
            together = torch.cat([raw(part) for part in parts])
            num_bytes = whole.numel() * storage.itemsize
            assert torch.equal(together[:num_bytes], raw(whole)), (shape, dtype)
            assert not together[num_bytes:].any()  # the padding is zeros
            ranks.sent.clear()
            for known in ranks.exchange([[own] for own in scales], [counts]):
                assert_same_state(make_state(known[0], shape, dtype, recipe), state)


@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_other_block_sizes(monkeypatch: pytest.MonkeyPatch, blocksize: int) -> None:
    weight = weights_of((40, 72), torch.bfloat16)
    recipe = Recipe(blocksize, "nf4", True, torch.bfloat16)
    whole, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
    )
    parts, scales, counts = shards(weight, recipe, 3)
    assert torch.equal(torch.cat([raw(part) for part in parts])[: whole.numel() * 2], raw(whole))
    [known, *_] = Ranks(monkeypatch, 3).exchange([[own] for own in scales], [counts])
    assert_same_state(make_state(known[0], weight.shape, weight.dtype, recipe), state)


def test_an_odd_number_of_weights_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 x 13 weights fill 32 bytes and a half."""
    weight = weights_of((5, 13), torch.float32)
    for num_ranks in (1, 2, 3, 4):
        recipe = Recipe(64, "nf4", False, torch.uint8)
        whole, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", quant_storage=torch.uint8)
        parts, scales, counts = shards(weight, recipe, num_ranks)
        assert torch.equal(torch.cat([raw(part) for part in parts])[:33], raw(whole))
        known = Ranks(monkeypatch, num_ranks).exchange([[own] for own in scales], [counts])
        assert_same_state(make_state(known[-1][0], weight.shape, weight.dtype, recipe), state)


def test_several_weights_share_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3)
    recipe = Recipe(64, "nf4", True, torch.bfloat16)
    weights = [weights_of(shape, torch.bfloat16, seed) for seed, shape in enumerate(SHAPES)]
    pieces = [shards(weight, recipe, 3) for weight in weights]
    known = ranks.exchange([[piece[1][rank] for piece in pieces] for rank in range(3)], [piece[2] for piece in pieces])
    assert ranks.calls == 2 * 3  # two rounds of three ranks
    for rank in range(3):
        for weight, absmax in zip(weights, known[rank], strict=True):
            _, state = functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16
            )
            assert_same_state(make_state(absmax, weight.shape, weight.dtype, recipe), state)


def test_a_rank_reads_its_part_and_no_more_than_a_block_beside_it() -> None:
    weight = weights_of((100, 100), torch.bfloat16)
    flat, read = weight.reshape(-1), []

    def reading(begin: int, end: int) -> torch.Tensor:
        read.append((begin, end))
        return flat[begin:end]

    recipe = Recipe(64, "nf4", True, torch.bfloat16)
    for rank in range(3):
        quantize_slice(reading, flat.numel(), recipe, num_ranks=3, rank=rank)
    assert len(read) == 3
    assert read[0][0] == 0
    assert read[-1][1] == flat.numel()
    for begin, end in read:
        assert begin % 64 == 0
        assert end - begin <= flat.numel() / 3 + 4 + 2 * 64


def test_one_rank_needs_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 1)
    scales = [torch.ones(3), torch.ones(2)]
    assert [absmax.tolist() for absmax in exchange_scales(scales, [[3], [2]])] == [[1.0] * 3, [1.0] * 2]
    assert ranks.calls == 0


@pytest.mark.parametrize("storage", STORAGE[1:])
def test_a_shape_that_does_not_fill_its_storage_is_refused(storage: torch.dtype) -> None:
    recipe = Recipe(64, "nf4", True, storage)
    with pytest.raises(ValueError, match=r"^quantization.bnb_4bit_quant_storage: 65 weights pack into 33 bytes.*uint8"):
        quantize_slice(lambda begin, end: torch.zeros(end - begin), 5 * 13, recipe, num_ranks=2, rank=0)
