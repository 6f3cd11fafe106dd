"""The serving loop: schedule, forward, sample, commit; until nothing is left to do.

engine = Engine(scheduler, runner, Sampler(seed=0))
engine.submit(Request("r0", prompt, max_new_tokens=32))
for live, token in engine.run(): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from ..trace.tracer import Tracer
from ..workloads.request import Request
from .live import LiveRequest
from .runner import ModelRunner
from .sampler import Sampler
from .scheduler import Scheduler

ABORT = -1
"""Broadcast in place of a token when rank 0 has been told to drop what is running."""


class Engine:
    """Serves requests on one model; under tensor parallel every rank runs the same loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        tracer: Tracer | None = None,
        answer_text: Callable[[LiveRequest], str] | None = None,
    ) -> None:
        """`answer_text` puts an answer's text into the trace; only for users who asked for it."""
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.tracer = tracer
        self.answer_text = answer_text
        self.started = time.perf_counter()
        self.abort_requested = False

    def submit(self, request: Request) -> LiveRequest:
        """Queues a request, and shows it to the tracer."""
        live = self.scheduler.add(request)
        if self.tracer is not None:
            self.tracer.add_request(request)
        return live

    def run(self) -> Iterator[tuple[LiveRequest, int]]:
        """Yields `(request, token)` as tokens are sampled, until every request is served."""
        while self.scheduler.has_work:
            yield from self.step()

    def step(self) -> list[tuple[LiveRequest, int]]:
        """One forward: the tokens it gave, by request."""
        step = self.scheduler.schedule()
        logits = self.runner.forward(step)
        sampled = self._agree(self.sampler(logits, step.sampled))
        if ABORT in sampled:
            self._abort_all()
            return []
        tokens = self.scheduler.commit(step, sampled)
        for live, _ in tokens:
            if live.ended:
                self._ended(live)
        return tokens

    def request_abort(self) -> None:
        """Drops everything running and waiting after the current step; safe in a signal handler."""
        self.abort_requested = True

    def mark_incomplete(self) -> None:
        """Ends the trace as `incomplete`: some of what was asked for was not served."""
        if self.tracer is not None:
            self.tracer.close("incomplete")

    def _agree(self, sampled: list[int]) -> list[int]:
        """Rank 0's tokens on every rank, or its wish to abort."""
        group = self.runner.model.setup.group
        tokens = [ABORT] if self.abort_requested else sampled or [0]
        if group.size > 1:
            wire = torch.zeros(len(sampled) + 1, dtype=torch.int64, device=self.runner.device)
            wire[: len(tokens)] = torch.tensor(tokens)
            tokens = group.broadcast(wire).tolist()
        return [ABORT] if tokens[0] == ABORT else tokens[: len(sampled)]

    def _abort_all(self) -> None:
        self.abort_requested = False
        for live in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.abort(live)
            self._ended(live)

    def _ended(self, live: LiveRequest) -> None:
        self.sampler.forget(live.request.request_id)
        if self.tracer is None:
            return

        def since_start(at: float | None) -> float | None:
            return None if at is None else at - self.started

        self.tracer.finish_request(
            live.request,
            num_output_tokens=len(live.answer),
            first_token_s=since_start(live.first_token_s),
            finish_s=since_start(live.finish_s),
            state=live.state,
            text=self.answer_text(live) if self.answer_text else None,
        )
