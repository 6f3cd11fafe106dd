"""Logs of requests as JSON lines: what was asked, what was answered, and when.

    {"prompt": "...", "response": "...", "conversation_id": "c0", "turn_index": 0, "timestamp": 0.0}

and, where known, `mode` and `workload`. Rows are in the order of their timestamps, which are
seconds. `time` is read as `timestamp`. `arrivals` says whether somebody recorded them
(`recorded`), or they were drawn (`assumed`, as without it). The rows hold text, so the files written here are
readable by their owner only. Knows no tokenizer.

    num_rows = write_trace_rows("trace.jsonl", rows)
    for row in read_trace_rows("trace.jsonl", BadRows("skip")):
        ...
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.private_file import private_file
from dsatrace.workloads.rows import BadRow, BadRows, Clock, choice_column, optional_text, text_column

SINGLE_TURN, MULTI_TURN = "single_turn", "multi_turn"
MAX_TIMESTAMP_S = 1e10  # three centuries: room for dates counted from 1970
MAX_COUNT = 2**31 - 1
ARRIVALS, RECORDED, ASSUMED = "arrivals", "recorded", "assumed"


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """One request. `mode` and `workload` are labels to group by; empty means not given."""

    prompt: str
    response: str
    conversation_id: str
    turn_index: int  # counts the conversation's user turns from 0
    timestamp: float  # seconds
    mode: str = ""
    workload: str = ""
    recorded: bool = False  # whether the timestamp was


def read_trace_rows(path: str | Path, bad_rows: BadRows | None = None) -> Iterator[TraceRow]:
    """Streams the rows of JSON lines or of a JSON array; unknown fields are ignored.

    A row is bad if a field is missing or of another type, if the prompt is empty, a number
    negative, the `timestamp` before the last good row's, or the line cut off.
    """
    clock = Clock("timestamp")

    def parse(_: int, row: Mapping[str, Any]) -> TraceRow:
        time_column = "timestamp" if "timestamp" in row else "time"
        parsed = TraceRow(
            prompt=text_column(row, "prompt"),
            response=text_column(row, "response"),
            conversation_id=id_column(row, "conversation_id"),
            turn_index=count_column(row, "turn_index"),
            timestamp=number_column(row, time_column if time_column in row else "timestamp"),
            mode=optional_text(row, "mode"),
            workload=optional_text(row, "workload"),
            recorded=recorded_column(row),
        )
        if not parsed.prompt:
            raise BadRow("empty prompt", column="prompt")
        clock.advance(parsed.timestamp)
        return parsed

    yield from read_json_rows(path, parse, bad_rows or BadRows())


def write_trace_rows(path: str | Path, rows: Iterable[TraceRow]) -> int:
    """Writes the rows and returns their number; raises a `UserError` for one that could not be read back."""

    def lines() -> Iterator[tuple[float, bytes]]:
        for number, row in enumerate(rows):
            fields = dataclasses.asdict(row)
            fields[ARRIVALS] = times_text(fields.pop("recorded"))
            for label in ("mode", "workload"):
                if not fields[label]:
                    del fields[label]
            try:
                line = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError as error:
                raise UserError(f"{path}: row {number} holds a lone surrogate, which is no text") from error
            yield row.timestamp, line

    return write_lines_by_time(path, lines(), MAX_TIMESTAMP_S)


def write_lines_by_time(path: str | Path, lines: Iterable[tuple[float, bytes]], largest: float) -> int:
    """Writes (time, line) pairs in the order of their times, from 0 to `largest`; returns how many."""
    latest, number = 0.0, 0
    with private_file(path) as file:
        for time, line in lines:
            if not latest <= time <= largest:  # so written, it catches nan too
                raise UserError(
                    f"{path}: row {number} has the timestamp {time} after {latest}; "
                    "give rows sorted by time, none negative"
                )
            file.write(line)
            latest = time
            number += 1
    return number


def recorded_column(row: Mapping[str, Any], default: bool = False) -> bool:
    """Whether a row's time was recorded: what its column `arrivals` says, else `default`."""
    return default if ARRIVALS not in row else choice_column(row, ARRIVALS, (RECORDED, ASSUMED)) == RECORDED


def times_text(recorded: bool) -> str:
    """What the column `arrivals` holds."""
    return RECORDED if recorded else ASSUMED


def number_column(row: Mapping[str, Any], column: str, largest: float = MAX_TIMESTAMP_S) -> float:
    """A column that must hold a number from 0 to `largest`."""
    if column not in row:
        raise BadRow("missing column", column=column)
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("not a number", f"it is of type {type(value).__name__}", column)
    if value < 0:
        raise BadRow("negative number", column=column)
    if not value <= largest:
        raise BadRow("number too large", f"it is over {largest:g}", column)
    return math.fabs(value)  # without the sign of -0.0


def count_column(row: Mapping[str, Any], column: str, largest: int = MAX_COUNT) -> int:
    """A column that must hold a whole number from 0 to `largest`."""
    value = number_column(row, column, largest)
    if not value.is_integer():
        raise BadRow("not a whole number", column=column)
    return int(value)


def id_column(row: Mapping[str, Any], column: str) -> str:
    """A name, which some traces give as a number."""
    value = row.get(column)
    if not isinstance(value, int) or isinstance(value, bool):
        return text_column(row, column)
    if abs(value) >= 1 << 63:
        raise BadRow("number too large", "a name has 63 bits at most", column)
    return str(value)
