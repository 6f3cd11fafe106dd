"""What computes the scheduled steps: the interface of the model and of the token simulator.

Knows no tensor; `runner/model_runner.py` has the model, `engine/simulator.py` has none.

    step = Step(is_prefill=False, work=(Work(live, first_pos=41, num_tokens=1, wants_logits=True),))
    [[token]] = runner.run(step)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from dsatrace.engine.live import LiveRequest


class Work(NamedTuple):
    """Tokens `first_pos .. first_pos + num_tokens` of one request."""

    live: LiveRequest
    first_pos: int
    num_tokens: int
    wants_logits: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward. In a decode step every work is one token; a prefill step holds one chunk.

    `num_steps` above 1: that many decode steps of the same requests, of which `work` is the first.
    """

    is_prefill: bool
    work: tuple[Work, ...]
    num_steps: int = 1

    @property
    def sampled(self) -> list[LiveRequest]:
        """The requests that get a token from this step, in the order of the logits."""
        return [work.live for work in self.work if work.wants_logits]


OnTierError = Literal["recompute", "fail"]
"""What becomes of a request whose KV a tier has lost: it is computed again, or ends `failed`."""


class BlocksLost(RuntimeError):
    """Physical blocks have lost their content in at least one layer, so the step did not happen.

    raise BlocksLost({3, 17}, "remote_pool redis://10.0.0.1:6379: timeout after 5 s")
    """

    def __init__(self, block_ids: Iterable[int], cause: str) -> None:
        """`cause` is a line for users; it holds no text or token of a request."""
        self.block_ids = frozenset(block_ids)
        self.cause = cause
        super().__init__(f"{cause}; {len(self.block_ids)} blocks lost")


class Runner(Protocol):
    """Computes steps. It reads requests and never changes them; the scheduler does. One thing it adds: the
    `answer_end` of a request whose end of sequence came too early, since only it has seen that token.

    A request's tokens depend on the request alone: not on the others in its batch, nor on how
    often it was preempted. A prefill step may compute tokens again.
    """

    def run(self, step: Step) -> list[list[int]]:
        """The tokens sampled for each request of `step.sampled`: `step.num_steps` of them.

        A prefill that does not end its prompt samples nothing and returns an empty list. Raises
        `BlocksLost`: nothing of the step is committed, and what it wrote will be computed again.
        Ranks that serve together lose alike: all of them raise, or none.
        """

    def lookahead(self, live: LiveRequest) -> int:
        """Decode steps of a running request that may be scheduled at once: at least 1, and at most
        as many as leave a stop token the last one. 1 where a token must be seen before the next
        can be computed.
        """

    def modelled_ns(self, step: Step, num_steps: int) -> int | None:
        """How long `num_steps` of the step take, in nanoseconds: exactly the sum of single steps.

        None: the time is measured. A runner that looks ahead must model it.
        """

    def forget(self, request_id: str) -> None:
        """The request has ended: drops what is kept of it."""
