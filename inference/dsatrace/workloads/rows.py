"""Rows of a data set: read one by one, and what happens to those that cannot be used.

A reader cuts its file into pieces, one per row, and parses each. A piece that cannot be used
raises `BadRow`, and the policy decides: `fail` ends the run with one line that names file,
row and column; `skip` counts the row by its reason. Knows JSON, but no file's layout.

    bad_rows = BadRows("skip")
    rows = list(read_rows("chats.jsonl", pieces, parse, bad_rows))
    bad_rows.text()       # "2 bad rows skipped: 1 missing column, 1 not JSON"
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NoReturn, TypeVar, get_args

from dsatrace.errors import UserError
from dsatrace.text import counted

Policy = Literal["fail", "skip"]
Piece = TypeVar("Piece")
Parsed = TypeVar("Parsed")
Timed = TypeVar("Timed")

SORT_WINDOW = 10_000
"""Rows within which those of a log are put in the order of their times."""

UTF8_BOM = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BUFFER_BYTES = 1 << 20
_WIDE_BOMS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


class BadRow(Exception):
    """Why a row cannot be used: `reason` is a fixed phrase to count by, `detail` is about this row.

    A detail never quotes a prompt or an answer: they do not belong in a log.
    """

    def __init__(self, reason: str, detail: str = "", column: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.column = column


class BadRows:
    """The policy of a data source, and the skipped rows by reason, over all readings."""

    def __init__(self, policy: Policy = "fail") -> None:
        if policy not in get_args(Policy):
            raise UserError(f"unknown policy {policy!r} for bad rows; use fail or skip")
        self.policy = policy
        self.counts: Counter[str] = Counter()

    def reject(self, place: str, fault: BadRow) -> None:
        """Raises a `UserError` under `fail`; counts under `skip`. `place` names file and row."""
        if self.policy == "fail":
            column = "" if fault.column is None else f", column {fault.column!r}"
            raise UserError(
                f"{place}{column}: {fault}; mend the row, or pass over such rows with --bad-rows skip"
            ) from fault
        self.counts[fault.reason] += 1

    def text(self) -> str:
        """One line for the terminal."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{counted(self.counts.total(), 'bad row')} skipped" + (f": {reasons}" if reasons else "")

    def summary(self) -> dict[str, object]:
        """The same for `summary.json`."""
        counts = dict(sorted(self.counts.items()))
        return {"policy": self.policy, "num_skipped": self.counts.total(), "by_reason": counts}


def read_rows(
    source: str,
    pieces: Iterable[tuple[str, Piece]],
    parse: Callable[[int, Piece], Parsed],
    bad_rows: BadRows,
) -> Iterator[Parsed]:
    """Parses (place, piece) pairs with their row numbers, from 0; a place is, say, `line 4`.

    A source without a usable row raises a `UserError` under either policy.
    """
    num_rows = num_usable = 0
    for row, (place, piece) in enumerate(pieces):
        num_rows += 1
        try:
            parsed = parse(row, piece)
        except BadRow as fault:
            bad_rows.reject(f"{source}: row {row} ({place})", fault)
            continue
        num_usable += 1
        yield parsed
    if not num_rows:
        raise UserError(f"{source}: the file holds no rows")
    if not num_usable:
        raise UserError(f"{source}: none of its {counted(num_rows, 'row')} can be used: {bad_rows.text()}")


def open_source(path: str | Path) -> BinaryIO:
    """The file, unpacked if it is gzip's or zstd's, past a UTF-8 byte order mark; it cannot be sought.

    One of another encoding is refused. Reading raises a `UserError` where a packed file is damaged.
    """
    try:
        file: BinaryIO = Path(path).open("rb")  # noqa: SIM115  (the caller closes it)
        start = file.read(4)
        file.seek(0)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read the file: {reason}; give a regular, readable file") from error
    if start.startswith((_GZIP, _ZSTD)):
        unpacked = io.BufferedReader(_Unpacked(path, file, start.startswith(_GZIP)), _BUFFER_BYTES)
        file, start = unpacked, unpacked.peek(4)[:4]
    for mark, encoding in _WIDE_BOMS.items():
        if start.startswith(mark):
            file.close()
            raise UserError(f"{path}: the file is {encoding}; convert it to UTF-8")
    if start.startswith(UTF8_BOM):
        file.read(len(UTF8_BOM))
    return file


class _Unpacked(io.RawIOBase):
    """What a gzip or zstd file holds."""

    def __init__(self, path: str | Path, packed: BinaryIO, is_gzip: bool) -> None:
        self._path, self._packed = path, packed
        self._stream: Any
        if is_gzip:
            self._stream = gzip.GzipFile(fileobj=packed)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(packed, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{self._path}: the packed file is damaged or cut off: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._packed.close()
        super().close()


def numbered_lines(stream: IO[bytes], max_bytes: int, first: int = 1) -> Iterator[tuple[str, bytes | None]]:
    """("line 3", its bytes) of every line that is not blank; None for the bytes of a line too long."""
    number = first
    while (line := read_line(stream, max_bytes)) != b"":
        if number == 1 and line is not None:
            line = line.removeprefix(UTF8_BOM)
        if line is None or line.strip():
            yield f"line {number}", line
        number += 1


def read_line(stream: IO[bytes], max_bytes: int) -> bytes | None:
    """The next line, empty at the end of the stream; a line of more than `max_bytes` is skipped: None."""
    line = stream.readline(max_bytes + 1)
    if len(line) <= max_bytes:
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(max_bytes)
    return None


def text_column(row: Mapping[str, object], column: str) -> str:
    """A column that must hold text that UTF-8 can hold."""
    if column not in row:
        raise BadRow("missing column", column=column)
    return text_value(row[column], column)


def optional_text(row: Mapping[str, object], column: str) -> str:
    """The same, but "" for a column that is missing or null."""
    value = row.get(column)
    return "" if value is None else text_value(value, column)


def text_value(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow("not a text", f"it is of type {type(value).__name__}", column)
    return unicode_text(value, column)


def unicode_text(value: str, column: str) -> str:
    """Passes on text that UTF-8 can hold; JSON's `\\ud83d` without its other half is not."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"at character {error.start}", column) from error
    return value


def choice_column(row: Mapping[str, object], column: str, choices: tuple[str, ...]) -> str:
    """A column that must hold one of a few words."""
    value = text_column(row, column)
    if value not in choices:
        raise BadRow("unknown value", f"use one of {', '.join(choices)}", column)
    return value


class Clock:
    """Refuses a time before the latest one."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._latest = 0.0

    def advance(self, time: float) -> None:
        if time < self._latest:
            raise BadRow("timestamp runs backwards", f"{time} after {self._latest}", self._column)
        self._latest = time


def in_order(
    source: str, rows: Iterable[tuple[float, Timed]], counts: Counter[str], moved: str
) -> Iterator[tuple[float, Timed]]:
    """Rows by their times; `counts[moved]` has those that came after a later one.

    Reads `SORT_WINDOW` rows ahead. Raises a `UserError` for a row whose place is further before it.
    """
    waiting: list[tuple[float, int, Timed]] = []
    latest_s = given_s = -math.inf

    def take() -> tuple[float, Timed]:
        nonlocal given_s
        time_s, _, row = heapq.heappop(waiting)
        if time_s < given_s:
            raise UserError(
                f"{source}: a row is {given_s - time_s:.6g} s earlier than one that stands over "
                f"{SORT_WINDOW:,} rows before it; sort the log by time"
            )
        given_s = time_s
        return time_s, row

    for number, (time_s, row) in enumerate(rows):
        counts[moved] += time_s < latest_s
        latest_s = max(latest_s, time_s)
        heapq.heappush(waiting, (time_s, number, row))
        if len(waiting) > SORT_WINDOW:
            yield take()
    while waiting:
        yield take()


def check_limit(name: str, limit: int | None) -> None:
    """A number of rows is None (all of them) or at least 1."""
    if limit is not None and limit < 1:
        raise UserError(f"{name} must be at least 1, not {limit}; leave it out for all rows")


def json_object(data: bytes | bytearray, offset: int = 0) -> dict[str, Any]:
    """The JSON object of one row that begins at byte `offset`; raises `BadRow` for anything else."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"at byte {offset + error.start}") from error
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        byte = offset + len(text[: error.pos].encode())
        raise BadRow("not JSON", f"{error.msg.removesuffix(' at')} at byte {byte}") from error
    except RecursionError as error:
        raise BadRow("not JSON", "it is nested too deeply") from error
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise BadRow("not JSON", str(error)) from error
    if not isinstance(row, dict):
        raise BadRow("not an object", f"it is of type {type(row).__name__}")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
