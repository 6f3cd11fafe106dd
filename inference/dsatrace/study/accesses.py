"""Requests and the blocks that each one asks for, as two files that the sweeps read instead of text.

`requests.jsonl` and `accesses.jsonl` have one line per request, in the order of the replay:

    {"request": 0, "arrival_s": 0.0, "conversation_id": "c0", "turn": 0, "workload": "qa",
     "num_tokens": 40, "num_output_tokens": 9}
    {"request": 0, "time_s": 0.0, "block_size": 16, "block_ids": [0, 1], "output_block_ids": [2]}

`block_ids` are the full blocks of the prompt, `output_block_ids` those that the output
completes. An id stands for a block and everything before it, so equal ids are equal prefixes.
The files hold no token id and no text.

    write_accesses(folder, Accesses.of(requests, block_trace(requests, 16)))
    accesses = read_accesses(folder)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace, offsets_of
from dsatrace.study.requests import UNKNOWN, StudyRequests, take_ragged
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.private_file import private_file
from dsatrace.workloads.rows import BadRow, BadRows, text_column
from dsatrace.workloads.trace_rows import MAX_COUNT, Clock, count_column, number_column

REQUESTS_FILE, ACCESSES_FILE = "requests.jsonl", "accesses.jsonl"


@dataclasses.dataclass(frozen=True, eq=False)
class Accesses:
    """R requests by arrival; ragged rows are flat arrays with starts."""

    block_size: int  # tokens
    arrival_s: NDArray[np.float64]  # (R,)
    conversation_ids: tuple[str, ...]  # (R,), "" where the trace names none
    turn: NDArray[np.int32]  # (R,) from 0, or -1
    workloads: tuple[str, ...]  # (R,)
    num_tokens: NDArray[np.int64]  # (R,) of the prompt
    num_output_tokens: NDArray[np.int64]  # (R,)
    blocks: NDArray[np.int32]  # (all prompts' full blocks,)
    starts: NDArray[np.int64]  # (R + 1,)
    output_blocks: NDArray[np.int32]  # (full blocks that outputs complete,)
    output_starts: NDArray[np.int64]  # (R + 1,)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @classmethod
    def of(cls, requests: StudyRequests, trace: BlockTrace) -> Accesses:
        """From the same requests as tokens and as blocks."""
        num_full = np.minimum(trace.prompt_tokens // trace.block_size, np.diff(trace.key_ptr))
        in_prompt = np.arange(len(trace.keys)) < np.repeat(
            trace.key_ptr[:-1] + num_full, np.diff(trace.key_ptr)
        )
        names = [*requests.conversation_ids, ""]  # UNKNOWN is -1: the last one
        return cls(
            block_size=trace.block_size,
            arrival_s=trace.time_s,
            conversation_ids=tuple(names[i] for i in requests.conversation),
            turn=requests.turn,
            workloads=tuple(requests.workload_names[i] for i in requests.workload),
            num_tokens=trace.prompt_tokens,
            num_output_tokens=trace.output_tokens,
            blocks=trace.keys[in_prompt],
            starts=offsets_of(num_full),
            output_blocks=trace.keys[~in_prompt],
            output_starts=offsets_of(np.diff(trace.key_ptr) - num_full),
        )

    def take(self, rows: NDArray[np.int64]) -> Accesses:
        """The requests `rows` in that order."""
        starts, blocks = take_ragged(self.starts, self.blocks, rows)
        output_starts, output_blocks = take_ragged(self.output_starts, self.output_blocks, rows)
        return Accesses(
            block_size=self.block_size,
            arrival_s=self.arrival_s[rows],
            conversation_ids=tuple(self.conversation_ids[row] for row in rows),
            turn=self.turn[rows],
            workloads=tuple(self.workloads[row] for row in rows),
            num_tokens=self.num_tokens[rows],
            num_output_tokens=self.num_output_tokens[rows],
            blocks=blocks,
            starts=starts,
            output_blocks=output_blocks,
            output_starts=output_starts,
        )


def write_accesses(folder: Path, accesses: Accesses) -> None:
    """Replaces both files; raises a `UserError` if they cannot be written."""
    _write(folder / REQUESTS_FILE, _request_rows(accesses))
    _write(folder / ACCESSES_FILE, _access_rows(accesses))


def read_accesses(folder: Path, bad_rows: BadRows | None = None) -> Accesses:
    """Reads what `write_accesses` wrote; raises a `UserError` naming file and row for anything else.

    Row i of one file belongs to row i of the other, so no bad row can be skipped.
    """
    if bad_rows is not None and bad_rows.policy == "skip":
        raise UserError(f"{folder}: access files pair row by row; mend them, --bad-rows skip cannot")
    rows = list(_read(folder / REQUESTS_FILE, "arrival_s", _request))
    access_rows = list(_read(folder / ACCESSES_FILE, "time_s", _access))
    if len(rows) != len(access_rows):
        raise UserError(
            f"{folder}: {len(rows)} rows in {REQUESTS_FILE} but {len(access_rows)} in {ACCESSES_FILE}; "
            "take both from one study run"
        )
    block_size = access_rows[0]["block_size"]
    for number, (row, access) in enumerate(zip(rows, access_rows, strict=True)):
        _check_pair(f"{folder / ACCESSES_FILE}: row {number}", row, access, block_size)
    prompt, output = ([row[name] for row in access_rows] for name in ("block_ids", "output_block_ids"))
    return Accesses(
        block_size=block_size,
        arrival_s=np.array([row["arrival_s"] for row in rows], np.float64),
        conversation_ids=tuple(row["conversation_id"] for row in rows),
        turn=np.array([row["turn"] for row in rows], np.int32),
        workloads=tuple(row["workload"] for row in rows),
        num_tokens=np.array([row["num_tokens"] for row in rows], np.int64),
        num_output_tokens=np.array([row["num_output_tokens"] for row in rows], np.int64),
        blocks=np.concatenate([np.zeros(0, np.int32), *prompt]),
        starts=offsets_of(np.array([len(ids) for ids in prompt], np.int64)),
        output_blocks=np.concatenate([np.zeros(0, np.int32), *output]),
        output_starts=offsets_of(np.array([len(ids) for ids in output], np.int64)),
    )


def _request_rows(accesses: Accesses) -> Iterator[dict[str, Any]]:
    for i in range(len(accesses)):
        yield {
            "request": i,
            "arrival_s": float(accesses.arrival_s[i]),
            "conversation_id": accesses.conversation_ids[i],
            "turn": int(accesses.turn[i]),
            "workload": accesses.workloads[i],
            "num_tokens": int(accesses.num_tokens[i]),
            "num_output_tokens": int(accesses.num_output_tokens[i]),
        }


def _access_rows(accesses: Accesses) -> Iterator[dict[str, Any]]:
    starts, output_starts = accesses.starts, accesses.output_starts
    for i in range(len(accesses)):
        yield {
            "request": i,
            "time_s": float(accesses.arrival_s[i]),
            "block_size": accesses.block_size,
            "block_ids": accesses.blocks[starts[i] : starts[i + 1]],
            "output_block_ids": accesses.output_blocks[output_starts[i] : output_starts[i + 1]],
        }


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    with private_file(path) as file:
        for row in rows:
            file.write(orjson.dumps(row, option=options))


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


def _ids(row: Mapping[str, Any], column: str) -> NDArray[np.int32]:
    values = row.get(column)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise BadRow("not a list of whole numbers", column=column)
    if values and not 0 <= min(values) <= max(values) <= MAX_COUNT:
        raise BadRow("block id out of range", f"ids lie between 0 and {MAX_COUNT}", column)
    return np.array(values, np.int32)


def _check_pair(place: str, row: Mapping[str, Any], access: Mapping[str, Any], block_size: int) -> None:
    if access["block_size"] != block_size:
        raise UserError(f"{place}: block size {access['block_size']} after {block_size}; use one a file")
    num_full = row["num_tokens"] // block_size
    num_all = (row["num_tokens"] + row["num_output_tokens"]) // block_size
    num_ids = len(access["block_ids"])
    if num_ids > num_full or num_ids + len(access["output_block_ids"]) > num_all:
        raise UserError(
            f"{place}: more block ids than the request's {row['num_tokens']} + "
            f"{row['num_output_tokens']} tokens fill; {REQUESTS_FILE} is of another run"
        )
