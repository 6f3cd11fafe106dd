"""The thirteen tasks by their parameters, and one example of one of them.

Tasks, parameters and budgets as NVIDIA's RULER defines them (`synthetic.yaml`,
`constants.py`). Knows no text and no tokenizer.

    TASKS["niah_multikey_1"].num_keys        # 4
    TASKS["vt"].tokens_to_generate          # 30
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsatrace.errors import UserError

Family = Literal["niah", "vt", "cwe", "fwe", "qa"]
Haystack = Literal["noise", "essay", "needles"]
ValueKind = Literal["number", "uuid"]
KeyKind = Literal["words", "uuid"]
Metric = Literal["match_all", "match_part"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What tells one task from another; the fields from `haystack` on concern niah only."""

    name: str
    family: Family
    tokens_to_generate: int
    haystack: Haystack = "noise"
    key_kind: KeyKind = "words"
    value_kind: ValueKind = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def metric(self) -> Metric:
        """qa asks for any of its references, the other tasks for all of them."""
        return "match_part" if self.family == "qa" else "match_all"


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


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and what a good answer to it contains.

    `prompt` is the user's turn and `answer_prefix` what the answer begins with (put into
    the model's mouth; a base model gets both as one text). `row` counts from 0 in its
    source. `max_length` is the length in tokens that was asked for, `length` the length it
    has: prompt, answer prefix and `tokens_to_generate` together, by the tokenizer that
    made it; None where a file does not say.

    `answer_spans` are the places in the prompt where the answer stands (niah: every value
    asked for; vt: every variable on the chain), as character ranges [start, end) in text
    order; empty for the other tasks. `answer_positions` are the same places in tokens of
    `prompt`, one tuple a place, once a tokenizer has been named (`positions.locate`): add
    the number of tokens that a chat form puts before the prompt.
    """

    task: str
    row: int
    prompt: str
    answer_prefix: str
    references: tuple[str, ...]
    tokens_to_generate: int
    metric: Metric
    max_length: int | None = None
    length: int | None = None
    answer_spans: tuple[tuple[int, int], ...] = ()
    answer_positions: tuple[tuple[int, ...], ...] | None = None


def task_named(name: str) -> Task:
    """The task, or an error that lists them all."""
    if name not in TASKS:
        raise UserError(f"unknown RULER task {name!r}; use one of {', '.join(TASKS)}")
    return TASKS[name]
