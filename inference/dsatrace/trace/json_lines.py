"""Writes columns as JSON lines, byte for byte as orjson writes the same records as dicts.

A layout is a dict whose values are columns where lines differ and plain values where they do not.
It becomes a program, in about 0.2 ms, that a compiled loop runs for every line, without the GIL.
orjson writes the floats, a column at a time. Knows JSON, not traces.

    encoder = LineEncoder()
    encoder.encode({"kind": "demo", "n": np.array([3, 4]), "who": Choice(["a"], np.array([0, 0]))}, 2)
    # b'{"kind":"demo","n":3,"who":"a"}\\n{"kind":"demo","n":4,"who":"a"}\\n'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from dsatrace.trace.kernels import INT, LITERAL, QUADS, RUN, SLACK, TEXT, compile_kernels, write_lines

INT_CHARS = 20
"""The longest int64, with its sign."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A column with few distinct values: record r holds `values[which[r]]`."""

    values: Sequence[Any]
    which: np.ndarray  # (R,) int


@dataclasses.dataclass(frozen=True)
class Runs:
    """A column of lists: record r holds `values[start[r]:stop[r]]`, int32 >= 0 or float32."""

    values: np.ndarray  # (N,)
    start: np.ndarray  # (R,) int64
    stop: np.ndarray  # (R,) int64


@dataclasses.dataclass(frozen=True)
class Optional:
    """A field that a record may lack: it holds `values[which[r]]`, or is left out where that is None.

    Must not be the first field of an object: its text begins with a comma.
    """

    values: Sequence[Any]
    which: np.ndarray  # (R,) int


Layout = Mapping[str, Any]
"""Field -> column or plain value: (R,) int or float array (nan is null), `Choice`, `Runs`, `Optional`,
another layout, or a value that orjson can write."""


class LineEncoder:
    """Keeps one buffer, which grows to the largest step."""

    def __init__(self) -> None:
        compile_kernels()
        self._buffer = np.empty(1 << 16, dtype=np.uint8)

    def encode(self, layout: Layout, num_records: int) -> memoryview:
        """One line per record. The bytes are valid until the next call."""
        program = _Program(num_records)
        program.add(layout)
        program.literal(b"\n")
        arguments, size = program.assembled()
        if size > len(self._buffer):
            self._buffer = np.empty(max(size, 2 * len(self._buffer)), dtype=np.uint8)
        length = write_lines(*arguments, num_records, QUADS, self._buffer)
        return self._buffer.data[:length]


class _Program:
    """The instructions for a line, and the columns they refer to."""

    def __init__(self, num_records: int) -> None:
        self._num_records = num_records
        self._steps: list[tuple[int, int]] = []
        self._literals: list[bytes] = [b""]
        self._ints: list[np.ndarray] = []  # (R,) each
        self._texts: list[bytes] = []
        self._text_bytes = 0
        self._text_spans: list[tuple[np.ndarray, np.ndarray] | None] = []  # start and stop, (R,) each
        self._floats: dict[str, list[tuple[int, np.ndarray]]] = {}  # by dtype: text column, (R,) values
        self._values: list[np.ndarray] = []
        self._run_spans: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, value: Any) -> None:
        """Writes a field's value, whatever kind of column it is."""
        if isinstance(value, Mapping):
            self._add_object(value)
        elif isinstance(value, Choice):
            self._add_choice([orjson.dumps(one) for one in value.values], value.which)
        elif isinstance(value, Runs):
            self._add_runs(value)
        elif isinstance(value, np.ndarray) and value.dtype.kind == "i":
            self._step(INT, self._ints, value)
        elif isinstance(value, np.ndarray):
            self._floats.setdefault(value.dtype.char, []).append((len(self._text_spans), value))
            self._step(TEXT, self._text_spans, None)  # spelled in `assembled`, all columns at once
        else:
            self.literal(orjson.dumps(value))

    def literal(self, text: bytes) -> None:
        """Fixed bytes; neighbours are joined."""
        if self._steps and self._steps[-1][0] == LITERAL:
            self._literals[-1] += text
        else:
            self._step(LITERAL, self._literals, text)

    def assembled(self) -> tuple[tuple[np.ndarray, ...], int]:
        """The first arguments of `write_lines`, and an upper bound of the bytes it writes."""
        for columns in self._floats.values():
            self._spell(columns)
        pointers = np.cumsum([0, *map(len, self._literals)])
        values = _joined(self._values)
        ints = _stacked(self._ints, (self._num_records,))
        text_spans = _stacked(self._text_spans, (2, self._num_records))
        run_spans = _stacked(self._run_spans, (2, self._num_records))
        digits = len(str(values.max())) if len(values) else 1
        size = SLACK + self._num_records * (int(pointers[-1]) + INT_CHARS * len(ints) + 2 * len(run_spans))
        size += int((text_spans[:, 1] - text_spans[:, 0]).sum())
        size += int((run_spans[:, 1] - run_spans[:, 0]).sum()) * (digits + 1)
        arguments = (
            np.array(self._steps, dtype=np.int32),
            _bytes(self._literals),
            pointers,
            ints,
            _bytes(self._texts),
            text_spans,
            values,
            run_spans,
        )
        return arguments, size

    def _step(self, kind: int, table: list[Any], entry: Any) -> None:
        self._steps.append((kind, len(table)))
        table.append(entry)

    def _add_object(self, fields: Layout) -> None:
        opening = b"{"
        for name, value in fields.items():
            key = opening + orjson.dumps(name) + b":"
            if isinstance(value, Optional):
                assert opening == b","
                pieces = [b"" if one is None else key + orjson.dumps(one) for one in value.values]
                self._add_choice(pieces, value.which)
                continue
            self.literal(key)
            self.add(value)
            opening = b","
        self.literal(b"}" if fields else b"{}")

    def _add_choice(self, pieces: Sequence[bytes], which: np.ndarray) -> None:
        ends = np.cumsum([0, *map(len, pieces)])
        self._add_text(b"".join(pieces), ends[which], ends[which + 1])

    def _add_runs(self, column: Runs) -> None:
        if column.values.dtype == np.float32:
            self.literal(b"[")
            text, commas = _float_text(column.values)
            self._add_text(text, commas[column.start] + 1, commas[column.stop])
            self.literal(b"]")
            return
        assert column.values.dtype == np.int32
        before = 0
        for known in self._values:  # columns may share an array, as a prefix of each run does
            if known is column.values:
                break
            before += len(known)
        else:
            self._values.append(column.values)
        self._step(RUN, self._run_spans, (column.start + before, column.stop + before))

    def _add_text(self, text: bytes, start: np.ndarray, stop: np.ndarray) -> None:
        at = self._append_text(text)
        self._step(TEXT, self._text_spans, (at + start, at + stop))

    def _append_text(self, text: bytes) -> int:
        """Adds to the texts; returns where it begins."""
        at = self._text_bytes
        self._texts.append(text)
        self._text_bytes += len(text)
        return at

    def _spell(self, columns: list[tuple[int, np.ndarray]]) -> None:
        """Writes float columns of one type, in one call of orjson."""
        text, commas = _float_text(np.concatenate([values for _, values in columns]))
        commas += self._append_text(text)
        for i, (column, _) in enumerate(columns):
            ends = commas[i * self._num_records : (i + 1) * self._num_records + 1]
            self._text_spans[column] = (ends[:-1] + 1, ends[1:])


def _float_text(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """`[1.5,null,2.0]`, and the places (N + 1,) of its commas and of both brackets."""
    text = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    is_comma = np.frombuffer(text, dtype=np.uint8) == ord(",")
    is_comma[0] = is_comma[-1] = True
    return text, np.flatnonzero(is_comma)


def _bytes(pieces: list[bytes]) -> np.ndarray:
    """(bytes,) uint8, writable as the kernel's signature demands."""
    return np.frombuffer(bytearray().join(pieces), dtype=np.uint8)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0])
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def _stacked(columns: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """(columns, *shape) int64."""
    return np.array(columns, dtype=np.int64).reshape(len(columns), *shape)
