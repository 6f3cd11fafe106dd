"""English-looking text drawn from word lists of our own: any amount, the same for the same seed.

Its sentences say nothing. It has the length and the variety that a prefix cache sees, and
supports no claim about what people write. Knows no workload.

    text(random.Random(7), num_words=120)
"""

from __future__ import annotations

import random

from dsatrace.workloads.ruler.words import ADJECTIVES, NOUNS

_VERBS = """\
follows carries mends hides paints borrows counts forgets visits sketches lifts guards trades washes
describes measures answers gathers repairs signals weighs crosses admires collects drops opens closes turns
watches builds sells finds loses keeps sends reads stores cleans moves lights
"""
_LINKS = "near beside behind above under beyond inside around against towards before after"
_PATTERNS = (
    "The {a} {n} {v} the {b} {m}.",
    "A {a} {n} {v} every {m} {l} the {o}.",
    "{L} the {n}, one {a} {m} {v} the {o}.",
    "Each {n} {l} the {a} {m} {v} some {b} {o}.",
    "No {n} {v} the {m}, but the {a} {o} does.",
    "When the {n} {v} the {a} {m}, the {b} {o} waits {l} it.",
)
_QUESTIONS = (
    "Why does the {a} {n} stand {l} the {m}?",
    "Which {n} {v} the {b} {m}?",
    "How many of the {a} {n}s lie {l} the {b} {m}, and what {v} them?",
    "What would change if the {n} were not {a}, given that it {v} the {m} {l} the {o}?",
)
VERBS, LINKS = tuple(_VERBS.split()), tuple(_LINKS.split())
SENTENCES_A_PARAGRAPH = 6


def sentence(draw: random.Random) -> str:
    return _fill(draw, draw.choice(_PATTERNS))


def question(draw: random.Random) -> str:
    return _fill(draw, draw.choice(_QUESTIONS))


def text(draw: random.Random, num_words: int) -> str:
    """Whole sentences, in paragraphs, until they have at least `num_words` words; at least one."""
    sentences, count = [sentence(draw)], 0
    while (count := count + sentences[-1].count(" ") + 1) < num_words:
        sentences.append(sentence(draw))
    starts = range(0, len(sentences), SENTENCES_A_PARAGRAPH)
    return "\n\n".join(" ".join(sentences[at : at + SENTENCES_A_PARAGRAPH]) for at in starts)


def length(draw: random.Random, mean: float, least: int = 1) -> int:
    """A length with an exponential tail and the given mean, as prompts' lengths have; at least `least`."""
    return least + round(draw.expovariate(1 / max(mean - least, 1e-9)))


def _fill(draw: random.Random, pattern: str) -> str:
    link = draw.choice(LINKS)
    return pattern.format(
        a=draw.choice(ADJECTIVES),
        b=draw.choice(ADJECTIVES),
        n=draw.choice(NOUNS),
        m=draw.choice(NOUNS),
        o=draw.choice(NOUNS),
        v=draw.choice(VERBS),
        l=link,
        L=link.capitalize(),
    )
