"""Decides what the next forward computes: one chunk of one prompt, or one token of every request.

A request is admitted when a slot is free and the pool can hold its tokens. It gets its block
table when its prefill begins, which starts behind the prefix that the pool has cached; the table
then grows with its answer. When no block is free, the request admitted last is preempted: it loses
its blocks and waits, first in line, to be computed again, less what is still cached. A request
whose blocks a tier has lost starts over in its place. Chunks of a prefill end on multiples of the
chunk size, whatever was cached. Knows no tensor and no clock: it is told the time.

No request starves. `[*running, *waiting]` is always in the order of `add`: admission takes from
the front of `waiting`, preemption puts the last of `running` there. So the oldest request
is never preempted for another, fits the pool alone (else it was rejected), is the first to
be prefilled, and decodes after at most `max_batch_size` prompts of others; it ends, and the
next one is the oldest. A loss of blocks makes it start over at most `MAX_RECOMPUTES` times per token.

    step = scheduler.schedule(now=0.0)
    scheduler.commit(step, runner.run(step), now=0.02)
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Literal

from dsatrace.engine.block_tables import BlockTables
from dsatrace.engine.ending import ENDS_BY_ITSELF, EndSettings
from dsatrace.engine.live import LiveRequest, State
from dsatrace.engine.runner import Step, Work
from dsatrace.kv.blocks import OutOfBlocks, blocks_needed
from dsatrace.kv.prefix_pool import PrefixPool
from dsatrace.workloads.request import Request

Admission = Literal["continuous", "fifo-batch"]
"""When a request may start: as soon as a slot is free, or with the next batch.

`fifo-batch`: an idle engine takes the waiting requests, first come, first served, up to the batch
size. It never waits to fill a batch, and takes no other request until all of the batch have ended.
"""

MAX_RECOMPUTES = 3
"""How often a request is computed again without a new token before it fails: a dead tier must not
keep a run from ending."""


class Scheduler:
    """Prefill first, then decode all running requests together; first come, first served."""

    def __init__(
        self,
        pool: PrefixPool,
        max_batch_size: int,
        prefill_chunk: int,
        stop_tokens: frozenset[int] = frozenset(),
        *,
        max_seq_len: int | None = None,
        reserve_answer: bool = False,
        admission: Admission = "continuous",
        end: EndSettings = ENDS_BY_ITSELF,
    ) -> None:
        """`max_seq_len` bounds the tokens of a request, as the pool itself does.

        `reserve_answer`: a request gets the blocks of its whole answer when it is admitted, which keeps
        them side by side; for a pool with room for all, since in a smaller one fewer run at a time.
        """
        self.prefixes = pool
        self.pool = pool.blocks
        self.tables = BlockTables(pool)
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self.stop_tokens = stop_tokens
        self.max_seq_len = max_seq_len
        self.reserve_answer = reserve_answer
        self.admission = admission
        self.end = end
        self.waiting: deque[LiveRequest] = deque()
        self.running: list[LiveRequest] = []
        self.num_recomputes = 0  # requests that started over because a tier lost their blocks
        self.num_failed = 0  # and those that did not
        self._prompts_since_decode = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def admits_newcomers(self) -> bool:
        """Whether the next step could admit a request that came now."""
        if self.waiting or len(self.running) >= self.max_batch_size:
            return False
        return self.admission == "continuous" or not self.running

    @property
    def max_tokens(self) -> int:
        """Tokens of KV that a single request may hold."""
        in_pool = self.pool.num_blocks * self.pool.block_size
        return in_pool if self.max_seq_len is None else min(in_pool, self.max_seq_len)

    def add(self, request: Request) -> LiveRequest:
        """Queues a request; one that can never fit comes back `rejected`, with its `error`."""
        live = LiveRequest.of(request)
        live.error = self._why_it_never_fits(live)
        if live.error is None:
            self.tables.welcome(live)
            self.waiting.append(live)
        else:
            live.state = "rejected"
        return live

    def schedule(self, now: float) -> Step:
        """The next step; call only while `has_work`."""
        self._admit(now)
        if not self._decode_is_due and (live := self._next_in_prefill()) is not None:
            return Step(True, (self._chunk(live),))
        self._grow_tables()
        self._prompts_since_decode = 0
        decoding = [live for live in self.running if not live.in_prefill]
        return Step(False, tuple(Work(live, live.num_computed, 1, True) for live in decoding))

    def lengthen(self, step: Step, num_steps: int) -> Step:
        """Up to `num_steps` of a decode step at once: as many as have tokens left and blocks free.

        Equal to as many single steps: nobody ends, grows out of the pool, or leaves prefill
        before the last of them is done. Who may arrive in between is the caller's business.
        """
        if step.is_prefill or len(step.work) < len(self.running) or self._may_share_soon:
            return step
        num_steps = min(num_steps, *(live.tokens_left for live in self.running))

        def growth(num_steps: int) -> int:
            return sum(self.tables.missing(live, live.num_computed + num_steps) for live in self.running)

        if num_steps > 1 and growth(num_steps) > self.pool.num_free:
            num_steps = bisect.bisect_right(range(1, num_steps + 1), self.pool.num_free, key=growth)
        if num_steps <= 1:
            return step
        for live in self.running:
            self.tables.extend(live, live.num_computed + num_steps)
        return dataclasses.replace(step, num_steps=num_steps)

    def commit(
        self, step: Step, sampled: Sequence[list[int]], now: float
    ) -> list[tuple[LiveRequest, list[int]]]:
        """Books what the step computed and the tokens sampled from it; returns these by request.

        `sampled` holds `step.num_steps` tokens for each request of `step.sampled`; a stop token
        can only be the last of them.
        """
        for work in step.work:
            work.live.num_computed += work.num_tokens * step.num_steps
            if not step.is_prefill:
                work.live.num_decode_steps += step.num_steps
                continue
            work.live.num_prefill_tokens += work.num_tokens
            if not work.live.in_prefill:
                self._prompts_since_decode += 1
        tokens = list(zip(step.sampled, sampled, strict=True))
        for live, new in tokens:
            live.tokens += new
            live.recomputes_in_vain = 0
        if self.prefixes.prefix_caching:
            for live, new in tokens:
                assert live.key_chain is not None
                live.key_chain.extend(new)
            for work in step.work:  # before any of them retires
                self.tables.mark_computed(work.live)
        for live, new in tokens:
            if live.first_token_s is None:
                live.first_token_s = now
            if self.end.asked and live.answer_end is None:
                live.answer_end = self._end_in(live, new)
            stops = live.request.stop_at_eos and not self.end.ignore_eos
            if stops and new[-1] in self.stop_tokens:
                self._retire(live, "stop", now)
            elif live.tokens_left == 0:
                self._retire(live, "length", now)
        return tokens

    def lose(
        self, step: Step, block_ids: frozenset[int], now: float, *, recompute: bool, cause: str
    ) -> list[LiveRequest]:
        """The step did not happen: a tier has lost what these blocks held. Returns those that `failed`.

        A running request that holds one of them starts over if it may `recompute`, in its place if there
        is room. If no running request holds a lost block, the loss is charged to this step's requests:
        otherwise the same step would be tried again forever. Waiting requests hold no blocks.
        """
        num_found = self.prefixes.blocks.forget(block_ids)
        affected = [live for live in self.running if not block_ids.isdisjoint(live.block_ids)]
        if not affected and not num_found:
            affected = [work.live for work in step.work]
        failed = [live for live in affected if not recompute or live.recomputes_in_vain == MAX_RECOMPUTES]
        self.num_failed += len(failed)
        for live in failed:
            live.error = _why_it_failed(live, cause)
            self._retire(live, "failed", now)
        self._start_over([live for live in affected if not live.ended])
        return failed

    def abort(self, live: LiveRequest, now: float) -> None:
        """Takes a request out, waiting or running; what it has generated stays with it."""
        if live.state == "running":
            self._retire(live, "aborted", now)
        else:
            self.waiting.remove(live)
            live.state = "aborted"

    @property
    def _decode_is_due(self) -> bool:
        """Short prompts could follow one another forever, so decoding requests get their turn."""
        return self._prompts_since_decode >= self.max_batch_size and not self.running[0].in_prefill

    def _end_in(self, live: LiveRequest, new: Sequence[int]) -> int | None:
        """Tokens generated before the first end of sequence among the `new` ones, its latest."""
        before = live.num_answered - len(new)
        return next((before + i for i, token in enumerate(new) if token in self.stop_tokens), None)

    def _why_it_never_fits(self, live: LiveRequest) -> str | None:
        in_pool = self.pool.num_blocks * self.pool.block_size
        if self.max_seq_len is not None and live.max_len > self.max_seq_len:
            limit, flag = f"exceed --max-seq-len {self.max_seq_len}", "--max-seq-len"
        elif live.max_len > in_pool:
            limit, flag = f"do not fit the KV cache of {in_pool} tokens", "--cache-blocks"
        else:
            return None
        return (
            f"request {live.request_id}: prompt of {live.prompt_len} tokens and "
            f"{live.request.max_new_tokens} new ones {limit}; "
            f"shorten the prompt, lower --max-new-tokens or raise {flag}"
        )

    def _admit(self, now: float) -> None:
        # Only a member of a batch can have been preempted, so it may come back while the batch lasts.
        opens_batch = not self.running and bool(self.waiting) and self.waiting[0].num_preemptions == 0
        open_to_all = self.admission == "continuous" or opens_batch
        while self.waiting and len(self.running) < self.max_batch_size:
            live = self.waiting[0]
            if not (open_to_all or live.num_preemptions) or not self._give_room(live):
                return
            live.state = "running"
            live.admitted_s = now if live.admitted_s is None else live.admitted_s
            self.running.append(self.waiting.popleft())

    def _give_room(self, live: LiveRequest) -> bool:
        """Promises a request its blocks or, where too few are free, lets it begin with shared ones.

        The latter only if no other prefill is under way: it would miss what that is about to compute.
        """
        if self.tables.promise(live, self._table_blocks(live)):
            return True
        if live.key_chain is None or any(other.in_prefill for other in self.running):
            return False
        try:
            self._begin(live)
        except OutOfBlocks:
            return False
        return True

    @property
    def _may_share_soon(self) -> bool:
        """Whether the next in line lacks blocks only until others have computed what it can share."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return False
        live = self.waiting[0]
        may_come = self.admission == "continuous" or live.num_preemptions > 0
        return live.key_chain is not None and may_come

    def _table_blocks(self, live: LiveRequest) -> int:
        num_tokens = live.max_len if self.reserve_answer else len(live.tokens)
        return blocks_needed(num_tokens, self.pool.block_size)

    def _begin(self, live: LiveRequest) -> None:
        """Gives a request its table; its prefill begins behind what is cached."""
        live.num_computed = self.tables.take(live, self._table_blocks(live))
        if live.prefix_hit_tokens is None:
            live.prefix_hit_tokens = live.num_computed
        else:
            live.resumed_tokens += len(live.tokens)
            live.resumed_hit_tokens += live.num_computed

    def _next_in_prefill(self) -> LiveRequest | None:
        """The first in line whose prompt is not done."""
        for live in self.running:
            if live.in_prefill:
                if live.held is not None:
                    return live
                self._begin(live)
                if live.in_prefill:  # a preempted one may find everything cached
                    return live
        return None

    def _chunk(self, live: LiveRequest) -> Work:
        end = (live.num_computed // self.prefill_chunk + 1) * self.prefill_chunk
        end = min(end, live.prefill_end)
        # What is computed again has had its logits: its answer came from them.
        wants_logits = end == live.prefill_end and live.num_answered == 0
        return Work(live, live.num_computed, end - live.num_computed, wants_logits)

    def _grow_tables(self) -> None:
        """Adds a block where the next token has none, oldest request first; the youngest give way."""
        position, block_size = 0, self.pool.block_size
        while position < len(self.running):
            live = self.running[position]
            if not live.in_prefill and len(live.block_ids) * block_size <= live.num_computed:
                if self.tables.num_free == 0:
                    self._preempt(self.running[-1])
                    continue  # with the same request, unless it was the last
                self.tables.extend(live, live.num_computed + 1)
            position += 1

    def _start_over(self, lost: Sequence[LiveRequest]) -> None:
        """Running requests, oldest first, give their blocks back and are promised others; the youngest
        give way where too few are free."""
        for live in lost:
            self.tables.release(live)
            live.num_computed = 0
            live.num_recomputes += 1
            self.num_recomputes += 1
            live.recomputes_in_vain += 1
        for live in lost:
            while live.state == "running" and not self.tables.promise(live, self._table_blocks(live)):
                self._preempt(self.running[-1])

    def _preempt(self, live: LiveRequest) -> None:
        self._leave_slot(live)
        live.num_computed = 0
        live.num_preemptions += 1
        live.state = "waiting"
        self.waiting.appendleft(live)

    def _retire(self, live: LiveRequest, state: State, now: float) -> None:
        self._leave_slot(live)
        live.state = state
        live.finish_s = now

    def _leave_slot(self, live: LiveRequest) -> None:
        self.running.remove(live)
        self.tables.release(live)


def _why_it_failed(live: LiveRequest, cause: str) -> str:
    again = live.recomputes_in_vain
    tried = f" (and {again} times more while it was computed again)" if again else ""
    return f"request {live.request_id}: a tier lost its KV{tried}: {cause}"
