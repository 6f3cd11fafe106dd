"""Parquet files of one schema, one behind the other, without decoding their records.

The bytes of the row groups are copied; the footer, which says where they lie, is written anew. A footer
is a struct of Thrift's compact protocol (parquet-format, Thrift's `thrift-compact-protocol.md`): of it
only the offsets and counts are changed, and fields unknown here pass through. Knows no column.

    with Concatenation(out) as whole:
        for path in paths:
            with path.open("rb") as file:
                whole.append(file)
"""

from __future__ import annotations

import io
import struct
from types import TracebackType
from typing import IO, Any

_MAGIC = b"PAR1"
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)

Struct = dict[int, tuple[int, Any]]
"""Field id -> type and value; a list's value is the type of its items and the items."""

# Fields of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData that are counts or places in the file.
_SCHEMA, _NUM_ROWS, _ROW_GROUPS = 2, 3, 4
_COLUMNS, _GROUP_OFFSET, _ORDINAL = 1, 5, 7
_CHUNK_OFFSET, _CHUNK_METADATA = 2, 3
_PAGE_INDEX = (4, 5, 6, 7)
_METADATA_OFFSETS = (9, 10, 11, 14)


class Concatenation:
    """A Parquet file under way; complete when the block ends without an error, and one file was appended."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._size = out.write(_MAGIC)
        self._footer: Struct = {}
        self._groups: list[Struct] = []
        self._num_rows = 0

    def append(self, file: IO[bytes]) -> None:
        """Copies a whole Parquet file's row groups; raises `ValueError` if its schema is another one."""
        footer, end = _footer(file)
        self._footer = self._footer or footer
        if footer[_SCHEMA] != self._footer[_SCHEMA]:
            raise ValueError("Parquet files of different schemas")
        shift = self._size - len(_MAGIC)
        for group in footer[_ROW_GROUPS][1][1]:
            _move(group, shift)
            self._groups.append(group)
        self._num_rows += footer[_NUM_ROWS][1]
        file.seek(len(_MAGIC))
        self._size += _copy(file, self._out, end - len(_MAGIC))

    def __enter__(self) -> Concatenation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._footer[_NUM_ROWS] = _I64, self._num_rows
            self._footer[_ROW_GROUPS] = _LIST, (_STRUCT, self._groups)
            encoded = io.BytesIO()
            _write_struct(encoded, self._footer)
            self._out.write(encoded.getvalue() + struct.pack("<I", encoded.tell()) + _MAGIC)


def _footer(file: IO[bytes]) -> tuple[Struct, int]:
    """The footer, and where it begins."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 8, 0))
    tail = file.read(8)
    if tail[4:] != _MAGIC:
        raise ValueError("not a whole Parquet file")
    begin = size - 8 - int(struct.unpack("<I", tail[:4])[0])
    file.seek(begin)
    return _read_struct(io.BytesIO(file.read(size - 8 - begin))), begin


def _move(group: Struct, shift: int) -> None:
    """Adds to every place in the file. What is optional and would be wrong goes: the row group's number,
    and the page index, in which places stand too."""
    group.pop(_ORDINAL, None)
    _add(group, (_GROUP_OFFSET,), shift)
    for chunk in group[_COLUMNS][1][1]:
        for id_ in _PAGE_INDEX:
            chunk.pop(id_, None)
        _add(chunk, (_CHUNK_OFFSET,), shift)
        _add(chunk[_CHUNK_METADATA][1], _METADATA_OFFSETS, shift)


def _add(fields: Struct, ids: tuple[int, ...], shift: int) -> None:
    for id_ in ids:
        if id_ in fields and fields[id_][1]:  # 0: not told, since the file begins with its magic
            type_, value = fields[id_]
            fields[id_] = type_, value + shift


def _copy(file: IO[bytes], out: IO[bytes], num_bytes: int) -> int:
    left = num_bytes
    while left:
        data = file.read(min(left, 1 << 20))
        if not data:
            raise ValueError("not a whole Parquet file")
        out.write(data)
        left -= len(data)
    return num_bytes


def _read_struct(data: IO[bytes]) -> Struct:
    fields: Struct = {}
    id_ = 0
    while header := data.read(1)[0]:
        type_, delta = header & 15, header >> 4
        id_ = id_ + delta if delta else _zigzag_back(_read_varint(data))
        fields[id_] = type_, _read_value(data, type_)
    return fields


def _read_value(data: IO[bytes], type_: int) -> Any:
    if type_ in (_TRUE, _FALSE):  # told by the type
        return None
    if type_ in (_I16, _I32, _I64):
        return _zigzag_back(_read_varint(data))
    if type_ == _STRUCT:
        return _read_struct(data)
    if type_ in (_LIST, _SET):
        header = data.read(1)[0]
        size, of = header >> 4, header & 15
        size = _read_varint(data) if size == 15 else size
        return of, [data.read(1) if of in (_TRUE, _FALSE) else _read_value(data, of) for _ in range(size)]
    if type_ not in (_BYTE, _DOUBLE, _BINARY):
        raise ValueError(f"a Parquet footer with a field of type {type_}")
    return data.read({_BYTE: 1, _DOUBLE: 8}.get(type_) or _read_varint(data))


def _write_struct(out: IO[bytes], fields: Struct) -> None:
    before = 0
    for id_, (type_, value) in sorted(fields.items()):
        delta = id_ - before
        if 1 <= delta <= 15:
            out.write(bytes([delta << 4 | type_]))
        else:
            out.write(bytes([type_]) + _varint(_zigzag(id_)))
        _write_value(out, type_, value)
        before = id_
    out.write(b"\0")


def _write_value(out: IO[bytes], type_: int, value: Any) -> None:
    if type_ in (_TRUE, _FALSE):
        return
    if type_ in (_BYTE, _DOUBLE):
        out.write(value)
    elif type_ in (_I16, _I32, _I64):
        out.write(_varint(_zigzag(value)))
    elif type_ == _BINARY:
        out.write(_varint(len(value)) + value)
    elif type_ == _STRUCT:
        _write_struct(out, value)
    else:
        of, items = value
        size = len(items)
        out.write(bytes([size << 4 | of]) if size < 15 else bytes([15 << 4 | of]) + _varint(size))
        for item in items:
            out.write(item) if of in (_TRUE, _FALSE) else _write_value(out, of, item)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _zigzag_back(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2


def _read_varint(data: IO[bytes]) -> int:
    value = shift = 0
    while True:
        byte = data.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7


def _varint(value: int) -> bytes:
    written = bytearray()
    while value >= 128:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
