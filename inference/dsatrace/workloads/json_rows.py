"""JSON rows from an array or from lines, streamed: one row in memory, whatever the file's size.

An array is cut into elements by brackets and quotes alone, and each element is parsed by
itself. So a fault is named by its byte, and a bad element costs that row only.

    for row in read_json_rows("data.json", lambda number, row: row["question"], BadRows()):
        ...
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from dsatrace.errors import UserError
from dsatrace.units import size_text
from dsatrace.workloads.rows import BadRow, BadRows, json_object, open_source, read_rows

MAX_ROW_BYTES = 256 << 20  # the longest row of LongBench v2 is 16 million characters

Parsed = TypeVar("Parsed")

_SPACE = b" \t\r\n"
_CHUNK_BYTES = 1 << 20
_QUOTE, _BACKSLASH, _OPEN = ord('"'), ord("\\"), frozenset(b"[{")
_OUTER = re.compile(rb'[][{}",]')
_CONTENT = re.compile(rb"[^ \t\r\n]")
_INNER = re.compile(rb'[][{}"]')


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The bytes of one row."""

    offset: int  # of the first byte in the file
    data: bytes | bytearray
    fault: BadRow | None = None  # why they are not a whole row


def read_json_rows(
    path: str | Path, parse: Callable[[int, dict[str, Any]], Parsed], bad_rows: BadRows
) -> Iterator[Parsed]:
    """Rows of a JSON array or of JSON lines, whichever the file is, each through `parse(number, row)`.

    `parse` raises `BadRow` for a row it cannot use. Numbers start at 0 and count bad rows too,
    so a row has the same number under either policy. Blank lines are no rows. If the file is
    cut off, its last row is bad. A row of more than `MAX_ROW_BYTES` raises a `UserError`.
    """
    with open_source(path) as file:
        pieces = _pieces(file, str(path))
        yield from read_rows(str(path), pieces, lambda row, piece: parse(row, _decode(piece)), bad_rows)


def _pieces(file: BinaryIO, source: str) -> Iterator[tuple[str, _Piece]]:
    offset, number, blank = file.tell() if file.seekable() else 0, 0, True
    while line := file.readline(_CHUNK_BYTES):
        content = line.lstrip(_SPACE)
        if blank and content.startswith(b"["):
            array = _Array(file, offset + len(line) - len(content) + 1, source, content[1:])
            for piece in array.pieces():
                yield f"byte {piece.offset}", piece
            return
        if not line.endswith(b"\n"):
            line += file.readline(MAX_ROW_BYTES)
            if len(line) > MAX_ROW_BYTES:
                _refuse_length(source, offset)
        number += 1
        if content:
            blank = False
            yield f"line {number}", _Piece(offset, line)
        offset += len(line)


class _Array:
    """Cuts an array into its elements by its strings and brackets; judges nothing between them."""

    def __init__(self, file: BinaryIO, offset: int, source: str, start: bytes = b"") -> None:
        """`start` is what was read of `file` past the opening bracket, from byte `offset` on."""
        self._file = file
        self._source = source
        self._buffer = bytearray(start)  # from the current element's first byte on
        self._offset = offset  # that byte's place in the file

    def pieces(self) -> Iterator[_Piece]:
        first = True
        while True:
            try:
                end = self._element_end()
            except BadRow as fault:
                yield _Piece(self._offset + self._content(), b"", fault)
                return
            begin, last = self._content(), self._buffer[end] == ord("]")
            if begin < end or not (first and last):  # `[]` holds no element
                yield _Piece(self._offset + begin, self._buffer[begin:end])
            self._drop(end + 1)
            if last:
                break
            first = False
        yield from self._after_the_array()

    def _element_end(self) -> int:
        """The place in the buffer of the comma after the element or of the array's closing bracket."""
        buffer, depth, at = self._buffer, 0, 0
        while True:
            match = (_INNER if depth else _OUTER).search(buffer, at)
            if match is None:
                at = len(buffer)
                if not self._read_on():
                    raise self._cut_off("before the array's closing bracket")
                continue
            begin, at = match.span()
            byte = buffer[begin]
            if byte == _QUOTE:
                at = self._string_end(at)
            elif byte in _OPEN:
                depth += 1
            elif depth:
                depth -= 1
            elif byte != ord("}"):  # a stray brace belongs to an element that will not parse
                return begin

    def _string_end(self, begin: int) -> int:
        """The place after the closing quote of the string whose text begins at `begin`."""
        buffer, at = self._buffer, begin
        while True:
            quote = buffer.find(b'"', at)
            if quote < 0:
                at = len(buffer)
                if not self._read_on():
                    raise self._cut_off(f"in a string from byte {self._offset + begin - 1}")
                continue
            slash = quote
            while slash > begin and buffer[slash - 1] == _BACKSLASH:
                slash -= 1
            at = quote + 1
            if (quote - slash) % 2 == 0:
                return at

    def _after_the_array(self) -> Iterator[_Piece]:
        while self._content() == len(self._buffer):
            self._drop(len(self._buffer))
            if not self._read_on():
                return
        at = self._offset + self._content()
        yield _Piece(at, b"", BadRow("cut off", f"the array is closed, but more follows at byte {at}"))

    def _content(self) -> int:
        """The place in the buffer of the first character that is no space; its length if there is none."""
        match = _CONTENT.search(self._buffer)
        return match.start() if match else len(self._buffer)

    def _cut_off(self, where: str) -> BadRow:
        return BadRow("cut off", f"the file ends at byte {self._offset + len(self._buffer)}, {where}")

    def _read_on(self) -> bool:
        """Appends the next chunk of the file; False at its end."""
        chunk = self._file.read(_CHUNK_BYTES)
        if len(self._buffer) + len(chunk) > MAX_ROW_BYTES + _CHUNK_BYTES:
            _refuse_length(self._source, self._offset)
        self._buffer += chunk
        return bool(chunk)

    def _drop(self, num_bytes: int) -> None:
        del self._buffer[:num_bytes]
        self._offset += num_bytes


def _decode(piece: _Piece) -> dict[str, Any]:
    if piece.fault is not None:
        raise piece.fault
    return json_object(piece.data, piece.offset)


def _refuse_length(source: str, offset: int) -> NoReturn:
    raise UserError(
        f"{source}: the row at byte {offset} is longer than {size_text(MAX_ROW_BYTES)}; "
        "is a bracket or a line's end missing?"
    )
