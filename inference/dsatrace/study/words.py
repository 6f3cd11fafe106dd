"""A vocabulary of whole words, for sweeps without a tokenizer: a token is a word or a mark.

Ids are given in order of first use, so they mean nothing outside one process. On the English
of the seeded workloads it counts as many tokens as DeepSeek's vocabulary within a few per
cent, where one byte a token would count five times as many; on code or Chinese it is far
off. Knows no model.

    WordVocabulary().encode("Hi, you")           # [n, n + 1, n + 2]: "Hi", ",", " you"
"""

from __future__ import annotations

import re

from dsatrace.workloads.chat_format import SPECIAL_TOKENS

_TOKEN = re.compile(r" ?\w+|\s+(?!\w)|[^\w\s]|\s")


class WordVocabulary:
    """Grows with what it encodes; equal words have equal ids."""

    source = "the built-in vocabulary of whole words"

    def __init__(self) -> None:
        self._special = {name: token_id for token_id, name in enumerate(SPECIAL_TOKENS)}
        self._words: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; names of special tokens in it are text like any other."""
        words, first = self._words, len(self._special)
        return [first + words.setdefault(word, len(words)) for word in _TOKEN.findall(text)]

    def special_id(self, name: str) -> int:
        """The id of a special token of DeepSeek's chat form, by its text."""
        return self._special[name]
