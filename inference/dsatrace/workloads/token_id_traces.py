"""Traces of token ids, as serving simulators keep them: one JSON line a request.

    {"input_tok_ids": [...], "output_tok_ids": [...], "arrival_time_ns": 46926808}

`input_toks` and `output_toks` may stand beside them and must then agree. Which vocabulary
the ids are from is not recorded and does not matter to a cache. Ids are as good as text, so
keep such files private.

    for row in read_token_ids("trace.jsonl"):
        row.prompt_ids, row.response_ids
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.workloads.hash_id_traces import id_array
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRow, BadRows
from dsatrace.workloads.trace_rows import Clock, count_column, number_column

MAX_ARRIVAL_NS = 1e19  # three centuries


@dataclasses.dataclass(frozen=True)
class TokenIdRow:
    """One request by token ids; `conversation_id` is empty and `turn` -1 where a trace does not tell."""

    arrival_s: float
    prompt_ids: array[int]
    response_ids: array[int]
    conversation_id: str = ""
    turn: int = -1


def read_token_ids(path: str | Path, bad_rows: BadRows | None = None) -> Iterator[TokenIdRow]:
    """Streams the rows.

    Bad rows are those without a prompt, with a field missing, with an id that is none, with
    counts that contradict the ids, with an arrival before the last good row's, and a line cut off.
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
