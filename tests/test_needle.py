"""The needle prompt: as long as asked, the needle where asked, the same for the same seed."""

from __future__ import annotations

import itertools

import pytest

from dsatrace.errors import UserError
from dsatrace.workloads.needle import _IDLE, needle_prompt
from dsatrace.workloads.tokenizer import Tokenizer


@pytest.mark.parametrize("num_tokens", [400, 2048, 8192])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_is_within_a_sentence_of_what_was_asked(
    byte_tokenizer: Tokenizer, num_tokens: int, depth: float
) -> None:
    def count(text: str) -> int:
        return len(byte_tokenizer.encode(text))

    length = count(needle_prompt(num_tokens, count, depth, seed=5).text)
    assert num_tokens - max(map(count, _IDLE)) - 1 <= length <= num_tokens


def test_the_needle_lies_at_its_depth() -> None:
    for depth in (0.0, 0.25, 0.5, 1.0):
        prompt = needle_prompt(3000, lambda text: len(text.split()), depth, seed=1)
        _, haystack, question = prompt.text.split("\n")
        sentences = haystack.split(". ")
        (place,) = [i for i, sentence in enumerate(sentences) if prompt.answer in sentence]
        assert place == round(depth * (len(sentences) - 1))
        assert prompt.text.count(prompt.answer) == 1 and prompt.answer not in question
        assert question.startswith("What is the number of the ")


def test_seed_decides_everything() -> None:
    def make(seed: int) -> str:
        return needle_prompt(500, len, 0.5, seed).text

    assert make(1) == make(1)
    assert len({make(seed) for seed in range(20)}) == 20


def test_no_sentence_twice_running() -> None:
    haystack = needle_prompt(5000, lambda text: len(text.split()), 1.0, seed=2).text.split("\n")[1]
    sentences = haystack.split(". ")
    assert len(sentences) > 10 * len(_IDLE)
    assert all(a != b for a, b in itertools.pairwise(sentences))


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs at least \d+ tokens, not 10"):
        needle_prompt(10, len)
    with pytest.raises(UserError, match="depth must lie between 0 and 1"):
        needle_prompt(2048, len, depth=1.5)
