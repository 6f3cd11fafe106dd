"""Decides what the next forward computes: one chunk of one prompt, or one token of everyone.

A request is admitted when the pool can hold it to its last token, so nothing admitted ever
has to give way. Prefill chunks end on multiples of the chunk size, whatever was cached.
Knows no tensor.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import UserError
from ..kv.blocks import BlockPool, blocks_needed
from ..workloads.request import Request
from .live import LiveRequest, State


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Tokens `first_pos .. first_pos + num_tokens` of one request."""

    live: LiveRequest
    first_pos: int
    num_tokens: int
    wants_logits: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward. In a decode step every work is one token; a prefill step holds one chunk."""

    is_prefill: bool
    work: tuple[Work, ...]

    @property
    def sampled(self) -> list[LiveRequest]:
        """The requests that get a token from this step, in the order of the logits."""
        return [work.live for work in self.work if work.wants_logits]


class Scheduler:
    """Prefill first, then decode all running requests together; first come, first served."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_size: int,
        prefill_chunk: int,
        stop_tokens: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool = pool
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self.stop_tokens = stop_tokens
        self.clock = clock
        self.waiting: deque[LiveRequest] = deque()
        self.running: list[LiveRequest] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> LiveRequest:
        """Queues a request; raises `UserError` when the whole cache could not hold it."""
        live = LiveRequest.of(request)
        capacity = self.pool.num_blocks * self.pool.block_size
        if blocks_needed(live.max_len, self.pool.block_size) > self.pool.num_blocks:
            raise UserError(
                f"request {request.request_id}: prompt of {live.prompt_len} tokens and "
                f"{request.max_new_tokens} new ones do not fit the KV cache of {capacity} tokens; "
                "shorten the prompt, lower --max-new-tokens or raise --max-seq-len"
            )
        self.waiting.append(live)
        return live

    def schedule(self) -> Step:
        """The next step; call only while `has_work`."""
        self._admit()
        for live in self.running:
            if live.in_prefill:
                end = (live.num_computed // self.prefill_chunk + 1) * self.prefill_chunk
                end = min(end, live.prompt_len)
                chunk = Work(live, live.num_computed, end - live.num_computed, end == live.prompt_len)
                return Step(True, (chunk,))
        return Step(False, tuple(Work(live, live.num_computed, 1, True) for live in self.running))

    def commit(self, step: Step, sampled: Sequence[int]) -> list[tuple[LiveRequest, int]]:
        """Books what the step computed and the tokens sampled from it, which it returns by request."""
        for work in step.work:
            work.live.num_computed += work.num_tokens
            work.live.num_decode_steps += not step.is_prefill
        tokens = list(zip(step.sampled, sampled, strict=True))
        now = self.clock()
        for live, token in tokens:
            live.tokens.append(token)
            if live.first_token_s is None:
                live.first_token_s = now
            if token in self.stop_tokens:
                self._retire(live, "stop", now)
            elif len(live.answer) >= live.request.max_new_tokens:
                self._retire(live, "length", now)
        return tokens

    def abort(self, live: LiveRequest) -> None:
        """Takes a request out, waiting or running; what it has generated stays with it."""
        if live in self.waiting:
            self.waiting.remove(live)
            live.state = "aborted"
        else:
            self._retire(live, "aborted", self.clock())

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            live = self.waiting[0]
            num_blocks = blocks_needed(live.max_len, self.pool.block_size)
            if num_blocks > self.pool.num_free:
                return
            live.block_ids = self.pool.allocate(num_blocks)
            live.state = "running"
            self.running.append(self.waiting.popleft())

    def _retire(self, live: LiveRequest, state: State, now: float) -> None:
        self.running.remove(live)
        self.pool.free(live.block_ids)
        live.block_ids = []
        live.state = state
        live.finish_s = now
