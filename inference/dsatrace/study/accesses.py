"""Requests and the blocks that each one asks for, as two files that any verb reads instead of text.

`requests.jsonl` and `accesses.jsonl` have one line per request, in the order of the replay:

    {"request": 0, "arrival_s": 0.0, "conversation_id": "c0", "turn": 0, "workload": "qa",
     "num_tokens": 40, "num_output_tokens": 9, "arrivals": "assumed"}
    {"request": 0, "time_s": 0.0, "block_size": 16, "block_ids": [0, 1], "output_block_ids": [2]}

`block_ids` are the full blocks of the prompt, `output_block_ids` those that the output
completes. An id stands for a block and everything before it, so equal ids are equal prefixes.
`arrivals` says whether times were recorded or assumed (as without it).
The files hold no token id and no text.

    write_accesses(folder, requests, block_trace(requests, 16))
    requests = read_accesses(folder)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.requests import UNKNOWN, RequestsBuilder, StudyRequests
from dsatrace.text import counted
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.private_file import private_file
from dsatrace.workloads.rows import BadRow, BadRows, Clock, text_column
from dsatrace.workloads.trace_rows import (
    ARRIVALS,
    MAX_COUNT,
    count_column,
    number_column,
    recorded_column,
    times_text,
)

REQUESTS_FILE, ACCESSES_FILE = "requests.jsonl", "accesses.jsonl"


def write_accesses(folder: Path, requests: StudyRequests, trace: BlockTrace) -> None:
    """Replaces both files; raises a `UserError` if they cannot be written. `trace` is of the requests."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    names = [*requests.conversation_ids, ""]  # UNKNOWN is -1: the last one
    with private_file(folder / REQUESTS_FILE) as of_requests, private_file(folder / ACCESSES_FILE) as file:
        for request in requests:
            i = request.index
            row = {
                "request": i,
                "arrival_s": request.arrival_s,
                "conversation_id": names[request.conversation],
                "turn": request.turn,
                "workload": request.workload,
                "num_tokens": request.num_prompt_tokens,
                "num_output_tokens": request.num_response_tokens,
                ARRIVALS: times_text(requests.times_recorded),
            }
            keys = trace.keys[trace.key_ptr[i] : trace.key_ptr[i + 1]]
            num_full = request.num_prompt_tokens // trace.block_size
            access = {
                "request": i,
                "time_s": request.arrival_s,
                "block_size": trace.block_size,
                "block_ids": keys[:num_full],
                "output_block_ids": keys[num_full:],
            }
            of_requests.write(orjson.dumps(row, option=options))
            file.write(orjson.dumps(access, option=options))


def read_accesses(folder: Path, bad_rows: BadRows | None = None) -> StudyRequests:
    """Reads what `write_accesses` wrote; raises a `UserError` naming file and row for anything else.

    Row i of one file belongs to row i of the other, so no bad row can be skipped.
    """
    if bad_rows is not None and bad_rows.policy == "skip":
        raise UserError(f"{folder}: access files pair row by row; mend them, --bad-rows skip cannot")
    rows = list(_read(folder / REQUESTS_FILE, "arrival_s", _request))
    accesses = list(_read(folder / ACCESSES_FILE, "time_s", _access))
    if len(rows) != len(accesses):
        raise UserError(
            f"{folder}: {counted(len(rows), 'row')} in {REQUESTS_FILE} but {len(accesses):,} in "
            f"{ACCESSES_FILE}; take both from one study run"
        )
    block_size = accesses[0]["block_size"]
    builder = RequestsBuilder(block_size)
    for number, (row, access) in enumerate(zip(rows, accesses, strict=True)):
        _check_pair(f"{folder / ACCESSES_FILE}: row {number}", row, access, block_size)
        name = row["conversation_id"]
        builder.add(
            row["arrival_s"],
            access["block_ids"],
            access["output_block_ids"],
            num_prompt_tokens=row["num_tokens"],
            num_response_tokens=row["num_output_tokens"],
            conversation=(row["workload"], name) if name else (),
            turn=row["turn"],
            workload=row["workload"],
            recorded=row["recorded"],
        )
    return builder.build()


def _read(path: Path, time_column: str, parse: Any) -> Iterator[dict[str, Any]]:
    clock = Clock(time_column)

    def checked(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        if count_column(row, "request") != number:
            raise BadRow("requests out of order", f"expected request {number}", "request")
        time = number_column(row, time_column)
        clock.advance(time)
        return {time_column: time, **parse(row)}

    yield from read_json_rows(path, checked, BadRows())


def _request(row: Mapping[str, Any]) -> dict[str, Any]:
    turn = row.get("turn")
    return {
        "conversation_id": text_column(row, "conversation_id"),
        "turn": UNKNOWN if turn == UNKNOWN else count_column(row, "turn"),
        "workload": text_column(row, "workload"),
        "num_tokens": count_column(row, "num_tokens"),
        "num_output_tokens": count_column(row, "num_output_tokens"),
        "recorded": recorded_column(row),
    }


def _access(row: Mapping[str, Any]) -> dict[str, Any]:
    block_size = count_column(row, "block_size")
    if block_size < 1:
        raise BadRow("block size below 1", column="block_size")
    return {
        "block_size": block_size,
        "block_ids": _ids(row, "block_ids"),
        "output_block_ids": _ids(row, "output_block_ids"),
    }


def _ids(row: Mapping[str, Any], column: str) -> list[int]:
    values = row.get(column)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise BadRow("not a list of whole numbers", column=column)
    if values and not 0 <= min(values) <= max(values) <= MAX_COUNT:
        raise BadRow("block id out of range", f"ids lie between 0 and {MAX_COUNT}", column)
    return values


def _check_pair(place: str, row: Mapping[str, Any], access: Mapping[str, Any], block_size: int) -> None:
    if access["block_size"] != block_size:
        raise UserError(f"{place}: block size {access['block_size']} after {block_size}; use one a file")
    num_full = row["num_tokens"] // block_size
    num_all = (row["num_tokens"] + row["num_output_tokens"]) // block_size
    num_ids, num_output_ids = len(access["block_ids"]), len(access["output_block_ids"])
    if num_ids > num_full or num_ids + num_output_ids > num_all:
        raise UserError(
            f"{place}: more block ids than the request's {row['num_tokens']} + "
            f"{row['num_output_tokens']} tokens fill; {REQUESTS_FILE} is of another run"
        )
    if num_output_ids and num_ids < num_full:
        raise UserError(f"{place}: output_block_ids without the ids of all {num_full} blocks of the prompt")
