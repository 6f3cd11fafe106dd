"""Makes RULER examples of a given length by the run's own tokenizer, the same for the same seed.

The longest prompt that fits is taken: prompt, answer prefix and tokens to generate come
to at most the length asked for, and one more unit (noise line, sentence, needle, word,
document) would be too many. The tokens that hold the answer are recorded. Six tasks need
no text; the essay tasks take one or use our own; the qa tasks need their data set's file.

    sources = Sources(haystack=Path("essays.txt").read_text(), squad=Path("dev-v2.0.json"))
    examples = generate("qa_1", 4096, tokenizer, num_examples=10, sources=sources)

Rows differ from NVIDIA's even at its seed: random state, words and wording are ours, and
so is the search, made anew for each row (there a row can fall far short of its length).
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.ruler.example import Example, Task, Vocabulary, answer_spans, locate, task_named
from dsatrace.workloads.ruler.plans import (
    Plan,
    Prompt,
    QuestionSet,
    cwe_plan,
    fwe_plan,
    niah_plan,
    qa_plan,
    read_hotpotqa,
    read_squad,
    vt_plan,
)
from dsatrace.workloads.ruler.texts import ESSAY

Planner = Callable[[random.Random, int], Plan]  # (draw, row)


@dataclasses.dataclass(frozen=True)
class Sources:
    """Texts from outside. `haystack` is the essay itself, None for our own; it starts over when it ends."""

    haystack: str | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None


def generate(
    task_name: str,
    max_length: int,
    vocabulary: Vocabulary,
    num_examples: int,
    seed: int = 42,
    sources: Sources = Sources(),
    overhead_tokens: int = 0,
) -> Iterator[Example]:
    """Examples of one task, rows 0, 1, ...; each depends on its row alone, not on how many are made.

    `overhead_tokens` are those that the caller's chat form adds to prompt and prefix.
    Raises `UserError` for an unknown task, a length too short, and texts that are missing.
    """
    task = task_named(task_name)
    planner = _planner(task, max_length, sources)

    def examples() -> Iterator[Example]:
        guess = 0
        for row in range(num_examples):
            plan = planner(random.Random(f"{seed}/{task.name}/{max_length}/{row}"), row)

            def count(size: int, plan: Plan = plan) -> int:
                return _num_tokens(plan.build(size), task, vocabulary) + overhead_tokens

            try:
                guess = largest_fitting(count, plan.minimum, max_length, guess)
            except UserError as error:
                raise UserError(f"{task.name}, row {row}: {error}") from error
            example = _example(task, row, plan.build(guess), max_length, count(guess))
            yield locate(example, vocabulary)

    return examples()


def _planner(task: Task, max_length: int, sources: Sources) -> Planner:
    """How to plan a row of this task; texts and data sets are read here, once."""
    if task.family == "vt":
        return lambda draw, row: vt_plan(draw)
    if task.family == "cwe":
        return lambda draw, row: cwe_plan(draw, max_length)
    if task.family == "fwe":
        return lambda draw, row: fwe_plan(draw, max_length)
    if task.family == "qa":
        return functools.partial(qa_plan, data=_questions(task, sources))
    essay = _sentences(ESSAY if sources.haystack is None else sources.haystack)
    shuffled = sources.haystack is None
    return lambda draw, row: niah_plan(
        task, draw, _endless(essay, draw.getrandbits(64) if shuffled else None)
    )


def _questions(task: Task, sources: Sources) -> QuestionSet:
    if task.name == "qa_1":
        path, read, name = sources.squad, read_squad, "SQuAD 2.0's dev-v2.0.json"
    else:
        path, read, name = sources.hotpotqa, read_hotpotqa, "HotpotQA's hotpot_dev_distractor_v1.json"
    if path is None:
        raise UserError(f"{task.name} needs {name}; give that file, or choose another task")
    return read(path)


def _sentences(text: str) -> list[str]:
    """Sentences of a text, its white space made single spaces."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    if not any(found):
        raise UserError("the haystack text is empty; give one with sentences in it")
    return found


def _endless(sentences: list[str], seed: int | None) -> Iterator[str]:
    """The sentences over and over: as they stand, or each round in an order of its own."""
    draw = random.Random(seed)
    while True:
        yield from sentences if seed is None else draw.sample(sentences, len(sentences))


def _num_tokens(prompt: Prompt, task: Task, vocabulary: Vocabulary) -> int:
    """Prompt and prefix are counted apart, since a chat form puts its own tokens between them."""
    parts = (prompt.text, prompt.answer_prefix)
    return sum(len(vocabulary.encode(part)) for part in parts) + task.tokens_to_generate


def _example(task: Task, row: int, prompt: Prompt, max_length: int, length: int) -> Example:
    return Example(
        task=task.name,
        row=row,
        prompt=prompt.text,
        answer_prefix=prompt.answer_prefix,
        references=prompt.references,
        tokens_to_generate=task.tokens_to_generate,
        metric=task.metric,
        max_length=max_length,
        length=length,
        answer_spans=answer_spans(task.name, prompt.text, prompt.references),
    )


def largest_fitting(count: Callable[[int], int], minimum: int, limit: int, guess: int = 0) -> int:
    """The largest size >= `minimum` with `count(size) <= limit`; `count` must not fall, and grow in the end.

    A bracket as in binary search, probed where a straight line through its ends says: counts
    grow nearly in proportion to the size, so a handful of probes is enough where halving takes
    twenty. `guess` is probed first. Raises `UserError` with the numbers if not even `minimum` fits.
    """
    low, low_count = minimum, count(minimum)
    if low_count > limit:
        raise UserError(f"needs at least {low_count} tokens, not {limit}; ask for a larger length")
    first, first_count = low, low_count
    high, high_count = 0, 0  # high 0: no size is known yet that does not fit
    probe, num_bracketed = max(guess, low + 1), 0
    while not high or high - low > 1:
        probed = count(probe)
        if probed <= limit:
            low, low_count = probe, probed
        else:
            high, high_count = probe, probed
        if not high:
            slope = max((low_count - first_count) / (low - first), 1e-3)
            probe = min(low + 1 + int((limit - low_count) / slope), 64 * low + 64)
            continue
        num_bracketed += 1
        probe = low + (limit - low_count) * (high - low) // (high_count - low_count)
        if num_bracketed % 4 == 0:  # halve now and then, so that no curve can make this slow
            probe = (low + high) // 2
        probe = min(max(probe, low + 1), high - 1)
    return low
