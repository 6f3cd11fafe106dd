"""Files of requests: any known kind is read, and requests by tokens are turned into block ids.

Four kinds are told apart by the first usable row: text (`prompt`), token ids (`input_tok_ids`),
block ids of Mooncake (`hash_ids`) and of Bailian (`chat_id` beside them). The fifth is a folder of
`study run --write-accesses`, or its `accesses.jsonl`. Block ids can be published where text
cannot: they tell which prefixes are equal, and nothing else.

    requests = read_requests("conversation_trace.jsonl", tokenizer, BadRows("skip"), counts)
    write_hash_ids("ids.jsonl", hash_id_rows(requests, MOONCAKE), MOONCAKE)
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.study.accesses import ACCESSES_FILE, read_accesses
from dsatrace.study.requests import UNKNOWN, Progress, RequestsBuilder, StudyRequest, StudyRequests
from dsatrace.study.tokenization import tokenize_rows
from dsatrace.workloads.encoding import Vocabulary
from dsatrace.workloads.id_logs import (
    HashIdFormat,
    HashIdRow,
    TokenIdRow,
    hash_id_format_in,
    read_hash_ids,
    read_token_ids,
)
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.trace_rows import read_trace_rows

ORPHANS = "turns whose parent chat is not in the trace"
_ROOT = -1


def read_requests(
    path: str | Path,
    vocabulary: Vocabulary,
    bad_rows: BadRows | None = None,
    counts: Counter[str] | None = None,
    progress: Progress | None = None,
) -> StudyRequests:
    """The requests of a file; `vocabulary` encodes text.

    `counts` receives the number of `ORPHANS`, `bad_rows` the rows that could not be read.
    """
    path = Path(path)
    if path.is_dir() or path.name == ACCESSES_FILE:
        return read_accesses(path if path.is_dir() else path.parent, bad_rows)
    first = _first_row(path)
    if "prompt" in first:
        return tokenize_rows(read_trace_rows(path, bad_rows), vocabulary, progress)
    if "input_tok_ids" in first:
        return requests_from_token_ids(read_token_ids(path, bad_rows))
    if "hash_ids" in first:
        layout = hash_id_format_in(path)
        return requests_from_hash_ids(read_hash_ids(path, layout, bad_rows), layout, counts)
    raise UserError(
        f"{path}: not a request trace: its first row has no column prompt, input_tok_ids or hash_ids; "
        "make one from conversations with `dsatrace study prepare`"
    )


def holds_text(path: Path) -> bool:
    """Whether a file or folder that `read_requests` takes needs a tokenizer."""
    return not path.is_dir() and path.name != ACCESSES_FILE and "prompt" in _first_row(path)


def _first_row(path: Path) -> dict[str, Any]:
    """The first usable one."""
    return next(read_json_rows(path, lambda _, row: row, BadRows("skip")))


def requests_from_token_ids(rows: Iterable[TokenIdRow]) -> StudyRequests:
    builder = RequestsBuilder()
    for row in rows:
        builder.add(
            row.arrival_s,
            row.prompt_ids,
            row.response_ids,
            conversation=(row.conversation_id,) if row.conversation_id else (),
            turn=row.turn,
            recorded=row.recorded,
        )
    return builder.build()


def requests_from_hash_ids(
    rows: Iterable[HashIdRow], layout: HashIdFormat, counts: Counter[str] | None = None
) -> StudyRequests:
    """Requests by block ids, whose responses have a number of tokens and no ids.

    A chat belongs to the conversation of its parent, which is named after its first chat. A chat
    whose parent did not come before it begins a conversation and is counted in `counts[ORPHANS]`.
    """
    builder = RequestsBuilder(layout.tokens_per_block)
    roots: dict[str, str] = {}
    for row in rows:
        if counts is not None and row.parent_chat_id and row.parent_chat_id not in roots:
            counts[ORPHANS] += 1
        if row.chat_id:
            roots[row.chat_id] = roots.get(row.parent_chat_id, row.chat_id)
        builder.add(
            row.arrival_s,
            row.hash_ids,
            num_prompt_tokens=row.num_prompt_tokens,
            num_response_tokens=row.num_response_tokens,
            conversation=(roots[row.chat_id],) if row.chat_id else (),
            turn=row.turn,
            workload=row.workload,
            recorded=row.recorded,
        )
    return builder.build()


def hash_id_rows(requests: StudyRequests, layout: HashIdFormat) -> Iterator[HashIdRow]:
    """The rows in order. Each block is numbered by its content and all before it, by first use.

    In a layout with chats each row is a chat. Its parent is the conversation's row before it, and
    `turn` counts the conversation's rows, so that turns stay consecutive if a filter dropped some.
    A request of no known conversation has no parent. Raises a `UserError` for requests that are
    block ids already, unless of the layout's size.
    """
    if requests.tokens_per_id not in (1, layout.tokens_per_block):
        raise UserError(
            f"a trace of {requests.tokens_per_id}-token blocks cannot become one of "
            f"{layout.tokens_per_block}; write the layout it came from"
        )
    interned: dict[tuple[int, bytes], int] = {}
    latest: dict[int, tuple[str, int]] = {}
    for request in requests:
        chat: dict[str, object] = {}
        if layout.has_chats:
            parent, turn = latest.get(request.conversation, ("", 0))
            chat = {
                "chat_id": str(request.index),
                "parent_chat_id": parent,
                "turn": turn,
                "workload": request.workload,
            }
            if request.conversation != UNKNOWN:
                latest[request.conversation] = (str(request.index), turn + 1)
        yield HashIdRow(
            arrival_s=request.arrival_s,
            num_prompt_tokens=request.num_prompt_tokens,
            num_response_tokens=request.num_response_tokens,
            hash_ids=_block_ids(request, requests.tokens_per_id, layout, interned),
            recorded=requests.times_recorded,
            **chat,  # type: ignore[arg-type]
        )


def _block_ids(
    request: StudyRequest, tokens_per_id: int, layout: HashIdFormat, interned: dict[tuple[int, bytes], int]
) -> array[int]:
    if tokens_per_id != 1:
        return array("q", request.prompt_ids.tolist())
    data, width = request.prompt_ids.tobytes(), layout.tokens_per_block * request.prompt_ids.itemsize
    ids, parent = array("q"), _ROOT
    for at in range(0, len(data), width):
        parent = interned.setdefault((parent, data[at : at + width]), len(interned))
        ids.append(parent)
    return ids
