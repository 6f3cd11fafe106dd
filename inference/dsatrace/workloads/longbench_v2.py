"""LongBench v2: its rows, its zero-shot prompt with the middle cut out, and its answers.

Rows are those of `zai-org/LongBench-v2`, from `data.json` or JSON lines. Knows no model and
no hub.

    for row in LongBenchV2Loader("data.json"):
        prompt = build_prompt(row, chat, max_prompt_tokens=32_768)
        extract_answer(answer_text) == row.answer
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
from dsatrace.workloads.data_set import Asking, DataSet, Find, Flag, Opened
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.exports import write_json_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit, choice_column, text_column

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
    """One question. `choices` are those of A, B, C and D; `answer` is one of the letters."""

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
    """Streams the rows of a file; `counts` says, as far as read, how many rows and repeated ids it had."""

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
    """`question_cut`: so little room was left that the middle's cut reaches into the question."""

    token_ids: tuple[int, ...]
    truncated: bool
    question_cut: bool


def build_prompt(row: LongBenchV2Row, chat: Chat, max_prompt_tokens: int) -> LongBenchV2Prompt:
    """The chat prompt of a row, at most `max_prompt_tokens` long, the template's own tokens included."""
    room = max_prompt_tokens - sum(chat.frame())
    if room < 2:
        raise UserError(f"max_prompt_tokens {max_prompt_tokens} leaves no room for a prompt; give more")
    text, encode = prompt_text(row), chat.tokenizer.encode
    kept, cut = middle_cut(text, encode, room)
    ids = chat.encode([Message("user", text)], encode_text=lambda _: kept)
    question_cut = cut and len(encode(_question_text(row))) > room // 2
    return LongBenchV2Prompt(tuple(ids), cut, question_cut)


def prompt_text(row: LongBenchV2Row) -> str:
    """The whole user message: the text, the question, the choices and the required closing form."""
    return _ASK.format(context=row.context) + _question_text(row)


def _question_text(row: LongBenchV2Row) -> str:
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return _QUESTION.format(question=row.question, choices=choices)


def extract_answer(text: str) -> str | None:
    """The letter chosen, or None: asterisks dropped, first the form in parentheses, then without."""
    text = text.replace("*", "")
    match = _ANSWER.search(text) or _BARE_ANSWER.search(text)
    return match[1] if match else None


# DeepSeek's vocabulary never joins a line's end to a following character that is no space,
# so text tokenised in parts between such borders has the tokens of the whole.
_BORDER = re.compile(r"\n(?=\S)")
_PART_CHARS = 1 << 14


def middle_cut(text: str, encode: Callable[[str], list[int]], num_tokens: int) -> tuple[list[int], bool]:
    """At most `num_tokens` ids of `text`, and whether any were cut out; the first half takes the odd one."""
    head = _first_tokens(text, encode, num_tokens + 1)
    if len(head) <= num_tokens:
        return head, False
    num_tail = num_tokens // 2
    tail = _last_tokens(text, encode, num_tail)
    return head[: num_tokens - num_tail] + tail[len(tail) - num_tail :], True


def _first_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """The ids of a beginning of `text` that has at least `enough` of them, or of all of it."""
    ids: list[int] = []
    at = 0
    while at < len(text) and len(ids) < enough:
        border = _BORDER.search(text, at + _PART_CHARS)
        end = border.end() if border else len(text)
        ids += encode(text[at:end])
        at = end
    return ids


def _last_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """The same of an end of `text`."""
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
