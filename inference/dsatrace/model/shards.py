"""Safetensors files as bytes: read a header, lay out a new file, fill it piece by piece.

Knows the container (8-byte little-endian header length, JSON header, raw data) and no
tensor names. Nothing is mapped or loaded, so memory stays at what the caller holds.

    stored = read_header(Path("model-00001-of-00163.safetensors"))["lm_head.weight"]
    stored.dtype, stored.shape      # "BF16", (129280, 7168)
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The container's type names and torch's."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""A file's tensors: name to (container type, shape)."""

_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or loaded; one line naming file, tensor and remedy."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `num_bytes` from byte `begin` of `path`, row-major."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this container type and shape."""
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    return size


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in file order; a damaged or short file raises `CheckpointError`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_HEADER_LENGTH.size)
            length = _HEADER_LENGTH.unpack(prefix)[0] if len(prefix) == _HEADER_LENGTH.size else None
            if length is None or _HEADER_LENGTH.size + length > size:
                raise CheckpointError(f"{path}: truncated at {size} bytes, inside its header; fetch it again")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file (a header of {length} bytes)")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        base = _HEADER_LENGTH.size + length
        tensors = {name: _stored(name, path, base, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: {error}") from error
    end = max((tensor.begin + tensor.num_bytes for tensor in tensors.values()), default=base)
    if end > size:
        raise CheckpointError(f"{path}: truncated: holds {size} bytes of {end}; fetch it again")
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def _stored(name: str, path: Path, base: int, entry: dict[str, object]) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"unknown element type {dtype!r}")
    assert isinstance(dtype, str)
    if not (isinstance(shape, list) and isinstance(offsets, list)):
        raise TypeError("a header entry without shape or data_offsets")
    begin, end = offsets
    if end - begin != num_bytes(dtype, tuple(shape)) or begin < 0:
        raise ValueError(f"{end - begin} bytes for a {dtype} tensor of shape {shape}")
    return StoredTensor(name, path, dtype, tuple(shape), base + begin, end - begin)


def read_tensor(stored: StoredTensor, rows: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor, or some of its rows, by reads of its own bytes; `CheckpointError` names it and its file."""
    row_bytes = stored.num_bytes // stored.shape[0] if rows is not None else stored.num_bytes
    begins = [stored.begin] if rows is None else [stored.begin + row * row_bytes for row in rows]
    buffer = torch.empty(len(begins) * row_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with stored.path.open("rb", buffering=0) as file:
            for i, begin in enumerate(begins):
                if not _read_at(file.fileno(), begin, view[i * row_bytes : (i + 1) * row_bytes]):
                    raise CheckpointError(
                        f"{stored.path}: ends within {stored.name}: it was cut short; fetch it again"
                    )
    except OSError as error:
        raise CheckpointError(f"{stored.path}: cannot read {stored.name}: {error.strerror}") from error
    shape = stored.shape if rows is None else (len(rows), *stored.shape[1:])
    return buffer.view(DTYPES[stored.dtype]).view(shape)


def _read_at(fd: int, offset: int, target: memoryview) -> bool:
    """Whether the file holds all that `target` wants, from byte `offset` on."""
    while target:  # one read takes at most 2 GiB
        count = os.preadv(fd, [target], offset)
        if count == 0:
            return False
        target, offset = target[count:], offset + count
    return True


class ShardWriter:
    """One new safetensors file, laid out whole before its data comes, in any order and any pieces.

    Writing raises `OSError`; leaving the context syncs the file to disk and asserts that
    every byte was written.
    """

    def __init__(self, path: Path, tensors: Layout) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        offset = 0
        # Widest elements first, as the format asks, so that each tensor is aligned.
        for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
            dtype, shape = tensors[name]
            end = offset + num_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            self._begins[name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = _HEADER_LENGTH.size + len(text)
        self._num_missing_bytes = offset
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.truncate(self._fd, self._base + offset)
            self._write_at(0, memoryview(_HEADER_LENGTH.pack(len(text)) + text))
        except OSError:
            os.close(self._fd)
            raise

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Puts a tensor, or a part of one, row-major at byte `offset` of the tensor laid out as `name`."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._write_at(self._base + self._begins[name] + offset, data)
        self._num_missing_bytes -= len(data)

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:  # one pwrite takes at most 2 GiB, and may take less
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count

    def close(self, sync: bool = True) -> None:
        try:
            if sync:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(sync=kind is None)  # an interrupted file is thrown away
        assert kind is not None or self._num_missing_bytes == 0, "a tensor was not written"
