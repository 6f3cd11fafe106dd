"""What a sweep is asked for: which layers, and which rows of each transcript. Standard library only.

    layers = layers_of("0-3", num_layers=61)              # range(0, 4)
    rows = Rows.of("last:512")
    rows.positions("r0", num_tokens=8192, prompt_tokens=None)     # range(7679, 8191)

A row is a query: the token at its position selects among the tokens up to it. A transcript's last token is
none, since decode never feeds it back.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from dsatrace.errors import UserError

_ROWS = re.compile(r"answer|last:([0-9]+)|range:([0-9]+)-([0-9]+)")
_CONSECUTIVE = "rows are consecutive, since with gaps nothing can be said of reuse from step to step"
NEAR_CHANCE = (0, 1)
"""Layers that are reported to select near chance (1.5 % of a step is selected in the next one, too)."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a transcript are recorded."""

    text: str
    kind: Literal["answer", "last", "range"]
    first: int = 0  # of last: how many
    last: int = 0  # of range: its last position

    @classmethod
    def of(cls, text: str) -> Rows:
        """Raises `UserError` for what it cannot be."""
        match = _ROWS.fullmatch(text)
        if match is None:
            raise UserError(f"--rows {text}: use answer, last:N or range:A-B; {_CONSECUTIVE}")
        count, first, last = match.groups()
        if count is not None:
            if int(count) < 1:
                raise UserError(f"--rows {text}: use at least 1 row")
            return cls(text, "last", int(count))
        if first is None:
            return cls(text, "answer")
        if int(first) < 1 or int(last) < int(first):
            raise UserError(f"--rows {text}: use positions A to B with 1 <= A <= B")
        return cls(text, "range", int(first), int(last))

    def positions(self, name: str, num_tokens: int, prompt_tokens: int | None) -> range:
        """The recorded rows of one transcript; of `last:N` fewer where it has fewer."""
        stop = num_tokens - 1
        if self.kind == "range":
            if self.last >= stop:
                raise UserError(
                    f"--rows {self.text}: transcript {name} has {num_tokens} tokens, so its rows end at "
                    f"{stop - 1} (the last token is never fed back); name an earlier B"
                )
            return range(self.first, self.last + 1)
        if self.kind == "last":
            first = max(stop - self.first, 1)
        elif prompt_tokens is None:
            raise UserError(
                f"--rows answer: transcript {name} does not say where its prompt ends; add prompt_tokens to "
                "its line, or use last:N"
            )
        else:
            first = prompt_tokens
        if first >= stop:
            raise UserError(
                f"--rows {self.text}: transcript {name} has {num_tokens} tokens and no row to record after "
                f"the first {first}; use a longer one"
            )
        return range(first, stop)


def layers_of(text: str, num_layers: int) -> range:
    """`A-B` or `A`; raises `UserError` for layers that the model does not have."""
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if match is None:
        raise UserError(f"--layers {text}: use A-B, both included, such as 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < num_layers:
        raise UserError(f"--layers {text}: the model has layers 0 to {num_layers - 1}; use A-B among them")
    return range(first, last + 1)
