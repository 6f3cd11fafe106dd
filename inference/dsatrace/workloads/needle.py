"""A needle-in-a-haystack prompt of our own wording: one fact hidden in idle sentences, asked for at the end.

Knows no tokenizer: the caller counts.

    prompt = needle_prompt(2048, lambda text: len(tokenizer.encode(text)), depth=0.5, seed=0)
    prompt.text, prompt.answer
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from dsatrace.errors import UserError
from dsatrace.workloads.ruler.generator import largest_fitting

_OPENING = (
    "Below is a long walk through a harbour town. One sentence in it gives a locker number. Keep it in mind."
)
_NEEDLE = "The number of the {owner}'s locker is {number}."
_QUESTION = "What is the number of the {owner}'s locker? Answer with the number alone."

_OWNERS = ("baker", "pilot", "weaver", "surgeon", "gardener", "printer", "tailor", "glazier")
_IDLE = (
    "A ferry left the quay with hardly anyone on deck.",
    "Two gulls argued over a crust beside the fountain.",
    "The clock on the town hall ran a little behind.",
    "Someone had painted the railings green again.",
    "Rain gathered over the hills and then thought better of it.",
    "A cart full of oranges stood outside the market hall.",
    "The lighthouse keeper waved at no one in particular.",
    "Three children counted the boats and never agreed.",
    "A dog slept across the doorway of the bookshop.",
    "The tide pulled back and left its usual collection of rope.",
    "From an open window came the sound of a slow piano.",
    "The fishmonger folded his newspaper into a hat.",
    "A tram rattled past with its lamps already lit.",
    "On the corner, a man repaired umbrellas in silence.",
    "The wind carried sawdust from the shipyard to the square.",
    "Nobody had wound the musical box in the museum for years.",
    "A kite had caught itself in the chestnut tree.",
    "The bridge was raised for a yacht with yellow sails.",
    "Old timetables still hung in the waiting room.",
    "Somewhere behind the warehouses a kettle began to whistle.",
    "The steps down to the beach were warm from the sun.",
    "A postman sorted his letters on the edge of the well.",
    "Late bees moved along the window boxes of the inn.",
    "The last bus was early, which surprised the driver most of all.",
)


@dataclasses.dataclass(frozen=True)
class NeedlePrompt:
    text: str
    answer: str  # what a reply must contain


def needle_prompt(
    num_tokens: int, count_tokens: Callable[[str], int], depth: float = 0.5, seed: int = 0
) -> NeedlePrompt:
    """The longest such prompt of at most `num_tokens`.

    `depth` 0 hides the needle before the first idle sentence and 1 after the last.
    `count_tokens` must not fall when a sentence is added.
    """
    if not 0.0 <= depth <= 1.0:
        raise UserError(f"needle depth must lie between 0 and 1, not {depth}")
    draw = random.Random(seed)
    owner, answer = draw.choice(_OWNERS), str(draw.randrange(100_000, 1_000_000))
    needle, question = _NEEDLE.format(owner=owner, number=answer), _QUESTION.format(owner=owner)
    idle, sentences = _idle_sentences(draw), list[str]()

    def render(num_idle: int) -> str:
        while len(sentences) < num_idle:
            sentences.append(next(idle))
        place = round(depth * num_idle)
        haystack = " ".join((*sentences[:place], needle, *sentences[place:num_idle]))
        return f"{_OPENING}\n{haystack}\n{question}"  # a paragraph: blank lines separate prompts

    def count(num_idle: int) -> int:
        return count_tokens(render(num_idle))

    if count(0) > num_tokens:
        raise UserError(f"a needle prompt needs at least {count(0)} tokens, not {num_tokens}")
    return NeedlePrompt(render(largest_fitting(count, 0, num_tokens)), answer)


def _idle_sentences(draw: random.Random) -> Iterator[str]:
    """All idle sentences round after round, in another order each time, none twice in a row."""
    last = ""
    while True:
        order = list(_IDLE)
        draw.shuffle(order)
        if order[0] == last:
            order.reverse()
        yield from order
        last = order[-1]
