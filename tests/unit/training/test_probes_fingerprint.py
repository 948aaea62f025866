"""The checksum: the same however the bytes are spread, another one whenever a byte changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qz3_widgets.training.probes.census import Weight
from qz3_widgets.training.probes.fingerprint import MODULUS, fingerprints, totals
from qz3_widgets.training.sharding.partition import padded, part_of

DTYPES = (torch.uint8, torch.bfloat16, torch.float32)


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return raw.view(dtype)


def whole(data: torch.Tensor, name: str = "w.weight") -> Weight:
    return Weight(name, nn.Parameter(data, requires_grad=False), nn.Linear(1, 1))


def partitioned(data: torch.Tensor, num_ranks: int, rank: int, padding: int, name: str = "w.weight") -> Weight:
    """As DeepSpeed holds it: the parameter empty, its part beside it, the padding anything."""
    part = part_of(data.numel(), num_ranks, rank)
    parameter = nn.Parameter(torch.empty(0, dtype=data.dtype), requires_grad=False)
    stored = padded(data[part.begin : part.end], part.size).clone()
    stored.view(torch.uint8)[(part.end - part.begin) * data.element_size() :] = padding
    parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 0, data.numel(), data.shape
    parameter.ds_tensor = stored
    return Weight(name, parameter, nn.Linear(1, 1))


def total(weights: list[Weight], num_ranks: int = 1) -> int:
    """Over all ranks: parts are added, what is whole counts once."""
    prints = [fingerprints([weight], num_ranks=num_ranks, rank=rank) for rank, weight in enumerate(weights)]
    sums = [totals(each.values()) for each in prints]
    return (sum(parts for parts, _ in sums) + sums[0][1]) % MODULUS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 1000, 2**16 + 13])
def test_it_does_not_depend_on_the_number_of_ranks(count: int, num_ranks: int, dtype: torch.dtype) -> None:
    data = values(count, dtype)
    weights = [partitioned(data, num_ranks, rank, padding=rank + 77) for rank in range(num_ranks)]
    assert total(weights, num_ranks) == total([whole(data)])


def test_every_changed_byte_and_place_counts() -> None:
    data = values(70_000, torch.bfloat16)
    before = total([whole(data)])
    for place in (0, 1, 65_535, 65_536, 139_999):
        changed = data.clone()
        changed.view(torch.uint8)[place] ^= 1
        assert total([whole(changed)]) != before
    swapped = data.clone()
    swapped[[3, 66_000]] = data[[66_000, 3]]
    assert total([whole(swapped)]) != before
    assert total([whole(data, "other.weight")]) != before


def test_not_a_number_is_a_pattern_like_any_other() -> None:
    """Packed nibbles hold them; nothing may canonicalize them."""
    quiet, other = torch.tensor([0x7FC0], dtype=torch.int16), torch.tensor([0x7FC1], dtype=torch.int16)
    assert total([whole(quiet.view(torch.bfloat16))]) != total([whole(other.view(torch.bfloat16))])


def test_statistics_count_the_same_in_the_state_and_as_a_parameter() -> None:
    """Stock loading has them in the quantization state, sharded loading in a parameter of the storage dtype, padded."""
    import bitsandbytes as bnb

    from qz3_widgets.training.sharding.linear import let_go, take_off_statistics

    torch.manual_seed(0)
    plain = nn.Linear(96, 70, bias=False)
    sums = []
    for take_off in (False, True):
        layer = bnb.nn.Linear4bit(96, 70, bias=False, quant_storage=torch.bfloat16)
        layer.load_state_dict(plain.state_dict())
        layer = layer.to("cpu")
        if take_off:
            take_off_statistics(let_go(layer))
        weights = [Weight(f"l.{name}", parameter, layer) for name, parameter in layer.named_parameters()]
        assert len(weights) == 1 + take_off
        found = fingerprints(weights, num_ranks=1, rank=0)
        assert {"l.weight", "l.weight.absmax", "l.weight.nested_absmax"} == set(found)
        sums.append({name: entry.value for name, entry in found.items()})
    assert sums[0] == sums[1]
