"""Responses of an engine, one JSON object or list of them per line, whose longest text may be gigabytes.

A parser would hold such a text several times. Here a line is scanned once: a text longer than
`SHORT_CHARS` is left in the file and only its place is kept; what remains of the line is parsed.

    for response in read_responses(Path("responses.jsonl")):
        response.record["meta_info"]["indexer_topk"]        # Text(offset=812, num_chars=1333333336)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsatrace.captures.rows import Advance, Base64Bytes, opened, unwatched
from dsatrace.errors import UserError

SHORT_CHARS = 1 << 10
_MOST_BYTES = 64 << 20
"""Of a line without its long texts."""
_WINDOW_BYTES = 1 << 20
_NEAR_BYTES = 1 << 12
_OUTSIDE, _INSIDE = re.compile(rb'["\n]'), re.compile(rb'["\\\n]')


class Text(NamedTuple):
    """A long text, left where it stands."""

    offset: int
    num_chars: int
    has_escapes: bool


class _Line(NamedTuple):
    number: int
    text: bytes  # with places for its long texts
    texts: Sequence[Text]


class Response(NamedTuple):
    """One response, and where it stands."""

    record: dict[str, Any]
    place: str


def read_responses(path: Path, advance: Advance = unwatched) -> Iterator[Response]:
    """Raises `UserError` naming the line that is no JSON object, or no list of them."""
    scanner = _Scanner(path)
    for line in _lines(path, scanner, advance):
        place = f"{path}: line {line.number}"

        def restored(found: dict[str, Any], texts: Sequence[Text] = line.texts) -> Any:
            return texts[found[scanner.key]] if scanner.key in found else found

        try:
            record = json.loads(line.text, object_hook=restored)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {error}; write one response per line, or drop it") from error
        many = record if isinstance(record, list) else [record]
        for i, one in enumerate(many):
            if not isinstance(one, dict):
                raise UserError(f"{place}: not a response, which is a JSON object; write one per line")
            yield Response(one, f"{place}, response {i + 1}" if len(many) > 1 else place)


def _lines(path: Path, scanner: _Scanner, advance: Advance) -> Iterator[_Line]:
    with opened(path) as file:
        while window := file.read(_WINDOW_BYTES):
            yield from scanner.lines(window)
            advance(len(window))
    yield from scanner.rest()


def base64_source(path: Path, value: object, place: str, name: str) -> Base64Bytes:
    """The bytes that `value`, of a response's field `name`, stands for."""
    if isinstance(value, str):
        return _ShortBytes(value, place)
    if not isinstance(value, Text):
        raise UserError(f"{place}: {name} is no text of base64; see docs/import.md")
    if value.has_escapes:
        raise UserError(f"{place}: {name} holds backslashes, so is no base64; write the response unescaped")
    return Base64Bytes(path, value.offset, value.num_chars, place)


class _ShortBytes(Base64Bytes):
    """A text that was short enough to be kept."""

    def __init__(self, text: str, place: str) -> None:
        self.place, self._text = place, text.encode("ascii", "replace")
        self._check(len(text), self._text[-2:])

    def _characters(self, at: int, size: int) -> bytes:
        return self._text[at : at + size]


class _Scanner:
    """Takes a file window by window, and gives each line with places for its long texts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.key = f"text {secrets.token_hex(8)}"  # that no record has
        self.number = 1
        self._line, self._texts = bytearray(), list[Text]()
        self._string: bytearray | None = None  # the beginning of a text that has not ended
        self._start = self._length = self._offset = 0
        self._is_escaped = self._has_escapes = False

    def lines(self, window: bytes) -> Iterator[_Line]:
        at = 0
        while at < len(window):
            if self._is_escaped:  # whatever stands there
                self._is_escaped = False
                self._take(window, at, at + 1)
                at += 1
                continue
            stop = _next(window, at, self._string is not None)
            self._take(window, at, stop)
            if stop < len(window):
                yield from self._mark(window[stop : stop + 1], self._offset + stop)
            at = stop + 1
        self._offset += len(window)

    def rest(self) -> Iterator[_Line]:
        """A last line without a line break."""
        if self._string is not None:
            raise UserError(f"{self._place} is cut short; drop it, or capture it again")
        yield from self._ended()

    @property
    def _place(self) -> str:
        return f"{self._path}: line {self.number}"

    def _take(self, window: bytes, at: int, stop: int) -> None:
        if self._string is not None:
            self._length += stop - at
            if self._length <= SHORT_CHARS:
                self._string += window[at:stop]
            return
        self._line += window[at:stop]
        if len(self._line) > _MOST_BYTES:
            raise UserError(
                f"{self._place}: more than {_MOST_BYTES >> 20} MiB beside its long texts; ask the engine for "
                "less, such as no logprobs and no hidden states"
            )

    def _mark(self, mark: bytes, at: int) -> Iterator[_Line]:
        """A quote, a backslash in a text, or the line's end."""
        if mark == b"\n":
            if self._string is not None:
                raise UserError(f"{self._place}: a text in it does not end; drop the line")
            yield from self._ended()
            self.number += 1
        elif mark == b"\\":
            self._is_escaped = self._has_escapes = True
            self._take(mark, 0, 1)
        elif self._string is None:
            self._string, self._start, self._length, self._has_escapes = bytearray(), at + 1, 0, False
        else:
            if self._length <= SHORT_CHARS:
                self._line += b'"' + self._string + b'"'
            else:
                self._line += b'{"%s": %d}' % (self.key.encode(), len(self._texts))
                self._texts.append(Text(self._start, self._length, self._has_escapes))
            self._string = None

    def _ended(self) -> Iterator[_Line]:
        if self._line.strip():
            yield _Line(self.number, bytes(self._line), self._texts)
        self._line, self._texts = bytearray(), []


def _next(window: bytes, at: int, in_string: bool) -> int:
    """Where the next character stands that means something; the window's length if there is none."""
    near = min(at + _NEAR_BYTES, len(window))
    found = (_INSIDE if in_string else _OUTSIDE).search(window, at, near)
    if found is not None:
        return found.start()
    marks = (b'"', b"\\", b"\n") if in_string else (b'"', b"\n")
    places = (window.find(mark, near) for mark in marks)  # ten times as fast over a long text
    return min((place for place in places if place >= 0), default=len(window))
