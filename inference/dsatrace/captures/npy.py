"""Arrays in `.npy`, `.npz` and `.safetensors` files: (rows, layers, k) whole numbers, a request each.

Only the header is parsed; ids are read a few rows at a time, and nothing is ever unpickled.

    capture = open_arrays(Path("ids.npy"), Description(prompt_tokens=100), taken=set())
"""

from __future__ import annotations

import io
import json
import math
import tokenize
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dsatrace.captures.description import Description
from dsatrace.captures.rows import (
    ArrayCapture,
    ArrayRows,
    Base64Bytes,
    CapturedRequest,
    FileBytes,
    Source,
    opened,
    request_name,
)
from dsatrace.errors import UserError

_NO_HEADER = (ValueError, EOFError, SyntaxError, TypeError, LookupError, RecursionError, tokenize.TokenError)
"""What numpy raises for a damaged header, which it reads as Python's text."""
_HEADER_BYTES = 1 << 16
_MOST_HEADER_BYTES = 100 << 20
_SAFETENSORS = {"I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}


def open_arrays(path: Path, described: Description, taken: set[str]) -> ArrayCapture:
    """The arrays of a file, told by its first bytes."""
    with opened(path) as file:
        magic = file.read(8)
    if magic.startswith(b"\x93NUMPY"):
        found = [(path.stem, npy_rows(FileBytes(path, 0)))]
    elif magic.startswith(b"PK"):
        found = list(_of_npz(path))
    elif path.suffix == ".safetensors":
        found = list(_of_safetensors(path, int.from_bytes(magic, "little")))
    else:
        raise UserError(f"{path}: neither .npy, .npz nor .safetensors; name another --format")
    requests = []
    for name, rows in found:
        requests.append(array_request(name, f"{path}: {name}", rows.num_rows, described, taken))
    return ArrayCapture(requests, [rows for _, rows in found])


def array_request(
    name: str,
    place: str,
    num_rows: int,
    described: Description,
    taken: set[str],
    *,
    first: int | None = None,
    prompt_tokens: int | None = None,
    state: str = "length",
) -> CapturedRequest:
    """A request whose array says no more than the user does, unless the format knows `first` and
    `prompt_tokens`."""
    start = described.of_request(name, "start")
    first = start if start is not None else first
    given = described.of_request(name, "prompt_tokens")
    prompt_tokens = given if given is not None else prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = first
    if not prompt_tokens:
        raise UserError(
            f"{place}: nothing says how many of its {num_rows:,} rows are of the prompt; add --prompt-tokens "
            "N, or --start N where the rows are of decode steps alone"
        )
    return CapturedRequest(request_name(name, taken), place, first or 0, num_rows, prompt_tokens, state)


def npy_rows(source: Source) -> ArrayRows:
    """The rows of an array in numpy's own format."""
    shape, dtype, offset = _npy_header(
        io.BytesIO(source.read(0, min(_HEADER_BYTES, source.num_bytes))), source.place
    )
    return ArrayRows(Shifted(source, offset), dtype, shape)


class Shifted:
    """A source from `offset` on."""

    def __init__(self, source: Source, offset: int) -> None:
        self._source, self._offset = source, offset
        self.place, self.num_bytes = source.place, source.num_bytes - offset

    def read(self, at: int, size: int) -> bytes:
        return self._source.read(self._offset + at, size)


def base64_npy(path: Path, offset: int, num_chars: int, place: str) -> ArrayRows:
    """The rows of an array that a file holds as base64."""
    return npy_rows(Base64Bytes(path, offset, num_chars, place))


def _npy_header(file: IO[bytes], place: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type, and where the numbers begin."""
    form = np.lib.format
    try:
        version = form.read_magic(file)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers from Python 2
            shape, is_fortran, dtype = read(file)
    except _NO_HEADER as error:
        raise UserError(f"{place}: no array of numpy's: {error}; save it with numpy.save") from error
    if dtype.hasobject or (is_fortran and len(shape) > 1):
        what = "pickled objects" if dtype.hasobject else "columns first"
        raise UserError(f"{place}: holds {what}; save it as numpy.ascontiguousarray(ids, dtype='int32')")
    return shape, dtype, file.tell()


def _of_npz(path: Path) -> Iterator[tuple[str, ArrayRows]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        for member in members:
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                yield name, npy_rows(_Member(path, member, f"{path}: {name}"))
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: no whole .npz: {error}; copy it again") from error


class _Member:
    """A packed file: cheap to read onwards, and read anew from its start where one goes back."""

    def __init__(self, path: Path, member: zipfile.ZipInfo, place: str) -> None:
        self.place, self.num_bytes = place, member.file_size
        self._path, self._member = path, member
        self._file: IO[bytes] | None = None

    def read(self, at: int, size: int) -> bytes:
        try:
            if self._file is None or at < self._file.tell():
                self._file = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115 - kept
            self._file.seek(at)
            data = self._file.read(size)
        except (OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError) as error:  # type: ignore[attr-defined]
            raise UserError(f"{self.place}: cannot unpack it: {error}; copy it again") from error
        if len(data) < size:
            raise UserError(f"{self.place}: ends {size - len(data)} bytes early; copy it again")
        return data


def _of_safetensors(path: Path, header_bytes: int) -> Iterator[tuple[str, ArrayRows]]:
    """The format is a length, a JSON header of that length, and the tensors' bytes."""
    source = FileBytes(path, 8)
    if not 2 <= header_bytes <= min(source.num_bytes, _MOST_HEADER_BYTES):
        raise UserError(f"{path}: a header of {header_bytes:,} bytes; no whole safetensors file")
    try:
        header = json.loads(source.read(0, header_bytes))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            shape, kind = [int(size) for size in tensor["shape"]], tensor["dtype"]
            if kind not in _SAFETENSORS:
                raise UserError(f"{path}: {name}: {kind}; use whole numbers, such as int32")
            dtype = np.dtype(_SAFETENSORS[kind])
            if (
                not 0 <= start <= end
                or min(shape, default=0) < 0
                or (end - start != math.prod(shape) * dtype.itemsize)
            ):
                raise UserError(f"{path}: {name}: its header contradicts itself; write the file again")
            place = f"{path}: {name}"
            yield name, ArrayRows(FileBytes(path, 8 + header_bytes + start, end - start, place), dtype, shape)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its header is no safetensors header; write the file again") from error
