"""What a runner asks of a data set: requests one by one, a score for an answer, what was read.

for request in workload.requests():
    score = workload.judge(request.request_id, answer_text)
    workload.forget(request.request_id)
workload.describe()["counts"]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.request import Request


@dataclasses.dataclass(frozen=True)
class Asking:
    """How every row of a data set is asked. None leaves the choice to the data set."""

    chat: Chat
    max_new_tokens: int | None = None
    temperature: float = 0.0
    max_prompt_tokens: int | None = None  # template included; only data sets that cut prompts look at it

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-new-tokens", self.max_new_tokens),
            ("--max-prompt-tokens", self.max_prompt_tokens),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag} {value}: use at least 1")

    @classmethod
    def of(cls, args: argparse.Namespace, chat: Chat) -> Asking:
        """As the flags of `run_dataset.py` say."""
        return cls(chat, args.max_new_tokens, args.temperature, args.max_prompt_tokens)


class Workload(Protocol):
    """One data set, read once, front to back.

    `requests` yields each request with an id of its own, the same ids in the same order at
    every reading, so that a run can be resumed. Raises `UserError` for a source that cannot be used.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str | None:
        """What a score means; None where answers are not judged."""

    def requests(self) -> Iterator[Request]: ...

    def judge(self, request_id: str, answer: str) -> float | None:
        """The score of an answer's text, its thoughts cut off; None where there is none."""

    def recorded(self, request: Request) -> tuple[int, ...] | None:
        """The answer that the data set records, as `Chat.as_generated` has it, for runs without a model."""

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request (references, a recorded answer): it has ended."""

    def describe(self) -> dict[str, Any]:
        """Name, metric and counts of what has been read, for `summary.json`; no text of the data."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A workload, ready to be served.

    `description` is what the manifest says of its source, `said` what the terminal does.
    `num_requests` is None where it is not known before the rows have been read, `chat_form`
    where no messages are put together.
    """

    workload: Workload
    description: str
    said: str
    num_requests: int | None = None
    chat_form: str | None = None
