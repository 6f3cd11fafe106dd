"""The serving loop: schedule, run, commit; until nothing is left to do.

Knows no model: the runner may as well be the token simulator, and then no torch is needed.

    engine = Engine(scheduler, TokenSimulator(end_token=1))
    engine.submit(Request("r0", prompt, max_new_tokens=32))
    for live, token in engine.run(): ...
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dsatrace.engine.clock import NS_PER_S, Clock, RealClock, to_ns
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.runner import BlocksLost, OnTierError, Runner, Step
from dsatrace.engine.scheduler import Scheduler
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import UserError
from dsatrace.workloads.request import Request

if TYPE_CHECKING:
    from dsatrace.trace.tracer import Tracer


class Word(NamedTuple):
    """One rank's view after a step: `tokens` holds those sampled, by request."""

    abort: bool
    now_ns: int
    tokens: list[list[int]]


class Ranks(Protocol):
    """The processes that share one model: every rank runs the same loop over the same requests.

    Rank 0 decides which tokens were sampled, what time it is and whether to stop, so that no two ranks
    ever schedule different steps. `runner/distributed.py` has the broadcast, which needs torch.
    """

    def agree(self, word: Word) -> Word:
        """Rank 0's word, on every rank. All of them call it, with equally many tokens."""


class SingleProcess:
    """Nobody to agree with."""

    def agree(self, word: Word) -> Word:
        return word


class Progress(NamedTuple):
    """What a step, or a wait, has brought."""

    tokens: list[tuple[LiveRequest, list[int]]]
    ended: list[LiveRequest]
    aborted: bool  # everything running and waiting was dropped; those requests are among the ended


class Engine:
    """Serves requests with one runner; under tensor parallel every rank runs the same loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tracer: Tracer | None = None,
        run: RunSettings | None = None,
        *,
        ranks: Ranks | None = None,
        on_tier_error: OnTierError = "recompute",
    ) -> None:
        """Time starts now. `on_tier_error` is for a runner that may lose blocks."""
        run = run or RunSettings()
        self.scheduler = scheduler
        self.runner = runner
        self.tracer = tracer
        self.clock: Clock = run.clock or RealClock()
        self.ranks: Ranks = ranks or SingleProcess()
        self.judge = run.judge
        self.answer_text, self.save_tokens = run.answer_text, run.save_tokens
        self.end = run.end
        self.on_tier_error = on_tier_error
        self.abort_requested = False
        self.tell_tiers: Callable[[], str] | None = None
        """What the runner's tiers did so far, in a line for users; set by their owner."""
        self.prefill_s = self.decode_s = 0.0
        self.num_prefill_tokens = 0  # computed, not what was found cached
        self.num_decode_tokens = 0
        self.clock.start()

    @property
    def now_s(self) -> float:
        """Seconds from the start, as of the last step or wait."""
        return self.clock.now_ns / NS_PER_S

    def submit(self, request: Request) -> LiveRequest:
        """Queues a request, and shows it to the tracer; one that can never fit is `rejected` at once."""
        if self.tracer is not None:
            self.tracer.add_request(request)
        live = self.scheduler.add(request)
        if live.ended:
            self._end(live)
        return live

    def skip(self, request: Request) -> None:
        """Shows the tracer a request that the run, now resumed, has served before."""
        if self.tracer is not None:
            self.tracer.skip_request(request)

    def run(self) -> Iterator[tuple[LiveRequest, int]]:
        """Yields `(request, token)` as tokens are sampled, until every request is served."""
        self.wait_until(0)  # brings the clock up to date
        while self.scheduler.has_work:
            for live, tokens in self.step().tokens:
                yield from ((live, token) for token in tokens)

    def step(self, next_arrival_ns: int | None = None) -> Progress:
        """One forward, or several decode steps at once where nothing can happen in between.

        `next_arrival_ns` is when the next request comes, if it is known. A forward that loses blocks
        takes its time and brings nothing.
        """
        step = self._lengthen(self.scheduler.schedule(self.now_s), next_arrival_ns)
        sampled, lost = self._run(step)
        word = self._agree(sampled)
        if lost is None:
            tokens = self.scheduler.commit(step, word.tokens, self.now_s)
            return self._progress(tokens, [live for live, _ in tokens if live.ended], word.abort)
        recompute = self.on_tier_error == "recompute"
        failed = self.scheduler.lose(step, lost.block_ids, self.now_s, recompute=recompute, cause=lost.cause)
        return self._progress([], failed, word.abort)

    def wait_until(self, time_ns: int) -> Progress:
        """Lets time pass while there is nothing to do, at most until `time_ns`."""
        self.clock.wait_until(time_ns)
        return self._progress([], [], self._agree([]).abort)

    def request_abort(self) -> None:
        """Drops everything running and waiting after the current step; safe in a signal handler."""
        self.abort_requested = True

    def mark_incomplete(self) -> None:
        """Ends the trace as `incomplete`: some of what was asked for was not served."""
        if self.tracer is not None:
            self.tracer.close("incomplete")

    def _lengthen(self, step: Step, next_arrival_ns: int | None) -> Step:
        """The same decode step, as often as the runner can look ahead and no request arrives."""
        if step.is_prefill or not self.clock.jumps:
            return step
        num_steps = min(self.runner.lookahead(work.live) for work in step.work)
        if num_steps > 1 and next_arrival_ns is not None and self.scheduler.admits_newcomers:
            num_steps = self._steps_until(next_arrival_ns, step, num_steps)
        return step if num_steps == 1 else self.scheduler.lengthen(step, num_steps)

    def _steps_until(self, time_ns: int, step: Step, num_steps: int) -> int:
        """How many of up to `num_steps` it takes until `time_ns`."""

        def end_ns(num_steps: int) -> int:
            step_ns = self.runner.modelled_ns(step, num_steps)
            assert step_ns is not None, "a runner that looks ahead models its time"
            return self.clock.now_ns + step_ns

        if end_ns(num_steps) <= time_ns:
            return num_steps
        return 1 + bisect.bisect_left(range(1, num_steps), time_ns, key=end_ns)

    def _run(self, step: Step) -> tuple[list[list[int]], BlocksLost | None]:
        """Runs the step and advances the clock, by the step's model or by what it took."""
        started_ns = time.perf_counter_ns()
        sampled, lost = [], None
        try:
            sampled = self.runner.run(step)
        except BlocksLost as error:
            lost = error
        step_ns = self.runner.modelled_ns(step, step.num_steps)
        if step_ns is None:
            step_ns = time.perf_counter_ns() - started_ns
        self.clock.advance(step_ns)
        if step.is_prefill:
            (work,) = step.work
            work.live.prefill_s += step_ns / NS_PER_S
            self.prefill_s += step_ns / NS_PER_S
            self.num_prefill_tokens += 0 if lost else work.num_tokens
        else:
            self.decode_s += step_ns / NS_PER_S
            self.num_decode_tokens += 0 if lost else len(step.work) * step.num_steps
        return sampled, lost

    def _agree(self, sampled: list[list[int]]) -> Word:
        """Rank 0's tokens, time and wish to abort, on every rank."""
        word = self.ranks.agree(Word(self.abort_requested, self.clock.now_ns, sampled))
        self.clock.now_ns = word.now_ns
        return word

    def _progress(
        self, tokens: list[tuple[LiveRequest, list[int]]], ended: list[LiveRequest], aborted: bool
    ) -> Progress:
        """Takes leave of the requests that have ended: all of them, if the run is aborted."""
        if aborted:
            self.abort_requested = False
            for live in [*self.scheduler.running, *self.scheduler.waiting]:
                self.scheduler.abort(live, self.now_s)
                ended.append(live)
        for live in ended:
            self._end(live)
        return Progress(tokens, ended, aborted)

    def _end(self, live: LiveRequest) -> None:
        """Scores a request and writes its line in the trace."""
        self.runner.forget(live.request_id)
        if self.judge is not None and live.state in ("stop", "length"):
            live.score = self.judge(live)
        if self.tracer is not None:
            live.num_output_tokens = live.num_answered
            live.answer_tokens = len(live.answer) if self.end.asked else None
            if self.answer_text is not None:
                live.text = self.answer_text(live.answer)
                live.text_past_answer = self.answer_text(live.past_answer) or None
            if self.save_tokens:
                live.prompt_token_ids = list(live.request.prompt_token_ids)
                live.output_token_ids = live.generated
            self.tracer.finish_request(live.request, live)


BATCHES_AHEAD = 2
"""Batches of arrived requests that may wait; the source keeps the others."""


def serve(engine: Engine, requests: Iterable[Request]) -> Iterator[LiveRequest]:
    """Yields every request when it has ended, rejected ones too, in the order in which they end.

    `requests` must be sorted by `arrival_s`; under tensor parallel every rank is given the
    same. After `engine.request_abort()` what was running and waiting comes as `aborted`, and
    no more requests are pulled.
    """
    source = _in_order(requests)
    max_waiting = BATCHES_AHEAD * engine.scheduler.max_batch_size
    engine.wait_until(0)  # agrees on the time before anything is decided by it
    coming = next(source, None)
    while True:
        next_ns = None if coming is None else to_ns(coming.arrival_s)
        is_here = next_ns is not None and next_ns <= engine.clock.now_ns
        if coming is not None and is_here and len(engine.scheduler.waiting) < max_waiting:
            live = engine.submit(coming)
            if live.ended:
                yield live
            coming = next(source, None)
            continue
        if engine.scheduler.has_work:
            progress = engine.step(next_ns)
        elif next_ns is not None:
            progress = engine.wait_until(next_ns)
        else:
            return
        yield from progress.ended
        if progress.aborted:
            return


def _in_order(requests: Iterable[Request]) -> Iterator[Request]:
    """The same; raises `UserError` for one that arrives before the last."""
    last: Request | None = None
    for request in requests:
        if last is not None and request.arrival_s < last.arrival_s:
            raise UserError(
                f"request {request.request_id} arrives at {request.arrival_s} s, before request "
                f"{last.request_id} at {last.arrival_s} s; sort the requests by arrival"
            )
        last = request
        yield request
