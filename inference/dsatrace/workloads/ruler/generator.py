"""Generates RULER examples of a given length by the run's own tokenizer, the same for the same seed.

The longest prompt that fits is taken: prompt, answer prefix and tokens to generate come to
at most the length asked for, and one more unit (noise line, sentence, needle, word,
document) would be too many. Six tasks need no text; the essay tasks take a text or use our
own; the qa tasks need their data set's file.

    sources = Sources(haystack=Path("essays.txt").read_text(), squad=Path("dev-v2.0.json"))
    examples = generate("qa_1", 4096, tokenizer, num_examples=10, sources=sources)

Rows differ from NVIDIA's even at its seed: random state, words and wording are ours, and
the search is made anew for each row (there a row can fall far short of its length).
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.ruler.example import Example, Task, Vocabulary, locate, task_named
from dsatrace.workloads.ruler.plans import (
    Plan,
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
    """Texts from outside."""

    haystack: str | None = None  # the essay, which starts over when it ends; None: our own
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
    """Examples of one task, rows 0, 1, ...; a row does not depend on how many are made.

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
                prompt = plan.build(size)  # a chat form puts its own tokens between the two texts
                texts = (prompt.text, prompt.answer_prefix)
                num_tokens = sum(len(vocabulary.encode(text)) for text in texts)
                return num_tokens + task.tokens_to_generate + overhead_tokens

            try:
                guess = largest_fitting(count, plan.minimum, max_length, guess)
            except UserError as error:
                raise UserError(f"{task.name}, row {row}: {error}") from error
            prompt = plan.build(guess)
            example = Example(
                task=task.name,
                row=row,
                prompt=prompt.text,
                answer_prefix=prompt.answer_prefix,
                references=prompt.references,
                max_length=max_length,
                length=count(guess),
            )
            yield locate(example, vocabulary)

    return examples()


def _planner(task: Task, max_length: int, sources: Sources) -> Planner:
    """How to plan a row of this task; reads its text or data set, once."""
    if task.family == "vt":
        return lambda draw, row: vt_plan(draw)
    if task.family == "cwe":
        return lambda draw, row: cwe_plan(draw, max_length)
    if task.family == "fwe":
        return lambda draw, row: fwe_plan(draw, max_length)
    if task.family == "qa":
        return functools.partial(qa_plan, data=_questions(task, sources))
    is_ours = sources.haystack is None
    essay = _sentences(ESSAY if sources.haystack is None else sources.haystack)
    return lambda draw, row: niah_plan(task, draw, _endless(essay, draw.getrandbits(64) if is_ours else None))


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
    """The sentences over and over, as they stand or, with a seed, in another order each round."""
    draw = random.Random(seed)
    while True:
        yield from sentences if seed is None else draw.sample(sentences, len(sentences))


def largest_fitting(count: Callable[[int], int], minimum: int, limit: int, guess: int = 0) -> int:
    """The largest size >= `minimum` with `count(size) <= limit`; `count` must never fall and at last grow.

    Interpolation search: counts grow nearly in proportion to the size, so a handful of probes
    is enough where halving takes twenty. `guess` is probed first. Raises `UserError` if not
    even `minimum` fits.
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
