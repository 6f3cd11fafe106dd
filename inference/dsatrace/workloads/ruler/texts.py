"""Every sentence that a RULER prompt is made of, in our own words but of NVIDIA's structure.

Noise unit, needle and assignment are the benchmark's own forms, since they must be found in
its files too. Instructions, questions and answer prefixes are ours: scores on generated
prompts stand beside each other, not beside published ones; read NVIDIA's files for those.
Also completes rows that bring only a context and a query. Every function gives the prompt
and the answer prefix.

    prompt, answer_prefix = niah("number", context, "brisk-anchor", plural=False)
"""

from __future__ import annotations

from collections.abc import Sequence

from dsatrace.workloads.ruler.example import ValueKind

# One line of filler: five short sentences, 24 DeepSeek tokens with its newline.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

Parts = tuple[str, str]


def needle(kind: ValueKind, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def chain(names: Sequence[str], value: str) -> list[str]:
    """The lines of one chain of assignments: the value goes from each name to the next."""
    sources = (value, *(f"VAR {name}" for name in names))
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]


def enumeration(keys: Sequence[str]) -> str:
    """'a', 'a, and b', 'a, b, and c': as NVIDIA's rows name their keys."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def niah(kind: str, context: str, query: str, plural: bool) -> Parts:
    """`query` names the keys; `plural` when more than one value is to be found."""
    hidden = f"Some special magic {kind}s are" if plural else f"A special magic {kind} is"
    asked = f"What are all the special magic {kind}s" if plural else f"What is the special magic {kind}"
    prompt = (
        f"{hidden} hidden in the text below. Read it with care, for I will ask about it at the end.\n"
        f"{context}\n{asked} for {query} given in the text above?"
    )
    subject, verb = (f"{kind}s", "are") if plural else (kind, "is")
    return prompt, f" The special magic {subject} for {query} given in the text above {verb}"


def vt(context: str, value: str, num_names: int = 5) -> Parts:
    prompt = (
        "Follow the variable assignments hidden in the text below, from one variable to the next.\n\n"
        f"{context}\nQuestion: Which variables in the text above hold the value {value}?"
    )
    return prompt, f" Answer: In the text above, {num_names} variables hold the value {value}, namely:"


def cwe(context: str, num_common: int = 10) -> Parts:
    prompt = (
        "Here is a numbered list of words, and some of them occur more often than others. "
        f"Remember the most frequent ones.\n{context}\n"
        f"Question: Which {num_common} words occur most often in the list above?"
    )
    return prompt, f" Answer: The {num_common} words that occur most often in the list are:"


def fwe(context: str) -> Parts:
    prompt = (
        "The text below is written in coded words. Count them, and find the three that occur most "
        f"often. {context}\nQuestion: Without any explanation, and leaving the dots '...' aside: "
        "which three coded words occur most often in the text above?"
    )
    return prompt, " Answer: The three coded words that occur most often in the text above are:"


def qa(context: str, question: str) -> Parts:
    task = "Answer the question from the documents {place}. Give the answer alone, without other words."
    prompt = (
        f"{task.format(place='below')}\n\n{context}\n\n{task.format(place='above')}\n\nQuestion: {question}"
    )
    return prompt, " Answer:"
