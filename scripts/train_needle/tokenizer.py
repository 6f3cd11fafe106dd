"""The small model's vocabulary: every word of our own texts and every number up to 999 is one token.

What is not in it falls apart into bytes, so any text can be encoded. Ids as in
`byte_tokenizer_json`: BOS, EOS and PAD first, then the bytes, then the words, and the
chat's special tokens last. Knows no model.

    tokenizer = word_tokenizer()
    tokenizer.encode("is: 1234567.")      # "is", ":", " ", "123", "456", "7", "."
"""

from __future__ import annotations

import json
import re
from typing import Any

from dsatrace.workloads.needle import needle_prompt
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.texts import ADJECTIVES, ESSAY, NOUNS
from dsatrace.workloads.tokenizer import (
    ASSISTANT,
    END_THINK,
    THINK,
    USER,
    Tokenizer,
    byte_tokenizer_json,
)

PIECE = r"[0-9]{1,3}| ?[A-Za-z]+|-[a-z]+|\s|[^\sA-Za-z0-9]"
"""What is one piece of text: numbers by threes as DeepSeek cuts them, words with the space before them."""


def word_tokenizer() -> Tokenizer:
    """The tokenizer of `word_tokenizer_json`."""
    definition = json.dumps(word_tokenizer_json(), ensure_ascii=False, indent=1) + "\n"
    return Tokenizer(definition.encode(), "the training tokenizer")


def word_tokenizer_json() -> dict[str, Any]:
    """A `tokenizer.json`: byte-level BPE without merges, whose vocabulary holds whole pieces."""
    definition = byte_tokenizer_json()
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    last = (USER, ASSISTANT, THINK, END_THINK)
    words = [piece for piece in _pieces() if piece not in vocabulary]
    kept = [token for token in vocabulary if token not in last]
    vocabulary = {token: i for i, token in enumerate((*kept, *words, *last))}
    definition["model"] |= {"vocab": vocabulary, "ignore_merges": True}
    for token in definition["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    split = {"type": "Split", "pattern": {"Regex": PIECE}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, definition["pre_tokenizer"]]}
    return definition


def _pieces() -> list[str]:
    """Pieces of more than a byte, in the byte-level spelling (a space is U+0120), in a fixed order."""
    spoken = [
        " ".join(ESSAY.split()),
        texts.NOISE,
        *(
            " ".join(texts.niah(kind, "", "", plural))
            for kind in ("number", "uuid")
            for plural in (False, True)
        ),
        *(texts.needle(kind, "", "") for kind in ("number", "uuid")),
        "numbers uuids",
        " ".join((*texts.vt("", ""), *texts.cwe(""), *texts.fwe(""), *texts.qa("", ""))),
        " VAR",
        *(needle_prompt(900, lambda text: len(text.split()), seed=seed).text for seed in range(40)),
        *(f" {adjective}" for adjective in ADJECTIVES),
        *(f"-{noun}" for noun in NOUNS),
    ]
    words = sorted({piece for text in spoken for piece in re.findall(PIECE, text) if len(piece) > 1})
    numbers = [f"{i:03d}" for i in range(1000)]
    return [*numbers, *(word.replace(" ", "\u0120") for word in words if not word[-1].isdigit())]
