"""Tasks whose answer is a count over the whole context: common words (cwe) and frequent words (fwe).

cwe: ten words occur 30 times and all others 3 times (below 4096 tokens 6 and 1), in a
numbered list, after a solved example of 3 and 1. fwe: words of six letters whose counts
follow a zeta law of exponent 2; the most frequent is shown as "..." and the next three are
the answer. Size is the number of other words (cwe) or of draws (fwe). Knows no tokenizer.

    cwe_plan(random.Random(0), 4096).build(50).references       # ten words
"""

from __future__ import annotations

import itertools
import math
import random
import string

from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.plan import FirstOf, Plan, Prompt
from dsatrace.workloads.ruler.words import NUM_WORDS, word_pairs, words

_NUM_COMMON = 10
_ZETA_2 = math.pi**2 / 6
# From here on ranks 4 and 5 differ by a whole word, and so do the ranks before: the answer is one.
_MIN_DRAWS = math.ceil(_ZETA_2 / (1 / 4**2 - 1 / 5**2))


def cwe_plan(draw: random.Random, max_length: int) -> Plan:
    """Single words while they last, pairs of words ("brisk-anchor") for longer lists."""
    repeats = (30, 3) if max_length >= 4096 else (6, 1)
    singles, pairs, shuffle_seed = FirstOf(words(draw)), FirstOf(word_pairs(draw)), draw.getrandbits(64)

    def build(size: int) -> Prompt:
        needed = 3 * _NUM_COMMON + size
        pool = singles(needed) if needed <= NUM_WORDS else pairs(needed)
        shown, pool = pool[: 2 * _NUM_COMMON], pool[2 * _NUM_COMMON :]
        example = _word_list(shown, (3, 1), shuffle_seed)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(example.references, 1))
        prompt = _word_list(pool, repeats, shuffle_seed + size)
        text = f"{example.text}{example.answer_prefix} {listed}\n{prompt.text}"
        return Prompt(text, prompt.answer_prefix, prompt.references)

    return Plan(minimum=1, build=build)


def _word_list(pool: list[str], repeats: tuple[int, int], seed: int) -> Prompt:
    """The first ten words of the pool are the common ones."""
    common = pool[:_NUM_COMMON]
    entries = common * repeats[0] + pool[_NUM_COMMON:] * repeats[1]
    random.Random(seed).shuffle(entries)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    return Prompt(*texts.cwe(context, _NUM_COMMON), tuple(common))


def fwe_plan(draw: random.Random, max_length: int) -> Plan:
    """A vocabulary of a 50th of the length asked for, as NVIDIA's."""
    vocabulary = _coded_words(draw, max(max_length // 50, 5))
    shuffle_seed = draw.getrandbits(64)

    def build(size: int) -> Prompt:
        counts = (int(size / (_ZETA_2 * rank**2)) for rank in itertools.count(1))
        text = list[str]()
        for word, count in zip(("...", *vocabulary[1:]), counts, strict=False):
            text += [word] * count
        random.Random(shuffle_seed + size).shuffle(text)
        return Prompt(*texts.fwe(" ".join(text)), tuple(vocabulary[1:4]))

    return Plan(minimum=_MIN_DRAWS, build=build)


def _coded_words(draw: random.Random, count: int) -> list[str]:
    found = dict[str, None]()  # a set that keeps its order
    while len(found) < count:
        found["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    return list(found)
