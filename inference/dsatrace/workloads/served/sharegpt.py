"""ShareGPT as requests: a conversation up to its last user turn, or one request a user turn.

    workload = ShareGPTWorkload(ShareGPTLoader("chats.json"), Asking(chat), "per_user_turn")

The history is the recorded one. Nobody judges the answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import check_limit
from dsatrace.workloads.served.workload import Asking
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
