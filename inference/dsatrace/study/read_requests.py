"""Any trace file as requests in memory.

Tells four kinds of file apart by the first usable row: text (`prompt`), token ids
(`input_tok_ids`), block ids of Mooncake (`hash_ids`) and of Bailian (`chat_id` beside them).
Knows no option of a study.

    requests = read_requests("conversation_trace.jsonl", tokenizer, BadRows("skip"), counts)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.study.requests import StudyRequests
from dsatrace.study.requests_builder import RequestsBuilder
from dsatrace.study.tokenization import Progress, tokenize_rows
from dsatrace.workloads.encoding import Vocabulary
from dsatrace.workloads.id_logs import (
    HashIdFormat,
    HashIdRow,
    TokenIdRow,
    hash_id_format_of,
    read_hash_ids,
    read_token_ids,
)
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.trace_rows import read_trace_rows

ORPHANS = "turns whose parent chat is not in the trace"


def read_requests(
    path: str | Path,
    vocabulary: Vocabulary,
    bad_rows: BadRows | None = None,
    counts: Counter[str] | None = None,
    progress: Progress | None = None,
) -> StudyRequests:
    """The requests of a trace file; `vocabulary` encodes one that holds text.

    `counts` receives what the file lacks, `bad_rows` what could not be read.
    """
    columns = next(read_json_rows(path, lambda _, row: row.keys(), BadRows("skip")))
    if "prompt" in columns:
        return tokenize_rows(read_trace_rows(path, bad_rows), vocabulary, progress)
    if "input_tok_ids" in columns:
        return requests_from_token_ids(read_token_ids(path, bad_rows))
    if "hash_ids" in columns:
        layout = hash_id_format_of(columns)
        return requests_from_hash_ids(read_hash_ids(path, layout, bad_rows), layout, counts)
    raise UserError(
        f"{path}: not a request trace: its first row has no column prompt, input_tok_ids or hash_ids; "
        "make one from conversations with `dsatrace study prepare`"
    )


def requests_from_token_ids(rows: Iterable[TokenIdRow]) -> StudyRequests:
    builder = RequestsBuilder()
    for row in rows:
        builder.add(
            row.arrival_s,
            row.prompt_ids,
            row.response_ids,
            conversation=(row.conversation_id,) if row.conversation_id else (),
            turn=row.turn,
        )
    return builder.build()


def requests_from_hash_ids(
    rows: Iterable[HashIdRow], layout: HashIdFormat, counts: Counter[str] | None = None
) -> StudyRequests:
    """Requests by block ids. A chat belongs to its parent's conversation, named after its first chat.

    A chat whose parent did not come before it begins a conversation; `counts[ORPHANS]` says how
    many did. Responses have numbers of tokens and no ids.
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
        )
    return builder.build()
