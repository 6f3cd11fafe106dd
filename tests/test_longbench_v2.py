"""LongBench v2: rows as published, prompts cut in the middle only, answers found by its rules."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.workloads import longbench_v2
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.encoding import Message, encode_chat
from dsatrace.workloads.longbench_v2 import (
    LongBenchV2Loader,
    LongBenchV2Row,
    build_prompt,
    extract_answer,
    middle_cut,
    prompt_text,
)
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.tokenizer import ASSISTANT, BOS, END_THINK, USER, Tokenizer
from helpers.real_data import real_file
from helpers.ruler_samples import deepseek_tokenizer


@pytest.fixture(scope="module")
def rows() -> list[LongBenchV2Row]:
    return list(LongBenchV2Loader(sample_file("longbench_v2")))


def words(text: str) -> list[int]:
    """Ids of a vocabulary of single characters."""
    return [ord(character) for character in text]


def test_the_embedded_rows_have_the_published_columns(rows: list[LongBenchV2Row]) -> None:
    assert [row.source_row for row in rows] == [0, 1, 2]
    assert [row.answer for row in rows] == ["B", "C", "A"]
    assert {row.difficulty for row in rows} == {"easy", "hard"} and {row.length for row in rows} == {"short"}
    assert all(len(row.context.split("\n\n")) >= 4 and len(set(row.choices)) == 4 for row in rows)
    assert len({row.row_id for row in rows}) == 3 and all(len(row.row_id) == 24 for row in rows)
    assert {row.domain for row in rows} <= {
        "Single-Document QA",
        "Multi-Document QA",
        "Long In-context Learning",
        "Long-dialogue History Understanding",
        "Code Repository Understanding",
        "Long Structured Data Understanding",
    }


def test_the_real_row_reads() -> None:
    loader = LongBenchV2Loader(real_file("longbench_v2/data_one_row_context_cut.json"))
    (row,) = loader
    facts = (row.row_id, row.answer, row.difficulty, row.length)
    assert facts == ("66f36490821e116aacb2cc22", "D", "easy", "short")
    assert row.context.startswith("I. China\N{RIGHT SINGLE QUOTATION MARK}s Court System")
    assert row.choices[3].startswith("Use advanced information systems")
    assert loader.counts == {"rows": 1, "duplicate_id": 0}


def published(**changes: Any) -> dict[str, Any]:
    row = {
        "_id": "0",
        "domain": "d",
        "sub_domain": "s",
        "difficulty": "easy",
        "length": "long",
        "question": "q",
    }
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    return {**row, **choices, "answer": "A", "context": "c", **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "E"}, "row 1 (line 2), column 'answer': unknown value: use one of A, B, C, D"),
        ({"difficulty": "Easy"}, "column 'difficulty': unknown value: use one of easy, hard"),
        ({"length": None}, "column 'length': not a text: it is of type NoneType"),
        ({"choice_C": 3}, "column 'choice_C': not a text: it is of type int"),
        ({"context": "\ud83d"}, "column 'context': lone surrogate"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [published(), published(**changes), published(answer="B")]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        list(LongBenchV2Loader(file))
    assert reason in str(caught.value)
    loader = LongBenchV2Loader(file, bad_rows=BadRows("skip"))
    assert [(row.source_row, row.answer) for row in loader] == [(0, "A"), (2, "B")]
    assert loader.bad_rows.counts.total() == 1
    assert loader.counts == {"rows": 2, "duplicate_id": 1}


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + json.dumps(published()) + ", {cut")
    assert len(list(LongBenchV2Loader(file, max_rows=1))) == 1
    with pytest.raises(UserError, match="max_rows must be at least 1, not 0"):
        LongBenchV2Loader(file, max_rows=0)


def test_what_a_prompt_consists_of(rows: list[LongBenchV2Row]) -> None:
    text = prompt_text(rows[0])
    assert f"<text>\n{rows[0].context}\n</text>" in text
    assert f"What is the correct answer to this question: {rows[0].question}\nChoices:\n(A) " in text
    assert text.index("(A) ") < text.index("(B) ") < text.index("(C) ") < text.index("(D) ")
    assert text.endswith("The correct answer is (insert answer here)")


def test_a_prompt_that_fits_is_whole(rows: list[LongBenchV2Row], byte_tokenizer: Tokenizer) -> None:
    whole = encode_chat([Message("user", prompt_text(rows[0]))], byte_tokenizer)
    prompt = build_prompt(rows[0], Chat.deepseek(byte_tokenizer), len(whole))
    assert list(prompt.token_ids) == whole and not prompt.truncated and not prompt.question_cut


@pytest.mark.parametrize("num_tokens", [1200, 1201])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_long_prompt_keeps_template_halves_and_limit(
    rows: list[LongBenchV2Row], byte_tokenizer: Tokenizer, num_tokens: int, thinking: bool
) -> None:
    prompt = build_prompt(rows[0], Chat.deepseek(byte_tokenizer, thinking), num_tokens)
    ids = list(prompt.token_ids)
    assert len(ids) == num_tokens and prompt.truncated and not prompt.question_cut
    special = [byte_tokenizer.special_id(name) for name in (BOS, USER, ASSISTANT)]
    assert ids[:2] == special[:2] and ids[-2] == special[2]
    assert (ids[-1] == byte_tokenizer.special_id(END_THINK)) is not thinking
    text, room = words_of_bytes(prompt_text(rows[0]), byte_tokenizer), num_tokens - 4
    assert ids[2:-2] == text[: room - room // 2] + text[len(text) - room // 2 :]


def words_of_bytes(text: str, tokenizer: Tokenizer) -> list[int]:
    """One id a byte: the tiny model's vocabulary has no merges."""
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    return ids


def test_too_little_room_is_told(rows: list[LongBenchV2Row], byte_tokenizer: Tokenizer) -> None:
    assert build_prompt(rows[0], Chat.deepseek(byte_tokenizer), 200).question_cut
    with pytest.raises(UserError, match="max_prompt_tokens 5 leaves no room"):
        build_prompt(rows[0], Chat.deepseek(byte_tokenizer), 5)


@given(
    st.lists(st.sampled_from(["ab", "\n", "\n\n", " \n ", "c", "\r\n", " "]), max_size=60).map("".join),
    st.integers(0, 80),
    st.integers(1, 30),
)
def test_the_middle_cut_is_that_of_the_whole_text(text: str, num_tokens: int, part: int) -> None:
    whole = words(text)
    kept = whole[: num_tokens - num_tokens // 2] + whole[max(0, len(whole) - num_tokens // 2) :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longbench_v2, "_PART_CHARS", part)
        ids, cut = middle_cut(text, words, num_tokens)
    assert cut is (len(whole) > num_tokens)
    assert ids == (kept if cut else whole)


def test_the_middle_cut_on_deepseeks_own_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = deepseek_tokenizer()
    monkeypatch.setattr(longbench_v2, "_PART_CHARS", 50)
    parts = ["\n", "\n\n", " \n", "\r\n", "\t", "  ", "\n  ", "a", "word", "深度", "1234567"]
    parts += ["...\n", "\u0301x"]
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choices(parts, k=400))
        whole = tokenizer.encode(text)
        num_tokens = draw.randrange(2, len(whole))
        ids, cut = middle_cut(text, tokenizer.encode, num_tokens)
        half = num_tokens // 2
        assert cut and ids == whole[: num_tokens - half] + whole[len(whole) - half :]


def test_only_what_can_be_kept_is_tokenised() -> None:
    seen = 0

    def count(text: str) -> list[int]:
        nonlocal seen
        seen += len(text)
        return words(text)

    ids, cut = middle_cut("line of text\n" * 400_000, count, 1000)
    assert cut and len(ids) == 1000
    assert seen < 4 * longbench_v2._PART_CHARS


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("**The correct answer is (C)**.", "C"),
        ("The correct answer is **(D)**", "D"),
        ("The correct answer is A.", "A"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),
        ("The correct answer is (A). The correct answer is (B)", "A"),
        ("The correct answer is (insert answer here)", None),
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_answers_are_found_as_the_benchmark_finds_them(text: str, letter: str | None) -> None:
    assert extract_answer(text) == letter
