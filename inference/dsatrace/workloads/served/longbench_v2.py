"""LongBench v2 as requests: zero-shot prompts cut in the middle, and 1 for the right letter.

workload = LongBenchV2Workload(LongBenchV2Loader("data.json"), Asking(chat, max_prompt_tokens=32_768))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dsatrace.workloads.longbench_v2 import (
    CHANCE,
    LongBenchV2Loader,
    LongBenchV2Row,
    build_prompt,
    extract_answer,
)
from dsatrace.workloads.request import Request
from dsatrace.workloads.served.workload import Asking

MAX_NEW_TOKENS = 128
MAX_PROMPT_TOKENS = 120_000
"""Both as the benchmark's own script has them."""


class LongBenchV2Workload:
    name = "longbenchv2"
    metric = f"accuracy, 0 or 1; chance {CHANCE}"

    def __init__(self, loader: LongBenchV2Loader, asking: Asking) -> None:
        self._loader = loader
        self._asking = asking
        self._counts: Counter[str] = Counter()
        self._open: dict[str, str] = {}  # request id -> the right letter

    def requests(self) -> Iterator[Request]:
        for row in self._loader:
            request = self._request(row)
            self._open[request.request_id] = row.answer
            yield request

    def judge(self, request_id: str, answer: str) -> float:
        """1 if the answer names the right letter; one without a letter is wrong, and counted."""
        letter = extract_answer(answer)
        self._counts["unanswered"] += letter is None
        return float(letter == self._open[request_id])

    def recorded(self, request: Request) -> tuple[int, ...]:
        right = self._open[request.request_id]
        return self._asking.chat.as_generated(f"The correct answer is ({right})")

    def forget(self, request_id: str) -> None:
        del self._open[request_id]

    def describe(self) -> dict[str, Any]:
        counts = {
            **self._loader.counts,
            **{name: self._counts[name] for name in ("truncated", "question_cut", "unanswered")},
        }
        return {
            "name": self.name,
            "metric": self.metric,
            "counts": counts,
            "bad_rows": self._loader.bad_rows.summary(),
        }

    def _request(self, row: LongBenchV2Row) -> Request:
        asking = self._asking
        prompt = build_prompt(row, asking.chat, asking.max_prompt_tokens or MAX_PROMPT_TOKENS)
        self._counts["truncated"] += prompt.truncated
        self._counts["question_cut"] += prompt.question_cut
        return Request(
            request_id=f"row{row.source_row}",
            prompt_token_ids=prompt.token_ids,
            max_new_tokens=asking.max_new_tokens or MAX_NEW_TOKENS,
            temperature=asking.temperature,
            source_row=row.source_row,
            labels={"difficulty": row.difficulty, "length": row.length},
        )
