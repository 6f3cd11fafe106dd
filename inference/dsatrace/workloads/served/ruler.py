"""RULER as requests: the prompt as the user's turn, the answer prefix in the model's mouth.

A model that thinks is asked without the prefix: its answer would begin inside the thoughts.

    workload = RulerWorkload(generate("niah_single_1", 2048, tokenizer, 10), Asking(chat))

An answer's score is 0 to 100 by its task's metric; its tokens' places in the prompt go with the request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from dsatrace.workloads.encoding import Message
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit
from dsatrace.workloads.ruler.example import Example
from dsatrace.workloads.ruler.positions import locate
from dsatrace.workloads.ruler.score import score
from dsatrace.workloads.served.workload import Asking


class RulerWorkload:
    """At most `limit` examples of each task and length."""

    name = "ruler"
    metric = "string match, 0 to 100"

    def __init__(
        self,
        examples: Iterable[Example],
        asking: Asking,
        limit: int | None = None,
        bad_rows: BadRows | None = None,
    ) -> None:
        check_limit("--limit", limit)
        self._examples = examples
        self._asking = asking
        self._before_prompt, _ = asking.chat.frame()
        self._limit = limit
        self._bad_rows = bad_rows or BadRows()
        self._counts: Counter[tuple[str, int | None]] = Counter()
        self._open: dict[str, Example] = {}

    def requests(self) -> Iterator[Request]:
        for example in self._examples:
            kind = (example.task, example.max_length)
            if self._counts[kind] == self._limit:
                continue
            self._counts[kind] += 1
            request = self._request(example)
            self._open[request.request_id] = example
            yield request

    def judge(self, request_id: str, answer: str) -> float:
        return score(self._open[request_id], answer)

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The references: what a perfect answer says."""
        references = self._open[request.request_id].references
        return self._asking.chat.as_generated(" " + ", ".join(references))

    def forget(self, request_id: str) -> None:
        del self._open[request_id]

    def describe(self) -> dict[str, Any]:
        by_task: Counter[str] = Counter()
        for (task, _), count in self._counts.items():
            by_task[task] += count
        counts = {"examples": by_task.total(), **{task: by_task[task] for task in sorted(by_task)}}
        return {
            "name": self.name,
            "metric": self.metric,
            "counts": counts,
            "bad_rows": self._bad_rows.summary(),
        }

    def _request(self, example: Example) -> Request:
        chat = self._asking.chat
        if example.answer_positions is None:
            example = locate(example, chat.tokenizer)
        prefix = "" if chat.thinking else example.answer_prefix
        ids = chat.encode([Message("user", example.prompt)], prefix)
        places = sorted({p for place in example.answer_positions or () for p in place})
        length = "" if example.max_length is None else f".{example.max_length}"
        return Request(
            request_id=f"{example.task}{length}.row{example.row}",
            prompt_token_ids=tuple(ids),
            max_new_tokens=self._asking.max_new_tokens or example.tokens_to_generate,
            temperature=self._asking.temperature,
            source_row=example.row,
            labels={"task": example.task, **({"length": length[1:]} if length else {})},
            needle_positions=tuple(p + self._before_prompt for p in places),
        )
