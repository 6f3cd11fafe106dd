"""RULER's metrics: how many of the references occur in the prediction, 0 to 100.

Case-insensitive substrings, as NVIDIA's `eval/synthetic/constants.py` defines them: all
references count in equal parts (niah, vt, cwe, fwe), or any one is enough (qa). Control
characters of the prediction become line breaks first, as there. Knows no model.

    score(example, answer)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsatrace.workloads.ruler.example import Example

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, times 100."""
    return 100.0 * sum(_occurrences(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """100 if any of the references occurs in the prediction, else 0."""
    return 100.0 * any(_occurrences(prediction, references))


def score(example: Example, prediction: str) -> float:
    """The example's score by its task's metric; the prediction is what follows `answer_prefix`."""
    metric = string_match_part if example.metric == "match_part" else string_match_all
    return metric(prediction, example.references)


def _occurrences(prediction: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise ValueError("a prediction cannot be scored without references")
    text = _CONTROL.sub("\n", prediction).strip().lower()
    return [reference.lower() in text for reference in references]
