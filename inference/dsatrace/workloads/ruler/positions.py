"""Where in a prompt the answer stands: character ranges, and the tokens that hold them.

What "was the needle selected?" is asked of. Spans are found by the form of a needle
(`is: VALUE`) or of an assignment (`VAR NAME =`), in NVIDIA's rows as in ours. Tokens are
found by bytes, not by searching ids: a token belongs to the answer if any of its bytes
does, so a leading space merged into it costs nothing. Byte-level vocabularies only.

    example = locate(example, tokenizer)
    example.answer_positions                 # ((812, 813, 814),)
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from dsatrace.workloads.ruler.example import TASKS, Example

# {} stands for any of the references; the lookaheads keep 123 from being found in 1234.
_FORMS = {"niah": r"is: ({})(?![\w-])", "vt": r"\bVAR ({}) ="}


class Vocabulary(Protocol):
    """What is asked of a tokenizer: ids whose bytes, joined, are the text's."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""


def answer_spans(task: str, prompt: str, references: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Character ranges [start, end) of the answer in the prompt, in text order; () where it has no place."""
    form = _FORMS.get(TASKS[task].family)
    if form is None:
        return ()
    pattern = form.format("|".join(map(re.escape, references)))
    return tuple(match.span(1) for match in re.finditer(pattern, prompt))


def token_positions(
    prompt: str, spans: Sequence[tuple[int, int]], token_ids: Sequence[int], vocabulary: Vocabulary
) -> tuple[tuple[int, ...], ...]:
    """For each span the positions in `token_ids` (those of `prompt`) that hold a byte of it."""
    ends = list(accumulate(len(vocabulary.token_bytes(token)) for token in token_ids))
    num_bytes = _num_bytes(prompt)
    if (ends[-1] if ends else 0) != num_bytes:
        raise ValueError(f"the tokens hold {ends[-1] if ends else 0} bytes, but the prompt {num_bytes}")
    found = []
    for start, end in spans:
        first = _num_bytes(prompt[:start])
        last = first + _num_bytes(prompt[start:end]) - 1
        found.append(tuple(range(bisect_right(ends, first), bisect_left(ends, last + 1) + 1)))
    return tuple(found)


def locate(example: Example, vocabulary: Vocabulary) -> Example:
    """The example with `answer_positions` by this tokenizer."""
    if not example.answer_spans:
        return dataclasses.replace(example, answer_positions=())
    ids = vocabulary.encode(example.prompt)
    positions = token_positions(example.prompt, example.answer_spans, ids, vocabulary)
    return dataclasses.replace(example, answer_positions=positions)


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))  # half a surrogate pair is one "?", as tokenizers encode it
