"""Requests by tokens as a trace of block ids: what can be published when text cannot.

Each block of a prompt gets the number of its content together with everything before it,
counted from 0 in the order of first use, as the published traces have it. The ids tell
which prefixes are equal and nothing else. Knows no file.

    write_hash_ids("trace.jsonl", hash_id_rows(requests, MOONCAKE), MOONCAKE)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from dsatrace.errors import UserError
from dsatrace.study.requests import UNKNOWN, StudyRequest, StudyRequests
from dsatrace.workloads.id_logs import HashIdFormat, HashIdRow

_ROOT = -1


def hash_id_rows(requests: StudyRequests, layout: HashIdFormat) -> Iterator[HashIdRow]:
    """The rows in order. In a layout with chats, a request of no known conversation is a chat of its own.

    Each row is a chat; its parent is the conversation's row before it, and `turn` its place
    there, so that turns stay consecutive where a filter dropped some.
    Raises a `UserError` for requests that are block ids already, unless of the same size.
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
