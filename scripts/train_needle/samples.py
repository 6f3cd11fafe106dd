"""Training conversations without end: the text of our own generators in the chat form that serves.

Every sample is drawn from a `random.Random` seeded by a name, so a step's batch is always the same,
and the evaluation draws from other names. Only answers are learnt; the rest is context. Knows no model.

    sample = SAMPLERS["niah"](random.Random("train/0"), word_tokenizer(), 512)
    sample.ids, sample.answers          # 512 ids at most; [start, end) of what is to be said
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from dsatrace.workloads.needle import needle_prompt
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import Haystack, Task
from dsatrace.workloads.ruler.plans import Plan, Prompt, niah_plan, vt_plan
from dsatrace.workloads.ruler.texts import ESSAY, word_pairs
from dsatrace.workloads.tokenizer import ASSISTANT, BOS, END_THINK, EOS, USER, Tokenizer
from train_needle import drills
from train_needle.drills import Sample

_NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d+)\.")
_SENTENCES = re.split(r"(?<=[.!?])\s+", " ".join(ESSAY.split()))

Sampler = Callable[[random.Random, Tokenizer, int], Sample]
"""(draw, tokenizer, longest length in tokens) -> a sample of at most that length."""


class Talk:
    """A conversation as it grows, in the form of `encode_chat`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = [tokenizer.special_id(BOS)]
        self.answers: list[tuple[int, int]] = []

    def ask(self, prompt: str, prefix: str, answer: str) -> None:
        """One turn: the user's prompt, the answer's given beginning, and the answer to learn with its EOS."""
        special, encode = self.tokenizer.special_id, self.tokenizer.encode
        self.ids += [special(USER), *encode(prompt), special(ASSISTANT), special(END_THINK), *encode(prefix)]
        start = len(self.ids)
        self.ids += [*encode(answer), special(EOS)]
        self.answers.append((start, len(self.ids)))

    def cut(self, length: int) -> Sample:
        """The conversation's whole turns within `length` tokens."""
        kept = [(start, end) for start, end in self.answers if end <= length]
        return Sample(self.ids[: kept[-1][1] if kept else length], kept)


def niah(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """Needles in noise, in running text or among needles; one is asked for, then others, turn by turn."""
    haystack: Haystack = draw.choices(("noise", "essay", "needles"), (3, 3, 4))[0]
    num_keys = 1 if haystack == "needles" else draw.choice((1, 1, 2, 4, 8))
    return _niah(Task("niah", "niah", 128, haystack, num_keys=num_keys), draw, tokenizer, length)


def values(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """Several values of one key, or the values of several keys, in running text or noise."""
    haystack: Haystack = draw.choice(("noise", "essay"))
    count = draw.choice((2, 2, 3, 4))
    if draw.random() < 0.5:
        task = Task("niah", "niah", 128, haystack, num_values=count)
    else:
        task = Task("niah", "niah", 128, haystack, num_keys=4, num_queries=count)
    return _niah(task, draw, tokenizer, length, may_turn=False)


def _niah(
    task: Task, draw: random.Random, tokenizer: Tokenizer, length: int, may_turn: bool = True
) -> Sample:
    turn_cost = 42  # a question, its answer's beginning and the answer
    num_turns = draw.choice((0, 1, 2, 4, 8)) if may_turn and length >= 192 else 0
    num_turns = min(num_turns, max(0, length - 160) // (2 * turn_cost))
    prompt = _fitted(niah_plan(task, draw, _endless(draw)), tokenizer, length - num_turns * turn_cost - 8)
    talk = Talk(tokenizer)
    talk.ask(prompt.text, prompt.answer_prefix, f" {texts.enumeration(prompt.references)}.")
    hidden = list(dict(_NEEDLE.findall(prompt.text)).items())
    for _ in range(num_turns):
        key, value = draw.choice(hidden)
        text, prefix = texts.niah("number", "", key, plural=False)
        talk.ask(text.rpartition("\n")[2], prefix, f" {value}.")
    return talk.cut(length)


def chain(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """RULER's variable tracking: name every variable that holds the value."""
    prompt = _fitted(vt_plan(draw), tokenizer, length - 8)
    talk = Talk(tokenizer)
    talk.ask(prompt.text, prompt.answer_prefix, f" {' '.join(prompt.references)}.")
    return talk.cut(length)


def locker(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """The prompt of `dsatrace needle`, whose answer begins with nothing put into the model's mouth."""
    sizes = dict[str, int]()

    def count(text: str) -> int:
        return sizes.setdefault(text, len(tokenizer.encode(text)))

    prompt = needle_prompt(length - 8, count, draw.random(), draw.getrandbits(60))
    talk = Talk(tokenizer)
    talk.ask(prompt.text, "", prompt.answer)
    return talk.cut(length)


def word_list(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """A numbered list of words, of which the one at a number is asked for, turn by turn."""
    pairs, count = word_pairs(draw), max(2, min(99, (length - 60) // 8))
    words = [next(pairs) for _ in range(count)]
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    talk = Talk(tokenizer)
    opening = f"Here is a numbered list of words.\n{listed}\n"
    for _ in range(4):
        i = draw.randrange(count)
        talk.ask(f"{opening}Which word is {i + 1}. in the list above?", f" {i + 1}.", f" {words[i]}.")
        opening = ""
    return talk.cut(length)


def copying(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """A text of our own essay's sentences, which the answer repeats."""
    text = _endless(draw)
    sentences, size = list[str](), 0
    while True:
        sentence = next(text)
        size += len(tokenizer.encode(f" {sentence}"))
        if sentences and 2 * size > length - 16:
            break
        sentences.append(sentence)
    repeated = " ".join(sentences)
    talk = Talk(tokenizer)
    talk.ask(f"Repeat the text below.\n{repeated}", "", repeated)
    return talk.cut(length)


SAMPLERS: dict[str, Sampler] = {
    "subset_repeats": drills.subset_repeats,
    "repeats": drills.repeats,
    "few_repeats": drills.few_repeats,
    "units": drills.units,
    "pairs": drills.pairs,
    "recital": drills.recital,
    "lookalikes": drills.lookalikes,
    "niah": niah,
    "values": values,
    "chain": chain,
    "locker": locker,
    "word_list": word_list,
    "copying": copying,
}


def _endless(draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(_SENTENCES, len(_SENTENCES))


def _fitted(plan: Plan, tokenizer: Tokenizer, length: int) -> Prompt:
    """About the largest prompt whose turn fits: a line through two sizes, then down where it missed."""

    def cost(prompt: Prompt) -> int:
        text = f"{prompt.text}{prompt.answer_prefix} {texts.enumeration(prompt.references)}."
        return len(tokenizer.encode(text)) + 5  # the turn's special tokens

    least = plan.build(plan.minimum)
    base = cost(least)
    slope = max(1.0, (cost(plan.build(plan.minimum + 8)) - base) / 8)
    size = plan.minimum + max(0, int((length - base) / slope))
    while size > plan.minimum:
        prompt = plan.build(size)
        excess = cost(prompt) - length
        if excess <= 0:
            return prompt
        size = max(plan.minimum, size - max(1, int(excess / slope)))
    return least
