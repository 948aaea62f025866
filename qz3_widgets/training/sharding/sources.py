"""Checkpoint tensors that are not read until somebody needs a part of them.

A :class:`Source` has a shape and a dtype, and reads any stretch of its flattened elements. transformers' loader
takes it for a tensor: what the loader does by indexing, ``to``, stacking, concatenating and transposing gives a new
source, and anything else reads the whole. So a rank reads from the file only the elements that end up in its shard.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Source:
    """A tensor to be. Subclasses say how a stretch of its elements is read."""

    def __init__(self, shape: Sequence[int], stored: torch.dtype) -> None:
        """``stored`` is the dtype in the file; :meth:`to` may ask for another, and for a device."""
        self.shape = torch.Size(shape)
        self.stored = stored
        self.wanted: torch.dtype | None = None
        self.target: torch.device | None = None

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """Elements ``[begin, end)`` of the flattened tensor: 1-D, on the CPU, in the stored dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is read")

    def read(self, begin: int, end: int) -> torch.Tensor:
        """The same in the wanted dtype, on the wanted device."""
        values = self.read_stored(begin, end)
        dtype = self.dtype if values.is_floating_point() else values.dtype
        return values.to(device=self.target, dtype=dtype)

    def whole(self) -> torch.Tensor:
        """All of it, in its shape."""
        return self.read(0, self.numel()).view(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What :meth:`read` gives."""
        return self.wanted if self.wanted is not None and self.stored.is_floating_point else self.stored

    @property
    def device(self) -> torch.device:
        """Where :meth:`read` puts it."""
        return self.target or torch.device("cpu")

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        """Whether the values are floating point."""
        return self.stored.is_floating_point

    def get_shape(self) -> list[int]:
        """The shape, as a safetensors slice tells it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The stored dtype's name, as a safetensors slice tells it."""
        return _NAMES[self.stored]

    def to(self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **_: Any) -> Source:
        """The same source, to be read to another device or dtype."""
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        again = self._copy()
        again.wanted = dtype or self.wanted
        again.target = torch.device(device) if device is not None else self.target
        return again

    def contiguous(self) -> Source:
        """What is read is contiguous."""
        return self

    @property
    def T(self) -> Source:  # noqa: N802 - torch's name
        """The transpose of a matrix."""
        return Transposed(self)

    def _copy(self) -> Source:
        again = object.__new__(type(self))
        again.__dict__.update(self.__dict__)
        return again

    def _like(self, other: Source) -> Source:
        self.wanted, self.target = other.wanted, other.target
        return self

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.whole()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stay unread through the operations of weight conversion; read the whole for any other."""
        kwargs = dict(kwargs or {})
        lazy = _LAZY.get(function)
        if lazy is not None:
            made = lazy(*args, **kwargs)
            if made is not None:
                return made
        return function(*_read_all(args), **{name: _read_all(value) for name, value in kwargs.items()})


class FileTensor(Source):
    """A tensor of a safetensors file. All bytes that this process has read are counted in ``bytes_read``."""

    bytes_read = 0

    def __init__(self, path: Path, offset: int, shape: Sequence[int], stored: torch.dtype) -> None:
        """``offset`` is where its first byte lies in the file."""
        super().__init__(shape, stored)
        self.path = path
        self.offset = offset

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """One read of the file."""
        values = torch.empty(max(0, end - begin), dtype=self.stored)
        if values.numel():
            with open(self.path, "rb", buffering=0) as file:
                self._fill(file.fileno(), values, begin)
        return values

    def read(self, begin: int, end: int) -> torch.Tensor:
        """To a GPU through page-locked memory, a piece being copied while the next one is read."""
        if self.target is None or self.target.type != "cuda":
            return super().read(begin, end)
        values = torch.empty(max(0, end - begin), dtype=self.stored, device=self.target)
        if values.numel():
            staging = _Staging.on(self.target)
            raw = values.view(torch.uint8)
            with open(self.path, "rb", buffering=0) as file:
                position = self.offset + begin * self.stored.itemsize
                for first in range(0, raw.numel(), _Staging.SIZE):
                    piece = raw[first : first + _Staging.SIZE]
                    staging.copy(piece, partial(self._fill_from, file.fileno(), position + first))
        dtype = self.dtype if values.is_floating_point() else values.dtype
        return values.to(dtype)

    def read_block(self, rows: range, columns: range) -> torch.Tensor:
        """Rows and columns of a matrix: one read for each row."""
        width = self.shape[1]
        values = torch.empty(len(rows), len(columns), dtype=self.stored)
        with open(self.path, "rb", buffering=0) as file:
            for number, row in enumerate(rows):
                self._fill(file.fileno(), values[number], row * width + columns.start)
        return values

    def _fill(self, descriptor: int, values: torch.Tensor, begin: int) -> None:
        view = values.view(torch.uint8).numpy().data.cast("B")
        self._fill_from(descriptor, self.offset + begin * self.stored.itemsize, view)

    def _fill_from(self, descriptor: int, position: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            num_bytes = os.preadv(descriptor, [view[done:]], position + done)
            if num_bytes == 0:
                raise ValueError(f"{self.path} ends before the tensor that its header promises; copy it anew")
            done += num_bytes
        FileTensor.bytes_read += done


class _Staging:
    """Two pieces of page-locked memory between files and one GPU, used in turn."""

    SIZE = 2**24
    _of_device: dict[torch.device, _Staging] = {}  # noqa: RUF012 - one for each device

    def __init__(self) -> None:
        self._buffers = [torch.empty(self.SIZE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    @classmethod
    def on(cls, device: torch.device) -> _Staging:
        if device not in cls._of_device:
            cls._of_device[device] = cls()
        return cls._of_device[device]

    @classmethod
    def free(cls) -> None:
        """Give the memory back, once loading is over."""
        cls._of_device.clear()

    def copy(self, piece: torch.Tensor, fill: Callable[[memoryview], None]) -> None:
        """Let ``fill`` write the bytes, and copy them to ``piece`` on the GPU."""
        number, self._next = self._next, 1 - self._next
        before = self._copied[number]
        if before is not None:
            before.synchronize()
        buffer = self._buffers[number][: piece.numel()]
        fill(buffer.numpy().data.cast("B"))
        piece.copy_(buffer, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(piece.device))
        self._copied[number] = event


def free_staging() -> None:
    """Give back the page-locked memory that reads went through."""
    _Staging.free()


class Concatenated(Source):
    """Several sources side by side along one dimension."""

    def __init__(self, parts: Sequence[Source], dim: int) -> None:
        """All parts have the same shape but for ``dim``."""
        first = parts[0]
        shape = list(first.shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        super().__init__(shape, first.stored)
        self._like(first)
        self.parts = list(parts)
        inner = math.prod(shape[dim + 1 :])
        self.widths = [part.shape[dim] * inner for part in parts]

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """A read of each part that the stretch touches, once for each block of the outer dimensions."""
        period = sum(self.widths)
        pieces = []
        for block in range(begin // period, -(-end // period)) if end > begin else ():
            start = block * period
            for part, width in zip(self.parts, self.widths, strict=True):
                low, high = max(begin, start), min(end, start + width)
                if high > low:
                    pieces.append(part.read_stored(block * width + low - start, block * width + high - start))
                start += width
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=self.stored)


class Reshaped(Source):
    """The same elements in the same order under another shape."""

    def __init__(self, base: Source, shape: Sequence[int]) -> None:
        """``shape`` has as many elements as ``base``."""
        super().__init__(shape, base.stored)
        self._like(base)
        self.base = base

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """The base's elements."""
        return self.base.read_stored(begin, end)


class Transposed(Source):
    """A matrix with rows and columns exchanged."""

    def __init__(self, base: Source) -> None:
        """``base`` has two dimensions."""
        if len(base.shape) != 2:
            raise ValueError(f"only a matrix is transposed, not a tensor of shape {tuple(base.shape)}")
        super().__init__(tuple(reversed(base.shape)), base.stored)
        self._like(base)
        self.base = base

    def read_stored(self, begin: int, end: int) -> torch.Tensor:
        """The columns of the base that the stretch touches."""
        if end <= begin:
            return torch.empty(0, dtype=self.stored)
        width = self.shape[1]
        first, last = begin // width, -(-end // width)
        columns, rows = range(first, last), range(width)
        if isinstance(self.base, FileTensor):
            block = self.base.read_block(rows, columns)
        else:
            block = self.base.read_stored(0, self.numel()).view(self.base.shape)[:, first:last]
        return block.T.reshape(-1)[begin - first * width : end - first * width].clone()


def open_checkpoint(folder: Path) -> dict[str, Source] | None:
    """The tensors of a folder's safetensors checkpoint by name; ``None`` if it has none.

    Raises:
        ValueError: the index can't be read or names a file that is missing, or a file's header can't be read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = _files_of(index)
    elif single.is_file():
        files = [single]
    else:
        return None
    tensors: dict[str, Source] = {}
    for file in files:
        tensors.update(_open_file(file))
    return tensors


def _files_of(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({index.parent / name for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.name_or_path: {index} can't be read as an index: {error!r}") from error


def _open_file(file: Path) -> dict[str, Source]:
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            # What is no safetensors file can promise a header that no memory holds.
            if length > file.stat().st_size - 8:
                raise ValueError(f"its header has {length} bytes, more than the file")
            header = json.loads(opened.read(length))
        return {
            name: FileTensor(file, 8 + length + entry["data_offsets"][0], entry["shape"], DTYPES[entry["dtype"]])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"model.name_or_path: {file} can't be read as safetensors: {error!r}") from error


def _read_all(value: Any) -> Any:
    if isinstance(value, Source):
        return value.whole()
    if isinstance(value, list | tuple):
        return type(value)(_read_all(item) for item in value)
    return value


def _cat(tensors: Any, dim: int = 0, **options: Any) -> Source | None:
    parts = list(tensors)
    if options or not parts or not all(isinstance(part, Source) for part in parts):
        return None
    return Concatenated(parts, dim % len(parts[0].shape))


def _stack(tensors: Any, dim: int = 0, **options: Any) -> Source | None:
    parts = list(tensors)
    if options or dim != 0 or not parts or not all(isinstance(part, Source) for part in parts):
        return None
    return Concatenated([Reshaped(part, (1, *part.shape)) for part in parts], 0)


_LAZY: dict[Callable[..., Any], Callable[..., Source | None]] = {
    torch.cat: _cat,
    torch.concat: _cat,
    torch.stack: _stack,
}
