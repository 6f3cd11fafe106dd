"""LongBench v2: its rows, its zero-shot prompt with the middle cut out, and its answers.

Rows are those of `zai-org/LongBench-v2`, from `data.json` or JSON lines. Knows no model and
no hub.

    for row in LongBenchV2Loader("data.json"):
        prompt = build_prompt(row, chat, max_prompt_tokens=32_768)
        extract_answer(answer_text) == row.answer
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRows, check_limit, choice_column, text_column
from dsatrace.workloads.truncation import middle_cut

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
