"""LongBench v2 as requests: zero-shot prompts cut in the middle, and 1 for the right letter.

workload = LongBenchV2Workload(LongBenchV2Loader("data.json"), Asking(chat, max_prompt_tokens=32_768))
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag
from dsatrace.workloads.exports import write_json_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.longbench_v2 import (
    CHANCE,
    LongBenchV2Loader,
    LongBenchV2Row,
    build_prompt,
    extract_answer,
)
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.served.workload import Asking, Opened

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


def open_longbench_v2(args: argparse.Namespace, chat: Chat, find: Find) -> Opened:
    """The rows of a file, at most `--limit`."""
    source = find()
    loader = LongBenchV2Loader(source.file, args.limit, bad_rows=BadRows(args.bad_rows))
    workload = LongBenchV2Workload(loader, Asking.of(args, chat))
    return Opened(workload, source.description, source.text(), args.limit, chat.form.name)


LONGBENCH_V2 = DataSet(
    name="longbenchv2",
    title="LongBench v2",
    help="multiple-choice questions about long texts",
    hub=HubFile(
        repo="zai-org/LongBench-v2",
        file="data.json",
        revision="2b48e494f2c7a2f0af81aae178e05c7e1dde0fe9",
        sha256="15d61c22d92c96900b3c4948b6aeea218d3214b676a65df48e7b8555604c7fe2",
    ),
    licence="Apache-2.0",
    flags=(
        Flag("--longbenchv2-json", "data.json, or its rows as JSONL", type=Path),
        Flag(
            "--max-prompt-tokens",
            f"longer prompts lose their middle (default: {MAX_PROMPT_TOKENS})",
            type=int,
        ),
    ),
    file_flag="--longbenchv2-json",
    open=open_longbench_v2,
    write=write_json_lines,
    export="longbenchv2_train{}.jsonl",
    patterns=("*.jsonl", "*.json"),
    sample="longbench_v2",
)
