"""What the scheduler hands to a runner: one forward, and whose tokens it computes.

Step(is_prefill=True, work=(Work(live, first_pos=0, num_tokens=256, wants_logits=False),))
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from .live import LiveRequest


class Work(NamedTuple):
    """Tokens `first_pos .. first_pos + num_tokens` of one request."""

    live: LiveRequest
    first_pos: int
    num_tokens: int
    wants_logits: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward. In a decode step every work is one token; a prefill step holds one chunk.

    `num_steps` above 1 stands for so many decode steps of the same requests, of which `work`
    describes the first.
    """

    is_prefill: bool
    work: tuple[Work, ...]
    num_steps: int = 1

    @property
    def sampled(self) -> list[LiveRequest]:
        """The requests that get a token from this step, in the order of the logits."""
        return [work.live for work in self.work if work.wants_logits]
