"""Published logs of requests without text: an id per block of the prompt, or an id per token.

A block's id stands for the block and everything before it, so equal ids are equal prefixes;
the last id of a prompt may stand for a partial block. Two layouts have ids of blocks:

    mooncake   512 tokens per block, `timestamp` in ms:
               {"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [0, 1]}
    bailian    16 tokens per block, `timestamp` in s, and `chat_id`, `parent_chat_id` (-1 for a
               chat's first turn), `turn` (from 1) and `type`

Serving simulators keep token ids. Their vocabulary is not recorded, and a cache does not need
it. Such ids are as good as text, so keep the files private:

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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRow, BadRows, Clock
from dsatrace.workloads.trace_rows import count_column, id_column, number_column, write_lines_by_time

MAX_TIMESTAMP = 1e13  # in the file's unit; three centuries of milliseconds
MAX_ARRIVAL_NS = 1e19  # three centuries
MAX_TOKENS = 100_000_000
NO_PARENT = "-1"


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


def hash_id_format(name: str) -> HashIdFormat:
    if name not in FORMATS:
        raise UserError(f"unknown trace layout {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def hash_id_format_of(columns: Iterable[str]) -> HashIdFormat:
    """The layout of a row: with a `chat_id` it is Bailian's, else Mooncake's."""
    return BAILIAN if "chat_id" in columns else MOONCAKE


def read_hash_ids(
    path: str | Path, layout: HashIdFormat | None = None, bad_rows: BadRows | None = None
) -> Iterator[HashIdRow]:
    """Streams the rows; `layout` is that of the first usable row unless given.

    A row is bad if the number of ids contradicts the prompt's length, if the prompt is empty, a
    field missing, negative or of another type, the timestamp before the last good row's, or the
    line cut off.
    """
    clock = Clock("timestamp")
    kind = layout or next(read_json_rows(path, lambda _, row: hash_id_format_of(row), BadRows("skip")))

    def parse(_: int, row: Mapping[str, Any]) -> HashIdRow:
        arrival = number_column(row, "timestamp", MAX_TIMESTAMP)
        num_prompt_tokens = count_column(row, "input_length", MAX_TOKENS)
        num_response_tokens = count_column(row, "output_length", MAX_TOKENS)
        hash_ids = id_array(row, "hash_ids", "q")
        _check_length(num_prompt_tokens, len(hash_ids), kind)
        chat = _chat(row) if kind.has_chats else {}
        clock.advance(arrival)
        arrival_s = arrival * kind.timestamp_unit_s
        return HashIdRow(arrival_s, num_prompt_tokens, num_response_tokens, hash_ids, **chat)

    yield from read_json_rows(path, parse, bad_rows or BadRows())


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
    turn = count_column(row, "turn")
    if turn < 1:
        raise BadRow("number too small", "turns count from 1", "turn")
    parent = id_column(row, "parent_chat_id")
    return {
        "chat_id": id_column(row, "chat_id"),
        "parent_chat_id": "" if parent == NO_PARENT else parent,
        "turn": turn - 1,
        "workload": id_column(row, "type"),
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
        return TokenIdRow(arrival_ns * 1e-9, prompt_ids, response_ids)

    yield from read_json_rows(path, parse, bad_rows or BadRows())
