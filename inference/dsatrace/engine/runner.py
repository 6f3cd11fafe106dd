"""What computes the scheduled steps: the interface of the model and of the token simulator.

Knows no tensor; `model_runner.py` has the model, `simulator.py` none.
"""

from __future__ import annotations

from typing import Protocol

from .live import LiveRequest
from .step import Step


class Runner(Protocol):
    """Computes steps. It reads requests and never changes them: that is the scheduler's part.

    A request's tokens depend on the request alone: not on who shares its batch, nor on how
    often it was preempted. A prefill step may compute tokens it has computed before.
    """

    def run(self, step: Step) -> list[list[int]]:
        """The tokens sampled for each request of `step.sampled`: `step.num_steps` of them.

        A prefill that does not end its prompt samples nothing and returns an empty list.
        """

    def lookahead(self, live: LiveRequest) -> int:
        """Decode steps of a running request that may be scheduled at once: at least 1, and at most
        as many as leave a stop token the last one. 1 where a token must be seen before the next
        can be computed.
        """

    def modelled_ns(self, step: Step, num_steps: int) -> int | None:
        """How long `num_steps` of the step take, in nanoseconds: exactly the sum of single steps.

        None: steps take the time they take, and it is measured. A runner that looks ahead models.
        """

    def forget(self, request_id: str) -> None:
        """The request has ended: drops what is kept of it."""
