"""What a task's builder hands to the generator: a prompt of any size, its draws made beforehand.

Size counts the task's own unit (noise lines, sentences, needles, words, documents). A
bigger prompt repeats the draws of a smaller one and adds to them, so its token count
never falls, and one seed gives one prompt. Knows no tokenizer.

    plan = Plan(minimum=1, build=lambda size: Prompt(text, answer_prefix, references))
    first = FirstOf(endless)            # first(3) and first(5) begin alike
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from dsatrace.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """`build(size)` for any size from `minimum` on."""

    minimum: int
    build: Callable[[int], Prompt]


class FirstOf(Generic[T]):
    """The first so many things of an iterator, drawn once and kept."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._drawn: list[T] = []

    def __call__(self, count: int) -> list[T]:
        self._drawn.extend(itertools.islice(self._items, max(0, count - len(self._drawn))))
        if len(self._drawn) < count:
            raise UserError(
                f"there is material for a size of {len(self._drawn)} only; ask for a shorter length"
            )
        return self._drawn[:count]


def inserted(lines: Sequence[str], extra: Sequence[tuple[float, str]]) -> list[str]:
    """The lines with each (depth, line) put in: depth 0 before the first, 1 after the last."""
    placed = sorted((round(depth * len(lines)), i, line) for i, (depth, line) in enumerate(extra))
    result, start = list[str](), 0
    for place, _, line in placed:
        result += [*lines[start:place], line]
        start = place
    return [*result, *lines[start:]]
