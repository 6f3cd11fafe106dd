"""Captured rows, whatever file they lie in, read a few at a time.

A format's reader looks through a file once and says which requests it holds (`Capture`); their rows are
read when they are asked for. A source is a run of bytes: of a file, of base64 within one, or of a packed
member. Knows no format.

    array = ArrayRows(FileBytes(path, 128), np.dtype("<i4"), (4000, 61, 2048))
    array.read(0, 8)                               # (8, 61, 2048) int32
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from dsatrace.errors import UserError
from dsatrace.text import plain

CHUNK_BYTES = 16 << 20
"""Of ids that are read at a time."""
ROW_BYTES = 64 << 20
"""A row with more is none of a model's."""

MIN_ROWS = 8
"""Rows that must be alike before a layer is called silent."""

Advance = Callable[[int], None]  # so many more bytes were read


def unwatched(num_bytes: int) -> None:
    """The `Advance` of who shows no progress."""


class Chunk(NamedTuple):
    """Rows of one request, of queries one after the other."""

    request: int  # index into `Capture.requests`
    first: int  # position of the first row's query
    ids: np.ndarray  # (R, S, K) int32


@dataclasses.dataclass(frozen=True)
class CapturedRequest:
    """A request of which rows were captured."""

    name: str
    place: str  # for errors: the file, and where in it
    first: int  # position of the first row's query
    num_rows: int
    prompt_tokens: int
    state: str = "length"  # how it ended, as far as the capture goes: it has no further row

    @property
    def end(self) -> int:
        return self.first + self.num_rows


class Capture(Protocol):
    """What a file holds. All its rows have `shape` (sets, width)."""

    requests: Sequence[CapturedRequest]
    shape: tuple[int, int]
    notes: Sequence[str]  # what the user must know: a torn end, for example
    said: Mapping[str, Any]  # what the file says of itself: fields of `Description`
    num_bytes: int  # that all chunks together report

    def chunks(self, starts: Mapping[int, int], advance: Advance) -> Iterator[Chunk]:
        """All rows in the file's order, of each request in order; of those in `starts` only the rows of
        queries from that position on."""
        ...


class Source(Protocol):
    """A run of bytes."""

    num_bytes: int
    place: str

    def read(self, at: int, size: int) -> bytes:
        """Raises `UserError` where there are fewer."""
        ...


class FileBytes:
    """Bytes of a file from `offset` on."""

    def __init__(self, path: Path, offset: int, num_bytes: int | None = None, place: str = "") -> None:
        self.place = place or str(path)
        self._path, self._offset = path, offset
        with opened(path) as file:
            self.num_bytes = file.seek(0, 2) - offset if num_bytes is None else num_bytes

    def read(self, at: int, size: int) -> bytes:
        with opened(self._path) as file:
            file.seek(self._offset + at)
            data = file.read(size)
        if len(data) < size:
            raise UserError(f"{self.place}: the file ends {size - len(data)} bytes early; copy it again")
        return data


class Base64Bytes:
    """What `num_chars` characters of base64 in a file stand for."""

    def __init__(self, path: Path, offset: int, num_chars: int, place: str) -> None:
        self.place = place
        self._path, self._offset = path, offset
        self._check(num_chars, self._characters(max(num_chars - 2, 0), min(num_chars, 2)))

    def read(self, at: int, size: int) -> bytes:
        first, end = at // 3, -(-(at + size) // 3)  # groups of 4 characters
        try:
            data = base64.b64decode(self._characters(4 * first, 4 * (end - first)), validate=True)
        except binascii.Error as error:
            raise UserError(f"{self.place}: no base64: {error}; capture it again") from error
        data = data[at - 3 * first :][:size]
        if len(data) < size:
            raise UserError(f"{self.place}: its base64 ends {size - len(data)} bytes early; capture it again")
        return data

    def _check(self, num_chars: int, tail: bytes) -> None:
        if num_chars % 4:
            raise UserError(f"{self.place}: {num_chars:,} characters are no whole base64; capture it again")
        self.num_bytes = num_chars // 4 * 3 - tail.count(b"=")

    def _characters(self, at: int, size: int) -> bytes:
        with opened(self._path) as file:
            file.seek(self._offset + at)
            return file.read(size)


class ArrayRows:
    """Rows of an array in C order: (rows, layers, k), (rows, k), or (rows, layers, heads, k)."""

    def __init__(self, source: Source, dtype: np.dtype, shape: Sequence[int]) -> None:
        if dtype.kind not in "iu" or not 2 <= len(shape) <= 4 or min(shape[1:]) < 1 or shape[0] < 0:
            raise UserError(
                f"{source.place}: {dtype} of shape {tuple(shape)}; use whole numbers of (rows, layers, k)"
            )
        self._source, self._dtype = source, dtype
        self.num_rows, *sets, width = shape
        self.shape = math.prod(sets), width
        self._row_bytes = math.prod(self.shape) * dtype.itemsize
        check_row(self.shape, source.place)
        self.num_bytes = needed = self.num_rows * self._row_bytes
        if source.num_bytes < needed:
            raise UserError(
                f"{source.place}: holds {source.num_bytes:,} bytes, and {self.num_rows:,} rows of "
                f"{self._row_bytes:,} need {needed:,}; it is cut short, copy it again"
            )

    def read(self, first: int, end: int) -> np.ndarray:
        """(end - first, S, K) int32."""
        data = self._source.read(first * self._row_bytes, (end - first) * self._row_bytes)
        return as_ids(np.frombuffer(data, self._dtype), self._source.place).reshape(-1, *self.shape)

    def chunks(self, request: int, at: int, first_row: int, advance: Advance) -> Iterator[Chunk]:
        """From row `first_row` on; row 0 is of position `at`."""
        size = max(CHUNK_BYTES // self._row_bytes, 1)
        advance(first_row * self._row_bytes)
        for row in range(first_row, self.num_rows, size):
            end = min(row + size, self.num_rows)
            yield Chunk(request, at + row, self.read(row, end))
            advance((end - row) * self._row_bytes)


class ArrayCapture:
    """Requests whose rows are an array each."""

    def __init__(
        self, requests: Sequence[CapturedRequest], arrays: Sequence[ArrayRows], notes: Sequence[str] = ()
    ) -> None:
        self.requests, self.notes, self._arrays = requests, notes, arrays
        self.said: Mapping[str, Any] = {}
        self.num_bytes = sum(rows.num_bytes for rows in arrays)
        self.shape = one_shape([(one.place, rows.shape) for one, rows in zip(requests, arrays, strict=True)])

    def chunks(self, starts: Mapping[int, int], advance: Advance) -> Iterator[Chunk]:
        for i, (request, rows) in enumerate(zip(self.requests, self._arrays, strict=True)):
            skipped = min(max(starts.get(i, 0) - request.first, 0), rows.num_rows)
            yield from rows.chunks(i, request.first, skipped, advance)


class WithoutSets:
    """A capture without some of its sets: those of layers that select nothing."""

    def __init__(self, capture: Capture, left_out: Sequence[int]) -> None:
        self._capture, self._left_out = capture, list(left_out)
        self._kept = np.setdiff1d(np.arange(capture.shape[0]), left_out)
        self.requests, self.num_bytes = capture.requests, capture.num_bytes
        self.notes, self.said = capture.notes, capture.said
        self.shape = len(self._kept), capture.shape[1]

    def chunks(self, starts: Mapping[int, int], advance: Advance) -> Iterator[Chunk]:
        for chunk in self._capture.chunks(starts, advance):
            if chunk.ids[:, self._left_out].any():
                place = self.requests[chunk.request].place
                raise UserError(
                    f"{place}: a layer holds zeros at first, and ids from position {chunk.first} on; part "
                    "of it was never captured, capture it again"
                )
            yield chunk._replace(ids=chunk.ids[:, self._kept])


def silent_sets(captures: Sequence[Capture]) -> list[int]:
    """Sets that hold zeros only in the first rows, where others hold ids: no layer selects there.

    Engines give dense layers a place in the buffer too.
    """
    for capture in captures:
        for chunk in capture.chunks({}, unwatched):
            held = (chunk.ids != 0).any(axis=2)  # (R, S)
            held = held[held.any(axis=1)]
            if len(held) >= MIN_ROWS and chunk.ids.shape[2] > 1:
                return np.flatnonzero(~held.any(axis=0)).tolist()
            break
    return []


def one_shape(shapes: Sequence[tuple[str, tuple[int, int]]]) -> tuple[int, int]:
    """Raises `UserError` where requests differ; (0, 0) where there are none."""
    for place, shape in shapes:
        if shape != shapes[0][1]:
            raise UserError(
                f"{place}: rows of {shape[0]} sets of {shape[1]} ids, {shapes[0][0]} has {shapes[0][1][0]} "
                f"of {shapes[0][1][1]}; import them apart"
            )
    return shapes[0][1] if shapes else (0, 0)


def check_row(shape: tuple[int, int], place: str) -> None:
    if 4 * math.prod(shape) > ROW_BYTES:
        raise UserError(
            f"{place}: a row of {shape[0]:,} sets of {shape[1]:,} ids is larger than any model's; correct "
            "--layers and --top-k"
        )


def as_ids(values: np.ndarray, place: str) -> np.ndarray:
    """int32; raises `UserError` for ids that are no such numbers."""
    if values.dtype == np.int32:
        return values
    if len(values) and values.dtype.itemsize >= 4:
        low, high = int(values.min()), int(values.max())
        if high >= 2**31 or low < -(2**31):
            raise UserError(f"{place}: {high if high >= 2**31 else low} is no id; ids are below 2^31")
    return values.astype(np.int32)


def opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; name a capture's file") from error


def request_name(text: object, taken: set[str]) -> str:
    """A request's id for a run: printable, not empty, and no other's."""
    name = plain(str(text) or "request", 200)
    for i in range(2, 1 << 30):
        if name not in taken:
            break
        name = f"{plain(str(text) or 'request', 200)}.{i}"
    taken.add(name)
    return name
