"""Unread tensors: any stretch of them is what torch would have there, and no byte is read in vain."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qz3_widgets.training.sharding.sources import (
    Concatenated,
    FileTensor,
    Reshaped,
    Source,
    Transposed,
    open_checkpoint,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(6, 10).to(torch.bfloat16),
        "b": torch.randn(6, 10).to(torch.bfloat16),
        "tall": torch.randn(9, 10).to(torch.bfloat16),
        "wide": torch.randn(6, 4).to(torch.bfloat16),
        "fp32": torch.randn(7, 3),
        "vector": torch.randn(11).to(torch.float16),
        "deep": torch.randn(3, 4, 5),
        "packed": torch.randint(0, 256, (20, 1), dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }


@pytest.fixture
def sources(tensors: dict[str, torch.Tensor], tmp_path: Path) -> dict[str, Source]:
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert opened is not None
    return opened


def num_bytes_read(read: Callable[[], object]) -> int:
    before = FileTensor.bytes_read
    read()
    return FileTensor.bytes_read - before


def assert_same(source: Source, expected: torch.Tensor) -> None:
    """Shape, dtype, the whole, and random stretches."""
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype
    assert (source.ndim, source.dim(), source.numel()) == (expected.ndim, expected.dim(), expected.numel())
    assert source.size() == expected.size()
    assert torch.equal(source.whole(), expected)
    flat, rng = expected.reshape(-1), random.Random(0)
    ends = [(0, 0), (0, flat.numel()), (flat.numel(), flat.numel())]
    ends += [tuple(sorted(rng.choices(range(flat.numel() + 1), k=2))) for _ in range(40)]  # type: ignore[misc]
    for begin, end in ends:
        found = source.read(begin, end)
        assert found.shape == (end - begin,)
        assert torch.equal(found, flat[begin:end]), (begin, end)


def test_a_tensor_of_a_file(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    assert sources.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert_same(sources[name], expected)
        assert sources[name].get_shape() == list(expected.shape)
        assert sources[name].is_floating_point() == expected.is_floating_point()
    assert sources["a"].get_dtype() == "BF16"


def test_bytes_are_counted_and_none_is_read_in_vain(sources: dict[str, Source]) -> None:
    assert num_bytes_read(lambda: sources["a"].read(7, 20)) == 13 * 2
    assert num_bytes_read(lambda: sources["fp32"].read(0, 21)) == 21 * 4
    assert num_bytes_read(lambda: sources["a"].read(5, 5)) == 0
    joined = torch.cat([sources["a"], sources["wide"]], dim=1)  # type: ignore[list-item]
    assert num_bytes_read(lambda: joined.read(8, 16)) == 8 * 2
    # Three columns of six rows.
    assert num_bytes_read(lambda: sources["a"].T.read(6, 24)) == 18 * 2
    # Whole columns, though only some of each are asked for.
    assert num_bytes_read(lambda: sources["a"].T.read(11, 13)) == 12 * 2


def test_describing_and_converting_read_nothing(sources: dict[str, Source]) -> None:
    def use() -> None:
        source = sources["a"].to(device="cpu", dtype=torch.float32).contiguous()[...]
        assert (source.shape, source.dtype, source.device) == ((6, 10), torch.float32, torch.device("cpu"))
        stacked: Any = torch.stack([source, source])
        assert stacked.shape == (2, 6, 10)
        assert torch.cat([stacked, stacked], dim=-2).shape == (2, 12, 10)

    assert num_bytes_read(use) == 0


@pytest.mark.parametrize(
    "names, dim",
    [(("a", "b"), 0), (("a", "b"), 1), (("a", "tall"), 0), (("a", "wide"), 1), (("a", "wide"), -1), (("a",), 0)],
)
def test_concatenated(
    sources: dict[str, Source], tensors: dict[str, torch.Tensor], names: tuple[str, ...], dim: int
) -> None:
    found: Any = torch.cat([sources[name] for name in names], dim=dim)  # type: ignore[misc]
    assert isinstance(found, Concatenated)
    assert_same(found, torch.cat([tensors[name] for name in names], dim=dim))


def test_concatenated_in_the_middle(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    found: Any = torch.cat([sources["deep"], sources["deep"]], 1)  # type: ignore[list-item]
    assert isinstance(found, Concatenated)
    assert_same(found, torch.cat([tensors["deep"], tensors["deep"]], 1))


def test_stacked_and_joined_as_experts_are(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    """Mixtral's: experts stacked, then gate and up side by side."""
    pairs = [torch.stack([sources[name], sources[name]]) for name in ("a", "b")]  # type: ignore[list-item]
    found: Any = torch.cat(pairs, dim=1)
    assert isinstance(found, Concatenated)
    assert_same(found, torch.cat([torch.stack([tensors[name]] * 2) for name in ("a", "b")], dim=1))


def test_stacked_elsewhere_is_read(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    found = torch.stack([sources["a"], sources["b"]], dim=1)  # type: ignore[list-item]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.stack([tensors["a"], tensors["b"]], dim=1))


def test_transposed(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    assert_same(sources["tall"].T, tensors["tall"].T)
    assert_same(sources["tall"].T.T, tensors["tall"])
    joined: Any = torch.cat([sources["a"], sources["tall"]])  # type: ignore[list-item]
    assert_same(joined.T, torch.cat([tensors["a"], tensors["tall"]]).T)
    with pytest.raises(ValueError, match=r"only a matrix is transposed, not a tensor of shape \(3, 4, 5\)"):
        Transposed(sources["deep"])


def test_reshaped(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    assert_same(Reshaped(sources["deep"], (12, 5)), tensors["deep"].reshape(12, 5))


def test_another_dtype_is_given_to_floats_alone(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    assert_same(sources["fp32"].to(torch.bfloat16), tensors["fp32"].to(torch.bfloat16))
    assert_same(sources["packed"].to(torch.bfloat16), tensors["packed"])
    assert_same(sources["a"].to("cpu", torch.float32).T, tensors["a"].float().T)
    assert sources["fp32"].dtype == torch.float32  # the first one is as it was


def test_whatever_else_reads_the_whole(sources: dict[str, Source], tensors: dict[str, torch.Tensor]) -> None:
    assert torch.equal(sources["a"][1:3, ::2], tensors["a"][1:3, ::2])
    assert torch.equal(torch.mul(sources["a"], 2), tensors["a"] * 2)  # type: ignore[call-overload]
    assert torch.equal(sources["a"].float(), tensors["a"].float())
    parts = sources["a"].chunk(2, dim=0)
    assert torch.equal(parts[1], tensors["a"][3:])
    assert sources["scalar"].item() == 3


def split(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """A checkpoint in two files with an index; returns tensor name to file name."""
    names = sorted(tensors)
    files = {"model-1-of-2.safetensors": names[:4], "model-2-of-2.safetensors": names[4:]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_checkpoint_in_several_files(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    split(tensors, tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened is not None
    assert opened.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(opened[name].whole(), expected)


def test_no_safetensors_no_sources(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    assert open_checkpoint(tmp_path) is None


def test_a_missing_file_of_the_index(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    split(tensors, tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^model.name_or_path: .*model-2-of-2.safetensors can't be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": "../other.safetensors"}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"^model.name_or_path: .*can't be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"not safetensors at all, but text of some length",
        (2**62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b'{"a": ',
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"a": {"b":1}',
        (57).to_bytes(8, "little") + b'{"a":{"dtype":"XYZ","shape":[1],"data_offsets":[0,1]}}   ' + b"\0",
    ],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"^model.name_or_path: .*model.safetensors can't be read as safetensors"):
        open_checkpoint(tmp_path)


def test_a_file_that_was_cut_off(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As after a full disk: the header is whole, the last tensors are not."""
    file = tmp_path / "model.safetensors"
    save_file({"a": tensors["a"]}, file)
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors ends before the tensor that its header promises"):
        (open_checkpoint(tmp_path) or {})["a"].whole()
