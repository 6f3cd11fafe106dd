"""Published logs of requests without text: an id per block of the prompt, or an id per token.

A block's id stands for the block and everything before it, so equal ids are equal prefixes;
the last id of a prompt may stand for a partial block. Two layouts have ids of blocks:

    mooncake   512 tokens per block, `timestamp` in ms:
               {"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [0, 1]}
               and, if they are there, `block_size`, and `session_id` with a `delay` in ms
    bailian    16 tokens per block, `timestamp` in s, and `chat_id`; optional `parent_chat_id` (-1
               for a chat's first turn), `turn` (from 1) and `type`

Times were recorded unless `"arrivals": "assumed"` says otherwise. Serving simulators keep token ids.
Their vocabulary is not recorded, and a cache does not need it; their times are drawn, unless
`"arrivals": "recorded"` stands there. Such ids are as good as text, so keep the files private:

    {"input_tok_ids": [...], "output_tok_ids": [...], "arrival_time_ns": 46926808}

    for row in read_hash_ids("conversation_trace.jsonl"):
        row.arrival_s, row.hash_ids
    for row in read_token_ids("trace.jsonl"):
        row.prompt_ids, row.response_ids
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRow, BadRows, Clock
from dsatrace.workloads.trace_rows import (
    ARRIVALS,
    ASSUMED,
    count_column,
    id_column,
    number_column,
    recorded_column,
    write_lines_by_time,
)

MAX_TIMESTAMP = 1e13  # in the file's unit; three centuries of milliseconds
MAX_ARRIVAL_NS = 1e19  # three centuries
MAX_TOKENS = 100_000_000
NO_PARENT = "-1"
BLOCK_SIZE, SESSION = "block_size", "session_id"
DELAYED = "requests timed by a delay after the session's request before"


@dataclasses.dataclass(frozen=True)
class HashIdFormat:
    """A layout: how many tokens an id stands for, the timestamp's unit, and whether rows name chats."""

    name: str
    tokens_per_block: int
    timestamp_unit_s: float
    has_chats: bool


MOONCAKE = HashIdFormat("mooncake", tokens_per_block=512, timestamp_unit_s=1e-3, has_chats=False)
BAILIAN = HashIdFormat("bailian", tokens_per_block=16, timestamp_unit_s=1.0, has_chats=True)
FORMATS = {layout.name: layout for layout in (MOONCAKE, BAILIAN)}


@dataclasses.dataclass(frozen=True)
class HashIdRow:
    """One request. `hash_ids` holds ceil(`num_prompt_tokens` / tokens per block) ids of at least 0.

    Only Bailian's rows have `chat_id`, `parent_chat_id`, `turn` (from 0) and `workload` (the type).
    """

    arrival_s: float
    num_prompt_tokens: int
    num_response_tokens: int
    hash_ids: array[int]
    chat_id: str = ""
    parent_chat_id: str = ""
    turn: int = -1
    workload: str = ""
    recorded: bool = True  # whether the arrival was


def hash_id_format_of(row: Mapping[str, Any]) -> HashIdFormat:
    """The layout of a row: with a `chat_id` it is Bailian's, else Mooncake's; with the row's `block_size`."""
    layout = BAILIAN if "chat_id" in row else MOONCAKE
    if BLOCK_SIZE not in row:
        return layout
    return dataclasses.replace(layout, tokens_per_block=max(1, count_column(row, BLOCK_SIZE, MAX_TOKENS)))


def hash_id_format_in(path: str | Path) -> HashIdFormat:
    """The layout of the first usable row."""
    return next(read_json_rows(path, lambda _, row: hash_id_format_of(row), BadRows("skip")))


def read_hash_ids(
    path: str | Path, layout: HashIdFormat | None = None, bad_rows: BadRows | None = None
) -> Iterator[HashIdRow]:
    """Streams the rows; `layout` is that of the first usable row unless given.

    A row is bad as for `HashIdReader`, and if its timestamp is before the last good row's.
    """
    layout = layout or hash_id_format_in(path)
    yield from HashIdReader(layout, bad_rows or BadRows(), clock=Clock("timestamp")).rows(path)


class HashIdReader:
    """Reads files of one log, whose ids and sessions go on from file to file.

    Ids need only be equal: what is no whole number from 0 to 2**63 - 1 is numbered from -1 down. A
    session's row without a timestamp arrives `delay` after the session's row before it, in the same unit.

    A row is bad if the number of ids contradicts the prompt's length, if the prompt is empty, a
    field missing or of another type, the block size another, or the line cut off. Bailian's
    `parent_chat_id`, `turn` and `type` may be missing.
    """

    def __init__(
        self,
        layout: HashIdFormat,
        bad_rows: BadRows,
        counts: Counter[str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._layout, self._bad_rows, self._clock = layout, bad_rows, clock
        self._counts = Counter() if counts is None else counts
        self._numbers: dict[int | str, int] = {}
        self._sessions: dict[str, tuple[float, int]] = {}  # arrival and turn of the latest row

    def rows(self, path: str | Path) -> Iterator[HashIdRow]:
        yield from read_json_rows(path, lambda _, row: self._parse(row), self._bad_rows)

    def _parse(self, row: Mapping[str, Any]) -> HashIdRow:
        layout = self._layout
        if BLOCK_SIZE in row and count_column(row, BLOCK_SIZE, MAX_TOKENS) != layout.tokens_per_block:
            raise BadRow("another block size", f"the log's is {layout.tokens_per_block} tokens", BLOCK_SIZE)
        session = id_column(row, SESSION) if not layout.has_chats and row.get(SESSION) is not None else ""
        arrival = self._arrival(row, session)
        num_prompt_tokens = count_column(row, "input_length", MAX_TOKENS)
        num_response_tokens = count_column(row, "output_length", MAX_TOKENS)
        hash_ids = self._hash_ids(row)
        _check_length(num_prompt_tokens, len(hash_ids), layout)
        chat = _chat(row) if layout.has_chats else {}
        if self._clock is not None:
            self._clock.advance(arrival)
        if session:
            turn = self._sessions.get(session, (0.0, -1))[1] + 1
            self._sessions[session] = (arrival, turn)
            chat = {"chat_id": session, "turn": turn}
        arrival_s = arrival * layout.timestamp_unit_s
        recorded = recorded_column(row, default=True)
        return HashIdRow(
            arrival_s, num_prompt_tokens, num_response_tokens, hash_ids, recorded=recorded, **chat
        )

    def _arrival(self, row: Mapping[str, Any], session: str) -> float:
        """In the layout's unit."""
        if "timestamp" not in row and "delay" in row and session in self._sessions:
            self._counts[DELAYED] += 1
            return self._sessions[session][0] + number_column(row, "delay", MAX_TIMESTAMP)
        return number_column(row, "timestamp", MAX_TIMESTAMP)

    def _hash_ids(self, row: Mapping[str, Any]) -> array[int]:
        ids = row.get("hash_ids")
        if isinstance(ids, list) and set(map(type, ids)) <= {int, str}:
            numbers = self._numbers
            ids = [
                i if isinstance(i, int) and 0 <= i < 1 << 63 else numbers.setdefault(i, -1 - len(numbers))
                for i in ids
            ]
            return array("q", ids)
        return id_array(row, "hash_ids", "q")  # which says what is wrong


def write_hash_ids(path: str | Path, rows: Iterable[HashIdRow], layout: HashIdFormat) -> int:
    """Writes the rows and returns their number; raises a `UserError` for one that could not be read back."""

    def lines() -> Iterator[tuple[float, bytes]]:
        for number, row in enumerate(rows):
            try:
                _check_length(row.num_prompt_tokens, len(row.hash_ids), layout)
            except BadRow as fault:
                raise UserError(f"{path}: row {number}: {fault}; use ids of {layout.name} blocks") from fault
            yield row.arrival_s, json.dumps(_fields(row, layout), ensure_ascii=False).encode() + b"\n"

    return write_lines_by_time(path, lines(), MAX_TIMESTAMP * layout.timestamp_unit_s)


def _fields(row: HashIdRow, layout: HashIdFormat) -> dict[str, object]:
    fields: dict[str, object] = {
        "timestamp": _timestamp(row.arrival_s, layout),
        "input_length": row.num_prompt_tokens,
        "output_length": row.num_response_tokens,
        "hash_ids": list(row.hash_ids),
    }
    if not row.recorded:
        fields[ARRIVALS] = ASSUMED
    if layout.has_chats:
        fields |= {
            "type": row.workload,
            "chat_id": _number_if_one(row.chat_id),
            "parent_chat_id": _number_if_one(row.parent_chat_id or NO_PARENT),
            "turn": row.turn + 1,
        }
    return fields


def _timestamp(arrival_s: float, layout: HashIdFormat) -> float:
    """Mooncake's are whole milliseconds, so arrivals are rounded to them."""
    return arrival_s if layout.timestamp_unit_s == 1 else round(arrival_s / layout.timestamp_unit_s)


def _number_if_one(name: str) -> int | str:
    is_number = name == NO_PARENT or (len(name) < 19 and name.isdecimal() and str(int(name)) == name)
    return int(name) if is_number else name


def _check_length(num_tokens: int, num_ids: int, layout: HashIdFormat) -> None:
    expected = -(-num_tokens // layout.tokens_per_block)
    if not num_tokens:
        raise BadRow("empty prompt", column="input_length")
    if num_ids != expected:
        raise BadRow(
            "ids contradict the length",
            f"{num_ids} ids, but {num_tokens} tokens are {expected} blocks of {layout.tokens_per_block}",
            "hash_ids",
        )


def _chat(row: Mapping[str, Any]) -> dict[str, Any]:
    turn = count_column(row, "turn") if "turn" in row else 0
    if turn < 1 and "turn" in row:
        raise BadRow("number too small", "turns count from 1", "turn")
    parent = id_column(row, "parent_chat_id") if "parent_chat_id" in row else NO_PARENT
    return {
        "chat_id": id_column(row, "chat_id"),
        "parent_chat_id": "" if parent == NO_PARENT else parent,
        "turn": turn - 1,
        "workload": id_column(row, "type") if "type" in row else "",
    }


def id_array(row: Mapping[str, Any], column: str, typecode: str) -> array[int]:
    """A column that must hold a list of whole numbers from 0 to the largest of `array`'s typecode."""
    if column not in row:
        raise BadRow("missing column", column=column)
    values = row[column]
    if not isinstance(values, list):
        raise BadRow("not a list", f"it is of type {type(values).__name__}", column)
    if not set(map(type, values)) <= {int}:
        raise BadRow("not a whole number", "in the list", column)
    try:
        ids = array(typecode, values)
    except OverflowError as error:
        raise BadRow("number too large", "in the list", column) from error
    if ids and min(ids) < 0:
        raise BadRow("negative number", "in the list", column)
    return ids


@dataclasses.dataclass(frozen=True)
class TokenIdRow:
    """One request by token ids; `conversation_id` is empty and `turn` -1 where the log does not tell."""

    arrival_s: float
    prompt_ids: array[int]
    response_ids: array[int]
    conversation_id: str = ""
    turn: int = -1
    recorded: bool = False  # whether the arrival was


def read_token_ids(path: str | Path, bad_rows: BadRows | None = None) -> Iterator[TokenIdRow]:
    """Streams the rows.

    A row is bad if the prompt is empty, a field missing, an id none, `input_toks` or
    `output_toks` not the number of ids, the arrival before the last good row's, or the line cut off.
    """
    clock = Clock("arrival_time_ns")

    def parse(_: int, row: Mapping[str, Any]) -> TokenIdRow:
        prompt_ids, response_ids = id_array(row, "input_tok_ids", "i"), id_array(row, "output_tok_ids", "i")
        if not prompt_ids:
            raise BadRow("empty prompt", column="input_tok_ids")
        for column, ids in (("input_toks", prompt_ids), ("output_toks", response_ids)):
            if column in row and count_column(row, column) != len(ids):
                raise BadRow("ids contradict the length", f"there are {len(ids)} ids", column)
        arrival_ns = number_column(row, "arrival_time_ns", MAX_ARRIVAL_NS)
        clock.advance(arrival_ns)
        return TokenIdRow(arrival_ns * 1e-9, prompt_ids, response_ids, recorded=recorded_column(row))

    yield from read_json_rows(path, parse, bad_rows or BadRows())
