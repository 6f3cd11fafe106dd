"""colibri's `ROUTE_TRACE` text: a line per row and layer, with the experts that it was routed to.

`call row layer expert:gate expert:gate ...`, where a call is a forward and its rows are tokens; some forks
write `token layer e0 .. e7 s0 .. s7`. Nothing names a request: one begins with the trace, and with each
call of several rows after one of a single row, which is a prompt's prefill. Speculative decoding has such
calls too: say --prompt-tokens then, and all is one request.

    capture = open_trace(Path("route.txt"), Description(experts=256), taken=set())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsatrace.captures.description import Description, layers_text
from dsatrace.captures.npy import array_request
from dsatrace.captures.rows import CHUNK_BYTES, Advance, CapturedRequest, Chunk, check_row, opened, unwatched
from dsatrace.errors import UserError

_MOST_LINE_BYTES = 1 << 16
_MOST_LAYERS = 1 << 12
_MOST_ROWS = 1 << 8
"""Rows of a chunk, which are lists of Python's until it is whole."""


class _Line(NamedTuple):
    call: int
    row: int
    layer: int
    experts: list[int]
    place: str
    num_bytes: int


@dataclasses.dataclass
class _Found:
    """A request as the trace shows it."""

    num_rows: int = 0
    prompt_tokens: int = 0  # rows of its first calls, while those have several
    is_decoding: bool = False  # a call of a single row has ended


class TraceCapture:
    """The requests of a trace, one after the other."""

    def __init__(self, path: Path, described: Description, taken: set[str], advance: Advance) -> None:
        self._path = path
        self._layers: list[int] = []
        self._width = 0
        self.notes: list[str] = []
        found = self._look_through(described.prompt_tokens is not None, advance)
        self.shape = len(self._layers), self._width
        check_row(self.shape, str(path))
        self.said: dict[str, str] = {"layers": layers_text(self._layers)} if found else {}
        self.num_bytes = path.stat().st_size
        self.requests: list[CapturedRequest] = []
        for i, one in enumerate(found):
            name = f"{path.stem}-{i}" if len(found) > 1 else path.stem
            place, prompt = f"{path}: request {i}", one.prompt_tokens or None
            self.requests.append(
                array_request(name, place, one.num_rows, described, taken, first=0, prompt_tokens=prompt)
            )

    def _look_through(self, is_one: bool, advance: Advance) -> list[_Found]:
        """The requests, and of all rows the layers and the width. `is_one`: there is one request."""
        found: list[_Found] = []
        call, in_call = -1, 0
        for lines in self._rows():
            self._check(lines)
            advance(sum(line.num_bytes for line in lines))
            if not found:
                found.append(_Found())
            if lines[0].call != call:
                found[-1].is_decoding |= in_call == 1
                call, in_call = lines[0].call, 0
            in_call += 1
            if in_call == 2 and found[-1].is_decoding and not is_one:
                found[-1].num_rows -= 1  # the call's first row is of the next request
                found.append(_Found(1))
            last = found[-1]
            last.num_rows += 1
            if in_call > 1 and not last.is_decoding:
                last.prompt_tokens += 1 + (in_call == 2)
        return found

    def _check(self, lines: list[_Line]) -> None:
        """Raises `UserError` for a row unlike the first."""
        layers = [line.layer for line in lines]
        if not self._layers:
            self._layers, self._width = layers, len(lines[0].experts)
        if layers != self._layers:
            raise UserError(
                f"{lines[0].place}: a row of layers {_some(layers)}, and those before it have "
                f"{_some(self._layers)}; the trace is cut or mixed, trace one model at a time"
            )
        for line in lines:
            if len(line.experts) != self._width:
                raise UserError(
                    f"{line.place}: {len(line.experts)} experts, and lines before it have {self._width}"
                )

    def chunks(self, starts: Mapping[int, int], advance: Advance) -> Iterator[Chunk]:
        size = min(max(CHUNK_BYTES // max(4 * self.shape[0] * self.shape[1], 1), 1), _MOST_ROWS)
        request, at = 0, 0
        waiting: list[list[list[int]]] = []
        for lines in self._rows():
            if at == self.requests[request].num_rows:
                yield from self._chunk(request, at, waiting, starts)
                request, at, waiting = request + 1, 0, []
            waiting.append([line.experts for line in lines])
            at += 1
            advance(sum(line.num_bytes for line in lines))
            if len(waiting) == size:
                yield from self._chunk(request, at, waiting, starts)
                waiting = []
        yield from self._chunk(request, at, waiting, starts)

    def _chunk(
        self, request: int, end: int, rows: list[list[list[int]]], starts: Mapping[int, int]
    ) -> Iterator[Chunk]:
        """Rows up to row `end` of the request."""
        first = self.requests[request].first + end - len(rows) if rows else 0
        skipped = min(max(starts.get(request, 0) - first, 0), len(rows))
        if rows[skipped:]:
            yield Chunk(request, first + skipped, np.array(rows[skipped:], dtype=np.int32))

    def _rows(self) -> Iterator[list[_Line]]:
        """The lines of each row."""
        row: list[_Line] = []
        for line in _lines(self._path):
            if row and (line.call, line.row) != (row[0].call, row[0].row):
                yield row
                row = []
            row.append(line)
            if len(row) > _MOST_LAYERS:
                raise UserError(f"{line.place}: a row of more than {_MOST_LAYERS:,} layers; a damaged trace")
        if len(row) >= len(self._layers) and row:
            yield row
        elif row and not self.notes:
            self.notes.append(f"{self._path}: 1 row left out: the trace ends within it")


def open_trace(
    path: Path, described: Description, taken: set[str], advance: Advance = unwatched
) -> TraceCapture:
    return TraceCapture(path, described, taken, advance)


def _lines(path: Path) -> Iterator[_Line]:
    with opened(path) as file:
        number = 0
        while text := file.readline(_MOST_LINE_BYTES):
            number += 1
            place = f"{path}: line {number}"
            if not text.strip() or text.startswith(b"#"):
                continue
            try:
                yield _line(text, place)
            except (ValueError, IndexError):
                if not text.endswith(b"\n"):  # cut by a kill
                    return
                raise UserError(
                    f"{place}: not `call row layer expert:gate ...` and not `token layer experts scores`; "
                    "drop it"
                ) from None


def _line(text: bytes, place: str) -> _Line:
    words = text.split()
    if any(b":" in word for word in words):
        call, row, layer = (_number(word) for word in words[:3])
        pairs = [word.split(b":") for word in words[3:]]
        experts = [_number(expert) for expert, _gate in pairs]
    else:
        call, layer = (_number(word) for word in words[:2])
        row, values = 0, words[2:]
        if len(values) % 2:
            raise ValueError("experts and scores")
        experts = [_number(word) for word in values[: len(values) // 2]]
    if not experts:
        raise ValueError("no experts")
    return _Line(call, row, layer, experts, place, len(text))


def _number(word: bytes) -> int:
    number = int(word)
    if not 0 <= number < 2**31:
        raise ValueError(word)
    return number


def _some(layers: list[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (" ..." if len(layers) > 8 else "")
