"""Reads transcripts: lines of ids, of text or of messages, or the requests of a run that kept its ids.

Knows no model; text becomes ids by the `Chat` that the caller makes, only where there is text.

    transcripts = read_transcripts(Path("transcripts.jsonl"), chat=lambda: choose_chat(...))

A line is one of, each with `id` (default: r0, r1, ...) and `own` (this model wrote it; default: false):

    {"tokens": [0, 17, 4, 9], "prompt_tokens": 3}
    {"text": "Once", "answer": " upon a time"}
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import read_json
from dsatrace.layerwise.transcripts import FOREIGN, OWN, Transcript
from dsatrace.model.config import ModelArgs
from dsatrace.schema import MANIFEST_FILE
from dsatrace.text import plain
from dsatrace.trace.reader import RunReader
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.rows import BadRow, BadRows, json_object, numbered_lines, open_source, read_rows

MAX_LINE_BYTES = 64 << 20
_KINDS = {
    "tokens": {"tokens", "prompt_tokens"},
    "text": {"text", "answer"},
    "messages": {"messages"},
}
"""By the key that tells what a line is: its keys beside `id` and `own`."""
_ROLES = ("system", "user", "assistant")


def read_transcripts(path: Path, chat: Callable[[], Chat]) -> list[Transcript]:
    """Of a file of lines, or of a run's folder. Raises `UserError` naming the line or the request."""
    transcripts = list(_of_run(path) if path.is_dir() else _of_lines(path, chat))
    names = [one.request_id for one in transcripts]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two transcripts are called {plain(min(repeated))}; give each its own id")
    return transcripts


def _of_lines(path: Path, chat: Callable[[], Chat]) -> Iterator[Transcript]:
    def parse(row: int, line: bytes | None) -> Transcript:
        if line is None:
            raise BadRow("too long", f"more than {MAX_LINE_BYTES >> 20} MiB")
        return _transcript(row, json_object(line), chat)

    with open_source(path) as file:
        yield from read_rows(f"{path}", numbered_lines(file, MAX_LINE_BYTES), parse, BadRows())


def _transcript(row: int, record: Mapping[str, Any], chat: Callable[[], Chat]) -> Transcript:
    kinds = [kind for kind in _KINDS if kind in record]
    if len(kinds) != 1:
        raise BadRow("not a transcript", f"give one of {', '.join(_KINDS)}, not {len(kinds)} of them")
    if unknown := record.keys() - _KINDS[kinds[0]] - {"id", "own"}:
        raise BadRow("a key that is not understood", min(unknown))
    name, own = record.get("id", f"r{row}"), record.get("own", False)
    if not isinstance(name, str) or not name or plain(name) != name:
        raise BadRow("id", "it must be text without control characters", "id")
    if not isinstance(own, bool):
        raise BadRow("own", "it must be true or false", "own")
    ids, prompt_tokens = {"tokens": _of_tokens, "text": _of_text, "messages": _of_messages}[kinds[0]](
        record, chat
    )
    if prompt_tokens is not None and not 1 <= prompt_tokens <= len(ids):
        raise BadRow("prompt_tokens", f"{prompt_tokens} of {len(ids)} tokens", "prompt_tokens")
    return Transcript(name, np.array(ids, dtype=np.int64), prompt_tokens, OWN if own else FOREIGN, row)


_Ids = tuple[list[int], int | None]
"""Token ids, and how many of them are the prompt; None: not said."""


def _of_tokens(record: Mapping[str, Any], chat: Callable[[], Chat]) -> _Ids:
    ids, prompt_tokens = record["tokens"], record.get("prompt_tokens")
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise BadRow("tokens", "they must be a list of whole numbers", "tokens")
    if any(not 0 <= token < 2**31 for token in ids):
        raise BadRow("tokens", "an id is below 0 or beyond 2**31", "tokens")
    if prompt_tokens is not None and type(prompt_tokens) is not int:
        raise BadRow("prompt_tokens", "it must be a whole number", "prompt_tokens")
    return ids, prompt_tokens


def _of_text(record: Mapping[str, Any], chat: Callable[[], Chat]) -> _Ids:
    """Text as it stands, with no chat form around it."""
    text, answer = record["text"], record.get("answer", "")
    if not isinstance(text, str) or not isinstance(answer, str) or not text:
        raise BadRow("text", "text and answer must be text", "text")
    tokenizer = chat().tokenizer
    prompt = tokenizer.encode(text)
    return prompt + tokenizer.encode(answer), len(prompt) if answer else None


def _of_messages(record: Mapping[str, Any], chat: Callable[[], Chat]) -> _Ids:
    """In the checkpoint's own form: the last message is the answer, if it is the assistant's."""
    rows = record["messages"]
    if not isinstance(rows, list) or not rows:
        raise BadRow("messages", "they must be a list", "messages")
    messages = []
    for one in rows:
        if not isinstance(one, dict) or one.keys() != {"role", "content"}:
            raise BadRow("messages", "each has a role and a content, and nothing else", "messages")
        if one["role"] not in _ROLES or not isinstance(one["content"], str):
            raise BadRow("messages", f"a role is one of {', '.join(_ROLES)}, a content is text", "messages")
        messages.append(Message(one["role"], one["content"]))
    answered = messages[-1].role == "assistant"
    prompt = chat().encode(messages[:-1] if answered else messages)
    answer = list(chat().as_generated(messages[-1].content)) if answered else []
    return prompt + answer, len(prompt) if answered else None


def _of_run(folder: Path) -> Iterator[Transcript]:
    """The requests of a run that were answered and whose ids it kept."""
    if not (folder / MANIFEST_FILE).is_file():
        raise UserError(f"--transcripts {folder}: no run there; name a file of lines, or a run's folder")
    found = 0
    for row, line in enumerate(RunReader(folder).requests()):
        if "prompt_token_ids" not in line:
            raise UserError(
                f"--transcripts {folder}: request {plain(line['request_id'])} has no token ids; record the "
                "run with --save-tokens"
            )
        if line["state"] not in ("stop", "length"):
            continue
        found += 1
        ids = [*line["prompt_token_ids"], *line["output_token_ids"]]
        yield Transcript(
            line["request_id"],
            np.array(ids, dtype=np.int64),
            len(line["prompt_token_ids"]),
            FOREIGN,
            row if line["source_row"] is None else line["source_row"],
            line.get("labels", {}),
            line.get("needle_positions", ()),
        )
    if not found:
        raise UserError(f"--transcripts {folder}: none of its requests was answered")


def is_of_model(folder: Path, args: ModelArgs) -> bool:
    """Whether `folder` is a run of this model, by its config; number formats may be others."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return False
    try:
        return not ModelArgs(**read_json(path)["model_config"]).differences(args)
    except (TypeError, ValueError):  # another door's, or another version's
        return False
