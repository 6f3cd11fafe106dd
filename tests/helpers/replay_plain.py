"""The two schedules of `kv.simulation.replay`, plainly, over `PrefixPool`: its reference.

Statement by statement the same as `replay_kernels`; a hundred times slower or more.

    replay_plain(trace, ReplayConfig(num_blocks=1024)).hit_tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from dsatrace.kv.blocks import EVICT, HIT, MISS, BlockPool, Key, OutOfBlocks
from dsatrace.kv.prefix_pool import HeldBlocks, PrefixPool
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import WHOLE_PROMPT, PoolState, ReplayConfig, ReplayResult, columns_by_name
from dsatrace.kv.simulation.replay_kernels import (
    CUT,
    EVENT_RECORD,
    NONE,
    PROMPT_TOO_LONG,
    REQUEST_COLUMNS,
    REQUEST_TOO_LONG,
    SERVED,
)


def replay_plain(trace: BlockTrace, config: ReplayConfig) -> ReplayResult:
    """Equal to `replay`."""
    run = _PlainReplay(trace, config)
    if config.schedule == "in_order":
        run.in_order()
    else:
        run.continuous()
    return run.result()


class _PlainReplay:
    """One replay under way."""

    def __init__(self, trace: BlockTrace, config: ReplayConfig) -> None:
        self.trace, self.config = trace, config
        self.chunk = config.chunk_tokens or WHOLE_PROMPT
        self.prompt, self.output = trace.prompt_tokens.tolist(), config.outputs(trace).tolist()
        blocks = BlockPool(
            config.pool_blocks(trace),
            trace.block_size,
            null_block=config.null_block,
            free_order=config.free_order,
            on_event=self._note,
        )
        self.pool = PrefixPool(blocks, prefix_caching=config.prefix_caching)
        self.columns = {name: [0] * trace.num_requests for name in REQUEST_COLUMNS}
        self.events: list[tuple[int, Key, int, int]] = []
        self.request = self.clock = 0  # whose doing it is; the newest request so far
        # `continuous` alone:
        self.running: list[tuple[int, HeldBlocks]] = []
        self.preempted: list[int] = []
        self.next = 0
        self.passed_over: list[int] = []  # turns that wait for the turn before them
        self.ready: list[int] = []  # of those, the ones that need not any more
        self.ended: set[int] = set()
        self.computed, self.known = [0] * trace.num_requests, list(self.prompt)

    def in_order(self) -> None:
        live: deque[HeldBlocks] = deque()
        for r, prompt in enumerate(self.prompt):
            self.request = self.clock = r
            if len(live) == self.config.concurrency:
                self.pool.release(live.popleft())
            self._count_cached(r)
            try:
                held = self._with_room(live, lambda r=r: self._admit(r, self.prompt[r]))  # type: ignore[misc]
            except OutOfBlocks:
                self.columns["status"][r] = PROMPT_TOO_LONG
                continue
            filled = self._fill(held, r, live)
            if filled < prompt:
                self.columns["status"][r] = PROMPT_TOO_LONG
                self.pool.release(held)
                continue
            self.columns["status"][r] = SERVED if filled == prompt + self.output[r] else CUT
            self.columns["hit_tokens"][r] = held.num_hit_tokens
            self.columns["generated_tokens"][r] = filled - prompt
            live.append(held)

    def _fill(self, held: HeldBlocks, r: int, live: deque[HeldBlocks]) -> int:
        """The rest of an admitted request's prompt, by chunks, and its output, by tokens: tokens filled."""
        filled = min(held.num_hit_tokens + self.chunk, self.prompt[r])
        while filled < self.prompt[r] + self.output[r]:
            in_prompt = filled < self.prompt[r]
            target = min(filled + self.chunk, self.prompt[r]) if in_prompt else filled + 1
            try:
                self._with_room(live, lambda n=target: self._grow(held, r, n))  # type: ignore[misc]
            except OutOfBlocks:
                break
            filled = target
        return filled

    def continuous(self) -> None:
        while self.running or self.preempted or self._arrived():
            room = self._advance()
            while (
                room and len(self.running) < self.config.concurrency and (self.preempted or self._arrived())
            ):
                room = self._come_in()
            self._commit()

    def _advance(self) -> bool:
        """Running requests get their next tokens, the oldest first. False: a request was preempted."""
        room, i = True, 0
        while i < len(self.running):
            r, held = self.running[i]
            self.request = r
            target = min(self.computed[r] + self.chunk, self.known[r])
            while True:
                try:
                    self._grow(held, r, target)
                    break
                except OutOfBlocks:
                    room = False
                    victim, its_blocks = self.running.pop()
                    self.pool.release(its_blocks)
                    self.preempted.append(victim)
                    self.columns["num_preemptions"][victim] += 1
                    if victim == r:
                        return room
            self.computed[r] = target
            i += 1
        return room

    def _arrived(self) -> bool:
        """Whether a new request may come in. Passes over the turns whose turn before has not ended."""
        while self.next < self.trace.num_requests and not self._before(self.next) <= self.ended:
            self.passed_over.append(self.next)
            self.next += 1
        return bool(self.ready) or self.next < self.trace.num_requests

    def _before(self, r: int) -> set[int]:
        """Earlier requests of the same conversation."""
        mine = self.trace.conversation[r]
        return set(np.flatnonzero(self.trace.conversation[:r] == mine).tolist()) if mine >= 0 else set()

    def _end(self, r: int) -> None:
        self.ended.add(r)
        ready = [other for other in self.passed_over if self._before(other) <= self.ended]
        self.passed_over = [other for other in self.passed_over if other not in ready]
        self.ready += ready

    def _come_in(self) -> bool:
        """The next waiting request gets its first chunk, preempted ones before new ones. False: no room."""
        resumed = bool(self.preempted)
        r = self.preempted[-1] if resumed else self.ready[0] if self.ready else self.next
        if not resumed:
            self.clock = max(self.clock, r)
            length = self.prompt[r] + max(self.output[r] - 1, 0)
            if length > self.pool.blocks.num_usable * self.trace.block_size:
                self.columns["status"][r] = REQUEST_TOO_LONG
                self._come(r)
                self._end(r)
                return True
            self._count_cached(r)
        self.request = r
        try:
            held = self._admit(r, self.known[r])
        except OutOfBlocks:
            return False
        if resumed:
            self.preempted.pop()
            self.columns["resumed_tokens"][r] += self.known[r]
            self.columns["resumed_hit_tokens"][r] += held.num_hit_tokens
        else:
            self._come(r)
            self.columns["hit_tokens"][r] = held.num_hit_tokens
        self.computed[r] = min(held.num_hit_tokens + self.chunk, self.known[r])
        self.running.append((r, held))
        return True

    def _come(self, r: int) -> None:
        if self.ready[:1] == [r]:
            self.ready.pop(0)
        else:
            self.next += 1

    def _commit(self) -> None:
        """Requests that have computed all their tokens get their next one; the last one is never computed."""
        still = []
        generated = self.columns["generated_tokens"]
        for r, held in self.running:
            if self.computed[r] == self.known[r]:
                if generated[r] < self.output[r]:
                    generated[r] += 1
                    self.known[r] += 1
                if generated[r] == self.output[r]:
                    self.pool.release(held)
                    self._end(r)
                    continue
            still.append((r, held))
        self.running = still

    def _with_room(self, live: deque[HeldBlocks], act: Callable[[], HeldBlocks]) -> HeldBlocks:
        """Acts, finishing the oldest live requests until it can; raises `OutOfBlocks` when none is left."""
        while True:
            try:
                return act()
            except OutOfBlocks:
                if not live:
                    raise
                self.pool.release(live.popleft())

    def _count_cached(self, r: int) -> None:
        num_full = self.prompt[r] // self.trace.block_size
        cached = [self.pool.blocks.lookup([key]) for key in self.trace.keys_of(r)[:num_full]]
        self.columns["cached_blocks"][r] = sum(map(len, cached))

    def _admit(self, r: int, num_tokens: int) -> HeldBlocks:
        keys = self.trace.keys_of(r)
        hit_tokens = len(self.pool.match(keys, num_tokens)) * self.trace.block_size
        filled = min(hit_tokens + self.chunk, num_tokens)
        held = self.pool.admit(keys, num_tokens, filled)
        self.columns["blocks_allocated"][r] += len(held.block_ids) - held.num_hit_blocks
        return held

    def _grow(self, held: HeldBlocks, r: int, num_tokens: int) -> HeldBlocks:
        num_blocks = len(held.block_ids)
        self.pool.grow(held, num_tokens)
        self.columns["blocks_allocated"][r] += len(held.block_ids) - num_blocks
        return held

    def _note(self, kind: int, key: Key, _block: int) -> None:
        self.events.append((kind, key, self.request, self.clock))

    def result(self) -> ReplayResult:
        events = np.array(self.events, EVENT_RECORD)
        kind, key, clock = events["kind"], events["key"], events["clock"]
        accesses = np.bincount(key[kind != EVICT], minlength=self.trace.num_keys).astype(np.int32)
        hits = np.bincount(key[kind == HIT], minlength=self.trace.num_keys).astype(np.int32)
        first = np.full(self.trace.num_keys, NONE, np.int32)
        missed = np.flatnonzero(kind == MISS)[::-1]
        first[key[missed]] = clock[missed]  # the last assignment wins: the earliest miss
        blocks = self.pool.blocks
        ids = range(blocks.num_blocks)
        keys = [blocks.key_of(block) for block in ids]
        return ReplayResult(
            **columns_by_name(np.array(list(self.columns.values()), np.int64)),
            key_accesses=accesses,
            key_hits=hits,
            key_first=first,
            events=events if self.config.record_events else None,
            final=PoolState(
                np.array([NONE if key is None else key for key in keys], np.int32),
                np.array([blocks.num_users(block) for block in ids], np.int32),
                np.array(blocks.free_queue(), np.int32),
            ),
        )
