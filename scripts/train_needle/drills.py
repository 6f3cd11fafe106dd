"""Drills: what a model learns before it can find needles in text, in tokens and not in conversations.

Repeated spans teach induction; units, keys and values at a growing distance teach what to look
for; recitals teach to tell many keys apart. Every answer is in its sample's first half. Knows no model.

    sample = recital(random.Random("train/0"), word_tokenizer(), 512)
    sample.ids, sample.answers          # 512 ids at most; [start, end) of what is to be said
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.texts import ADJECTIVES, NOUNS, word_pairs
from dsatrace.workloads.tokenizer import BOS, Tokenizer

NUM_SPECIAL_FIRST, NUM_SPECIAL_LAST = 3, 4
"""Ids at both ends of the vocabulary that no random text holds."""

_LINE = texts.needle("number", "{key}", "{value}") + "\n"
_FORMS = (
    " {key} {value}.",
    " {key}: {value}.",
    " {key} is {value}.",
    " for {key} is: {value}.",
    " for {key} given in the text above is {value}.",
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Token ids, and the ranges [start, end) in them that are to be predicted."""

    ids: list[int]
    answers: list[tuple[int, int]]


def repeats(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """A random string of tokens and then a rotated copy of it: what induction is learnt from."""
    return _repeats(draw, tokenizer, length, range(NUM_SPECIAL_FIRST, _words_end(tokenizer)))


def subset_repeats(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """`repeats` of every twelfth word only: the same circuit, found sooner among fewer tokens.

    Words and not bytes: learning apart what full stops and digits are made them one kind,
    and digits were then treated as what ends a sentence.
    """
    return _repeats(draw, tokenizer, length, range(NUM_SPECIAL_FIRST + 256, _words_end(tokenizer), 12))


def _repeats(draw: random.Random, tokenizer: Tokenizer, length: int, tokens: range) -> Sample:
    size = draw.randint(length // 4, (length - 1) // 2)
    span = draw.choices(tokens, k=size)
    turn = draw.randrange(size)
    ids = [tokenizer.special_id(BOS), *span, *span[turn:], *span[:turn]]
    return Sample(ids, [(1 + size + 1, len(ids))])


def _words_end(tokenizer: Tokenizer) -> int:
    return tokenizer.vocab_size - NUM_SPECIAL_LAST


def few_repeats(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """`repeats` of a handful of tokens: one token says too little, several before it have to be matched."""
    tokens = range(NUM_SPECIAL_FIRST, _words_end(tokenizer))
    alphabet = draw.choices(tokens, k=draw.randint(4, 16))
    size = draw.randint(length // 4, (length - 1) // 2)
    span = draw.choices(alphabet, k=size)
    ids = [tokenizer.special_id(BOS), *span, *span]
    return Sample(ids, [(1 + size + 4, len(ids))])


def units(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """Units of random tokens, key, filler and value, and the same shuffled: each value is an answer.

    All units share their filler, of no token or a few: the fewer, the nearer to `repeats`.
    """

    def drawn(count: int) -> list[int]:
        return draw.choices(range(NUM_SPECIAL_FIRST, _words_end(tokenizer)), k=count)

    key_size, value_size = draw.choice((1, 2, 2)), draw.choice((1, 1, 3))
    told, asked = drawn(draw.choice((0, 1, 1, 2, 3))), drawn(draw.choice((0, 1, 1, 2, 3, 6)))
    asked, end = draw.choice((told, asked)), drawn(draw.choice((0, 1)))
    cost = 2 * (key_size + value_size + len(end)) + len(told) + len(asked)
    items = [(drawn(key_size), drawn(value_size)) for _ in range(max(2, (length - 1) // cost))]
    ids = [tokenizer.special_id(BOS)]
    answers = list[tuple[int, int]]()
    for key, value in items:
        ids += [*key, *told, *value, *end]
    for key, value in draw.sample(items, len(items)):
        ids += [*key, *asked]
        answers.append((len(ids), len(ids) + value_size))
        ids += [*value, *end]
    return Sample(ids[:length], [span for span in answers if span[1] <= length])


def pairs(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """`recital` in few words, mostly with numbers of one token: as many keys as a length can hold.

    Told in one form and asked for in another: between key and number lie no words or some,
    so that finding a number by its key grows out of finding what came after a token.
    """
    digits = draw.choice((3, 3, 4, 7))
    return _recital(draw, tokenizer, length, draw.choice(_FORMS), draw.choice(_FORMS), digits)


def recital(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """Needles, and the same needles in another order: every number is to be found by its key."""
    return _recital(draw, tokenizer, length, _LINE, _LINE, digits=7)


def lookalikes(draw: random.Random, tokenizer: Tokenizer, length: int) -> Sample:
    """`recital` of keys made of a few words: each half of a key stands in many others."""
    size = round((length / 16) ** 0.5) + 2  # pairs enough: an item takes more than 16 tokens
    adjectives, nouns = draw.sample(ADJECTIVES, size), draw.sample(NOUNS, size)
    keys = [f"{adjective}-{noun}" for adjective in adjectives for noun in nouns]
    return _recital(draw, tokenizer, length, _LINE, _LINE, 7, iter(draw.sample(keys, len(keys))))


def _recital(
    draw: random.Random,
    tokenizer: Tokenizer,
    length: int,
    told: str,
    asked: str,
    digits: int,
    keys: Iterator[str] | None = None,
) -> Sample:
    """Items in the form `told`, then the same, shuffled, as `asked`: there each number is an answer."""
    encode = tokenizer.encode
    keys = word_pairs(draw) if keys is None else keys
    before, after = asked.split(" {value}")
    cost = sum(len(encode(form.format(key="brisk-anchor", value="1" * digits))) for form in (told, asked))
    count = max(1, (length - 2) // cost)
    items = [(next(keys), str(draw.randrange(10 ** (digits - 1), 10**digits))) for _ in range(count)]
    ids = [tokenizer.special_id(BOS)]
    answers = list[tuple[int, int]]()
    for key, value in items:
        ids += encode(told.format(key=key, value=value))
    for key, value in draw.sample(items, count):
        ids += encode(before.format(key=key))
        said = encode(f" {value}.")
        answers.append((len(ids), len(ids) + len(said)))
        ids += [*said, *encode(after[1:])]
    return Sample(ids[:length], [span for span in answers if span[1] <= length])
