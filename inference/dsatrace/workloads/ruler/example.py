"""The thirteen tasks by their parameters; one example, its score, and where its answer stands.

Tasks, parameters and budgets are NVIDIA's (`synthetic.yaml`, `constants.py`), and so are the
scores (`eval/synthetic/constants.py`): case-insensitive substrings, all references in equal
parts (niah, vt, cwe, fwe) or any one of them (qa). As there, control characters of the
prediction become line breaks first.

An answer is found by the form of a needle (`is: VALUE`) or of an assignment (`VAR NAME =`), in
NVIDIA's rows as in ours. A token belongs to the answer if any of its bytes does, so a leading
space merged into it changes nothing. Byte-level vocabularies only. Knows no model.

    TASKS["niah_multikey_1"].num_keys        # 4
    example = locate(example, tokenizer)
    example.answer_positions                 # ((812, 813, 814),)
    score(example, answer)                   # 0 to 100
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, Protocol

from dsatrace.errors import UserError

Family = Literal["niah", "vt", "cwe", "fwe", "qa"]
Haystack = Literal["noise", "essay", "needles"]
ValueKind = Literal["number", "uuid"]
KeyKind = Literal["words", "uuid"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task by its parameters; those from `haystack` on are niah's only."""

    name: str
    family: Family
    tokens_to_generate: int
    haystack: Haystack = "noise"
    key_kind: KeyKind = "words"
    value_kind: ValueKind = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


TASKS = {
    task.name: task
    for task in (
        Task("niah_single_1", "niah", 128),
        Task("niah_single_2", "niah", 128, "essay"),
        Task("niah_single_3", "niah", 128, "essay", value_kind="uuid"),
        Task("niah_multikey_1", "niah", 128, "essay", num_keys=4),
        Task("niah_multikey_2", "niah", 128, "needles"),
        Task("niah_multikey_3", "niah", 128, "needles", key_kind="uuid", value_kind="uuid"),
        Task("niah_multivalue", "niah", 128, "essay", num_values=4),
        Task("niah_multiquery", "niah", 128, "essay", num_keys=4, num_queries=4),
        Task("vt", "vt", 30),
        Task("cwe", "cwe", 120),
        Task("fwe", "fwe", 50),
        Task("qa_1", "qa", 32),
        Task("qa_2", "qa", 32),
    )
}


def task_named(name: str) -> Task:
    """The task, or an error that lists them all."""
    if name not in TASKS:
        raise UserError(f"unknown RULER task {name!r}; use one of {', '.join(TASKS)}")
    return TASKS[name]


# {} stands for any of the references; the lookaheads keep 123 from being found in 1234.
_FORMS = {"niah": r"is: ({})(?![\w-])", "vt": r"\bVAR ({}) ="}


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and what a good answer to it contains.

    `max_length` is the length in tokens that was asked for, `length` the length it has: prompt,
    answer prefix and `tokens_to_generate` together, by the tokenizer that made it; None where a
    file does not say.
    """

    task: str
    row: int  # counts from 0 in its source
    prompt: str  # the user's turn
    answer_prefix: str  # put into the model's mouth; a base model gets both as one text
    references: tuple[str, ...]
    max_length: int | None = None
    length: int | None = None
    answer_positions: tuple[tuple[int, ...], ...] | None = None
    """The tokens of `prompt` that hold each answer, set by `locate`.

    Add the number of tokens that a chat form puts before the prompt.
    """

    @property
    def tokens_to_generate(self) -> int:
        return TASKS[self.task].tokens_to_generate

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """Character ranges [start, end) of the answer in the prompt, in text order.

        niah has every value asked for, vt every variable on the chain, the other tasks none.
        """
        form = _FORMS.get(TASKS[self.task].family)
        if form is None:
            return ()
        pattern = form.format("|".join(map(re.escape, self.references)))
        return tuple(match.span(1) for match in re.finditer(pattern, self.prompt))


class Vocabulary(Protocol):
    """What is asked of a tokenizer: ids whose bytes, joined, are the text's."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""


def locate(example: Example, vocabulary: Vocabulary) -> Example:
    """The example with `answer_positions` by this tokenizer."""
    spans = example.answer_spans
    positions: tuple[tuple[int, ...], ...] = ()
    if spans:
        ids = vocabulary.encode(example.prompt)
        positions = token_positions(example.prompt, spans, ids, vocabulary)
    return dataclasses.replace(example, answer_positions=positions)


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


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))  # half a surrogate pair is one "?", as tokenizers encode it


def score(example: Example, prediction: str) -> float:
    """0 to 100; the prediction is what follows `answer_prefix`."""
    is_qa = TASKS[example.task].family == "qa"
    metric = string_match_part if is_qa else string_match_all
    return metric(prediction, example.references)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, times 100."""
    return 100.0 * sum(_occurrences(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """100 if any of the references occurs in the prediction, else 0."""
    return 100.0 * any(_occurrences(prediction, references))


def _occurrences(prediction: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise ValueError("a prediction cannot be scored without references")
    text = re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()
    return [reference.lower() in text for reference in references]
