"""LongBench v2 as requests: zero-shot prompts with the middle cut out; the right letter scores 1.

Rows are those of `zai-org/LongBench-v2`, from `data.json` or JSON lines. `middle_cut` encodes
only what can be kept, so a text of 16 million characters costs no more than one of the
limit's length.

    loader = LongBenchV2Loader("data.json")
    for request in LongBenchV2Workload(loader, PromptSettings(chat, max_prompt_tokens=32_768)).requests():
        ...
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag, OpenedWorkload, PromptSettings, Workload
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.exports import write_json_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit, choice_column, text_column

MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 128, 120_000  # as in the benchmark's own script
LETTERS = ("A", "B", "C", "D")
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
CHANCE = 1 / len(LETTERS)

_ASK = """\
Below is a text, then a question about it with four choices.

<text>
{context}
</text>
"""
_QUESTION = """
What is the correct answer to this question: {question}
Choices:
{choices}

Reply with one line in this form: The correct answer is (insert answer here)"""
_ANSWER = re.compile(r"The correct answer is \(([A-D])\)")
_BARE_ANSWER = re.compile(r"The correct answer is ([A-D])")


@dataclasses.dataclass(frozen=True)
class LongBenchV2Row:
    """One question. `choices` belong to A, B, C and D; `answer` is one of the letters."""

    source_row: int
    row_id: str
    domain: str
    sub_domain: str
    difficulty: str
    length: str
    question: str
    choices: tuple[str, str, str, str]
    answer: str
    context: str


class LongBenchV2Loader:
    """Streams the rows of a file; `counts` has the rows read so far and how many ids were repeated."""

    def __init__(
        self, path: str | Path, max_rows: int | None = None, *, bad_rows: BadRows | None = None
    ) -> None:
        check_limit("max_rows", max_rows)
        self.path = Path(path)
        self.max_rows = max_rows
        self.bad_rows = bad_rows or BadRows()
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[LongBenchV2Row]:
        self.counts.clear()
        ids: set[str] = set()
        for row in read_json_rows(self.path, _parse, self.bad_rows):
            self.counts["rows"] += 1
            self.counts["duplicate_id"] += row.row_id in ids
            ids.add(row.row_id)
            yield row
            if self.counts["rows"] == self.max_rows:
                return


def _parse(number: int, row: Mapping[str, Any]) -> LongBenchV2Row:
    a, b, c, d = (text_column(row, f"choice_{letter}") for letter in LETTERS)
    return LongBenchV2Row(
        source_row=number,
        row_id=text_column(row, "_id"),
        domain=text_column(row, "domain"),
        sub_domain=text_column(row, "sub_domain"),
        difficulty=choice_column(row, "difficulty", DIFFICULTIES),
        length=choice_column(row, "length", LENGTHS),
        question=text_column(row, "question"),
        choices=(a, b, c, d),
        answer=choice_column(row, "answer", LETTERS),
        context=text_column(row, "context"),
    )


@dataclasses.dataclass(frozen=True)
class LongBenchV2Prompt:
    token_ids: tuple[int, ...]
    truncated: bool
    question_cut: bool  # the cut reaches into the question


def build_prompt(row: LongBenchV2Row, chat: Chat, max_prompt_tokens: int) -> LongBenchV2Prompt:
    """The chat prompt of a row, at most `max_prompt_tokens` long with the template's own tokens."""
    room = max_prompt_tokens - sum(chat.frame())
    if room < 2:
        raise UserError(f"max_prompt_tokens {max_prompt_tokens} leaves no room for a prompt; give more")
    text, encode = prompt_text(row), chat.tokenizer.encode
    kept, cut = middle_cut(text, encode, room)
    ids = chat.encode([Message("user", text)], encode_text=lambda _: kept)
    question_cut = cut and len(encode(_question_text(row))) > room // 2
    return LongBenchV2Prompt(tuple(ids), cut, question_cut)


def prompt_text(row: LongBenchV2Row) -> str:
    """The whole user message: the text, the question, the choices and the form of the answer."""
    return _ASK.format(context=row.context) + _question_text(row)


def _question_text(row: LongBenchV2Row) -> str:
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return _QUESTION.format(question=row.question, choices=choices)


def extract_answer(text: str) -> str | None:
    """The chosen letter or None. Asterisks are dropped; a letter in parentheses comes before a bare one."""
    text = text.replace("*", "")
    match = _ANSWER.search(text) or _BARE_ANSWER.search(text)
    return match[1] if match else None


# DeepSeek's vocabulary never joins a line's end to a following character that is no space, so
# text encoded in parts between such borders has the tokens of the whole.
_BORDER = re.compile(r"\n(?=\S)")
_PART_CHARS = 1 << 14


def middle_cut(text: str, encode: Callable[[str], list[int]], num_tokens: int) -> tuple[list[int], bool]:
    """The first and the last half of at most `num_tokens` ids of `text`, and whether any were cut out."""
    head = _first_tokens(text, encode, num_tokens + 1)
    if len(head) <= num_tokens:
        return head, False
    num_tail = num_tokens // 2
    tail = _last_tokens(text, encode, num_tail)
    return head[: num_tokens - num_tail] + tail[len(tail) - num_tail :], True


def _first_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """At least `enough` ids of the beginning of `text`, or all of them."""
    ids: list[int] = []
    at = 0
    while at < len(text) and len(ids) < enough:
        border = _BORDER.search(text, at + _PART_CHARS)
        end = border.end() if border else len(text)
        ids += encode(text[at:end])
        at = end
    return ids


def _last_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """At least `enough` ids of the end of `text`, or all of them."""
    parts: list[list[int]] = []
    end = len(text)
    while end > 0 and sum(map(len, parts)) < enough:
        at = _border_before(text, end - _PART_CHARS)
        parts.append(encode(text[at:end]))
        end = at
    return [token for part in reversed(parts) for token in part]


def _border_before(text: str, limit: int) -> int:
    """The last border at or before `limit`, else the text's beginning."""
    while limit > 0:
        at = text.rfind("\n", 0, limit) + 1
        if at == 0 or _BORDER.match(text, at - 1):
            return at
        limit = at - 1
    return 0


class LongBenchV2Workload(Workload):
    name = "longbenchv2"
    metric = f"accuracy, 0 or 1; chance {CHANCE}"

    def __init__(self, loader: LongBenchV2Loader, settings: PromptSettings) -> None:
        super().__init__(loader.bad_rows)
        self._loader = loader
        self._settings = settings
        self._max_new_tokens = settings.most_new_tokens(MAX_NEW_TOKENS, self.name)
        self._counts: Counter[str] = Counter()
        self._open: dict[str, str] = {}  # the right letters

    def requests(self) -> Iterator[Request]:
        settings = self._settings
        for row in self._loader:
            prompt = build_prompt(row, settings.chat, settings.max_prompt_tokens or MAX_PROMPT_TOKENS)
            self._counts["truncated"] += prompt.truncated
            self._counts["question_cut"] += prompt.question_cut
            request = Request(
                request_id=f"row{row.source_row}",
                prompt_token_ids=prompt.token_ids,
                max_new_tokens=self._max_new_tokens,
                temperature=settings.temperature,
                source_row=row.source_row,
                labels={"difficulty": row.difficulty, "length": row.length},
            )
            self._open[request.request_id] = row.answer
            yield request

    def judge(self, request_id: str, answer: str) -> float:
        """1 for the right letter. An answer without a letter is wrong, and counted."""
        letter = extract_answer(answer)
        self._counts["unanswered"] += letter is None
        return float(letter == self._open[request_id])

    def recorded(self, request: Request) -> tuple[int, ...]:
        right = self._open[request.request_id]
        return self._settings.chat.as_generated(f"The correct answer is ({right})")

    def counts(self) -> dict[str, int]:
        own = {name: self._counts[name] for name in ("truncated", "question_cut", "unanswered")}
        return {**self._loader.counts, **own}


def open_longbench_v2(args: argparse.Namespace, chat: Chat, find: Find) -> OpenedWorkload:
    """The rows of a file, at most `--limit`."""
    source = find()
    loader = LongBenchV2Loader(source.file, args.limit, bad_rows=BadRows(args.bad_rows))
    workload = LongBenchV2Workload(loader, PromptSettings.from_args(args, chat))
    return OpenedWorkload(workload, source.description, source.text(), args.limit, chat.form.name)


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
