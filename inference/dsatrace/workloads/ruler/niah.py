"""Needles in a haystack: the eight niah tasks, and variable tracking, which hides a chain likewise.

A noise or needle haystack has its needles on lines of their own, at any depth; an essay
has them at ends of sentences, at 40 depths from 0 to 100 %. In a needle haystack every
line is a needle and one is asked for. Knows no tokenizer.

    niah_plan(TASKS["niah_multikey_1"], random.Random(0), sentences).build(200).references
"""

from __future__ import annotations

import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterable, Iterator

from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import KeyKind, Task, ValueKind
from dsatrace.workloads.ruler.plan import FirstOf, Plan, Prompt, inserted
from dsatrace.workloads.ruler.words import word_pairs

_DEPTHS = [i / 39 for i in range(40)]
_NUM_HOPS = 4
_EXAMPLE_NOISE = 6  # lines of filler in the solved example of vt


def niah_plan(task: Task, draw: random.Random, sentences: Iterable[str]) -> Plan:
    """`sentences` are the essay's, without end; only the essay tasks take from them."""
    kind = task.value_kind
    keys, values = _keys(draw, task.key_kind), _values(draw, kind)
    hidden = [
        (key, next(values)) for key in itertools.islice(keys, task.num_keys) for _ in range(task.num_values)
    ]
    names = list(dict.fromkeys(key for key, _ in hidden))
    asked = draw.sample(names, task.num_queries)
    references = tuple(value for key in asked for k, value in hidden if k == key)
    needles = [texts.needle(kind, key, value) for key, value in hidden]
    if task.haystack == "essay":
        first, join, depths = FirstOf(sentences), " ", draw.sample(_DEPTHS, len(hidden))
    else:
        others = (texts.needle(kind, key, next(values)) for key in keys)
        first = FirstOf(others if task.haystack == "needles" else itertools.repeat(texts.NOISE))
        join, depths = "\n", [draw.random() for _ in hidden]

    def build(size: int) -> Prompt:
        context = join.join(inserted(first(size), list(zip(depths, needles, strict=True))))
        parts = texts.niah(kind, context, texts.enumeration(asked), plural=len(references) > 1)
        return Prompt(*parts, references)

    return Plan(minimum=0, build=build)


def vt_plan(draw: random.Random) -> Plan:
    """One chain of four hops in noise, after a solved example with shorter names."""
    shown, shown_value = _names(draw, 3), str(draw.randint(10_000, 99_998))
    names, value = _names(draw, 5), str(draw.randint(10_000, 99_998))
    depths = sorted(draw.random() for _ in names)
    example = _chain_prompt(_EXAMPLE_NOISE, shown, shown_value, sorted(draw.random() for _ in shown))
    solved = f"{example.text}{example.answer_prefix} {' '.join(shown)}\n\n"

    def build(size: int) -> Prompt:
        prompt = _chain_prompt(size, names, value, depths)
        return Prompt(solved + prompt.text, prompt.answer_prefix, prompt.references)

    return Plan(minimum=0, build=build)


def _chain_prompt(num_noise: int, names: list[str], value: str, depths: list[float]) -> Prompt:
    lines = inserted([texts.NOISE] * num_noise, list(zip(depths, texts.chain(names, value), strict=True)))
    return Prompt(*texts.vt("\n".join(lines), value, len(names)), tuple(names))


def _names(draw: random.Random, length: int) -> list[str]:
    make = _distinct(lambda: "".join(draw.choices(string.ascii_uppercase, k=length)))
    return list(itertools.islice(make, _NUM_HOPS + 1))


def _keys(draw: random.Random, kind: KeyKind) -> Iterator[str]:
    return word_pairs(draw) if kind == "words" else _uuids(draw)


def _values(draw: random.Random, kind: ValueKind) -> Iterator[str]:
    if kind == "uuid":
        return _uuids(draw)
    return _distinct(lambda: str(draw.randrange(1_000_000, 10_000_000)))


def _uuids(draw: random.Random) -> Iterator[str]:
    return _distinct(lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)))


def _distinct(make: Callable[[], str]) -> Iterator[str]:
    """Draws without end, none twice: a value found in the prompt is found once."""
    seen = set[str]()
    while True:
        item = make()
        if item not in seen:
            seen.add(item)
            yield item
