"""The compiled replay: the block pool in arrays, and the two schedules over it.

The free queue is a ring of links through one extra entry; the blocks of one key are a list of links,
oldest first; a live request's blocks are a row of a table. The moves are those of `blocks` and
`prefix_pool`, the schedules those of the tests' `replay_plain`; tests hold both equal on random
traces: hits, events, and the final state.

It is one file because numba notices a change only in the file of a function that it caches: a pool
in another file could change, and its stale code would go on running. Only `run_in_order` and
`run_continuous` are cached. They take plain tuples, because a cache that names a class breaks when
the class is renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.kv.blocks import EVICT, HIT, MISS

NONE = -1
FREE, EVENT, REQUEST, CLOCK = range(4)
"""Places in `Pool.counts`: free blocks, events so far, the request that acts, the newest so far."""

SERVED, CUT, PROMPT_TOO_LONG, REQUEST_TOO_LONG = range(4)
"""A request's status, see `replay.STATUS_NAMES`."""

REQUEST_COLUMNS = (
    "status", "hit_tokens", "cached_blocks", "blocks_allocated", "num_preemptions", "resumed_tokens",
    "resumed_hit_tokens", "generated_tokens",
)  # fmt: skip
"""Rows of the array that a schedule fills, (8, R) int64."""
(_STATUS, _HIT, _CACHED, _ALLOCATED, _PREEMPTED, _RESUMED, _RESUMED_HIT, _GENERATED) = range(8)

BLOCK = np.dtype(
    [("next_free", "<i4"), ("prev_free", "<i4"), ("num_users", "<i4"), ("key", "<i4"), ("next_same", "<i4"),
     ("prev_same", "<i4")]
)  # fmt: skip
CONTENT = np.dtype(
    [("oldest", "<i4"), ("newest", "<i4"), ("accesses", "<i4"), ("hits", "<i4"), ("first", "<i4")]
)  # its oldest and newest block, how often it was used and shared, clock of its first allocation
EVENT_RECORD = np.dtype([("kind", "u1"), ("key", "<i4"), ("request", "<i4"), ("clock", "<i4")])


class Pool(NamedTuple):
    """N blocks, K keys, E events, in as few arrays as possible: numba counts references to each."""

    blocks: np.ndarray  # (N + 1,) BLOCK; links are block ids, entry N is the queue's two ends
    contents: np.ndarray  # (K,) CONTENT, by key
    counts: np.ndarray  # (4,) int64
    events: np.ndarray  # (E,) EVENT_RECORD; events that do not fit are only counted


class Settings(NamedTuple):
    """Of one replay."""

    block_size: int  # tokens
    num_usable: int  # blocks
    concurrency: int
    chunk: int  # tokens
    new_order: bool
    caching: bool


class Requests(NamedTuple):
    """A trace's columns, and the result columns."""

    prompt: np.ndarray  # (R,) int64 tokens
    output: np.ndarray  # (R,) int64 tokens
    keys: np.ndarray  # (B,) int32
    key_ptr: np.ndarray  # (R + 1,) int64
    following: np.ndarray  # (R,) int64, the conversation's next request, or NONE
    columns: np.ndarray  # (8, R) int64, see REQUEST_COLUMNS


def new_pool(num_blocks: int, first_block: int, num_keys: int, num_events: int) -> Pool:
    """All blocks from `first_block` on are free, in order; up to `num_events` events are recorded."""
    blocks = np.full(num_blocks + 1, NONE, np.int32).astype(BLOCK)
    blocks["num_users"] = 0
    ring = np.append(np.arange(first_block, num_blocks), num_blocks)
    blocks["next_free"][ring], blocks["prev_free"][ring] = np.roll(ring, -1), np.roll(ring, 1)
    contents = np.full(num_keys, NONE, np.int32).astype(CONTENT)
    contents["accesses"] = contents["hits"] = 0
    counts = np.array([num_blocks - first_block, 0, 0, 0], np.int64)
    return Pool(blocks, contents, counts, np.empty(num_events, EVENT_RECORD))


def free_queue(pool: Pool) -> np.ndarray:
    """Free blocks in the order in which they are handed out, (free,) int32."""
    end = len(pool.blocks) - 1
    order = np.empty(pool.counts[FREE], np.int32)
    block = pool.blocks["next_free"][end]
    for i in range(len(order)):
        order[i] = block
        block = pool.blocks["next_free"][block]
    assert block == end, "the free queue has another length than the count says"
    return order


_inner: Callable[..., Any] = inner  # of functions without types


@_inner
def note(pool, kind, key):  # type: ignore[no-untyped-def]
    """Counts an event, and records it if there is room."""
    at = pool.counts[EVENT]
    pool.counts[EVENT] = at + 1
    if at < len(pool.events):
        event = pool.events[at]
        event.kind, event.key = kind, key
        event.request, event.clock = pool.counts[REQUEST], pool.counts[CLOCK]


@_inner
def link(pool, block, after):  # type: ignore[no-untyped-def]
    """Puts a block into the free queue behind `after`."""
    before = pool.blocks[after].next_free
    pool.blocks[after].next_free = pool.blocks[before].prev_free = block
    pool.blocks[block].prev_free, pool.blocks[block].next_free = after, before
    pool.counts[FREE] += 1


@_inner
def unlink(pool, block):  # type: ignore[no-untyped-def]
    after, before = pool.blocks[block].prev_free, pool.blocks[block].next_free
    pool.blocks[after].next_free, pool.blocks[before].prev_free = before, after
    pool.counts[FREE] -= 1


@_inner
def take(pool):  # type: ignore[no-untyped-def]
    """The first free block, its key removed, in use once; there must be one."""
    block = pool.blocks[len(pool.blocks) - 1].next_free
    unlink(pool, block)
    mine = pool.blocks[block]
    if mine.key != NONE:
        content = pool.contents[mine.key]
        if mine.prev_same == NONE:
            content.oldest = mine.next_same
        else:
            pool.blocks[mine.prev_same].next_same = mine.next_same
        if mine.next_same == NONE:
            content.newest = mine.prev_same
        else:
            pool.blocks[mine.next_same].prev_same = mine.prev_same
        note(pool, EVICT, mine.key)
        mine.key = NONE
    mine.num_users = 1
    return block


@_inner
def set_key(pool, block, key):  # type: ignore[no-untyped-def]
    """Makes a block findable, after older blocks with the same key."""
    content, mine = pool.contents[key], pool.blocks[block]
    if content.newest == NONE:
        content.oldest = block
    else:
        pool.blocks[content.newest].next_same = block
    mine.prev_same, mine.next_same, mine.key = content.newest, NONE, key
    content.newest = block
    content.accesses += 1
    if content.first == NONE:
        content.first = pool.counts[CLOCK]
    note(pool, MISS, key)


@_inner
def num_hits(pool, keys, start, end):  # type: ignore[no-untyped-def]
    """How many leading keys of `keys[start:end]` are cached."""
    at = start
    while at < end and pool.contents[keys[at]].oldest != NONE:
        at += 1
    return at - start


@_inner
def num_cached(pool, keys, start, end):  # type: ignore[no-untyped-def]
    """How many keys of `keys[start:end]` are cached."""
    count = 0
    for at in range(start, end):
        if pool.contents[keys[at]].oldest != NONE:
            count += 1
    return count


@_inner
def admit(pool, table, keys, start, hits, num_blocks):  # type: ignore[no-untyped-def]
    """Fills `table[:num_blocks]`, the first `hits` from the cache. False and no change if blocks lack."""
    unused = 0
    for i in range(hits):
        if pool.blocks[pool.contents[keys[start + i]].oldest].num_users == 0:
            unused += 1
    if num_blocks - hits + unused > pool.counts[FREE]:
        return False
    for i in range(hits):
        content = pool.contents[keys[start + i]]
        table[i] = content.oldest
        if pool.blocks[content.oldest].num_users == 0:
            unlink(pool, content.oldest)
        pool.blocks[content.oldest].num_users += 1
        content.accesses += 1
        content.hits += 1
        note(pool, HIT, keys[start + i])
    for i in range(hits, num_blocks):
        table[i] = take(pool)
    return True


@_inner
def grow(pool, table, held, num_blocks):  # type: ignore[no-untyped-def]
    """Adds blocks to `table[:held]` up to `num_blocks`. False and no change if blocks lack."""
    if num_blocks - held > pool.counts[FREE]:
        return False
    for i in range(held, num_blocks):
        table[i] = take(pool)
    return True


@_inner
def set_keys(pool, table, keys, start, keyed, num_full):  # type: ignore[no-untyped-def]
    """Gives a request's blocks `keyed` to `num_full` their keys; returns how many blocks have one."""
    for i in range(keyed, num_full):
        set_key(pool, table[i], keys[start + i])
    return max(keyed, num_full)


@_inner
def release(pool, table, held, new_order):  # type: ignore[no-untyped-def]
    """Takes one use from each block of `table[:held]`. Free ones join the queue's back, tail first;
    in the new order, those without a key its front."""
    end = len(pool.blocks) - 1
    for i in range(held - 1, -1, -1):
        mine = pool.blocks[table[i]]
        mine.num_users -= 1
        if mine.num_users == 0 and (mine.key != NONE or not new_order):
            link(pool, table[i], pool.blocks[end].prev_free)
    if new_order:
        for i in range(held):
            if pool.blocks[table[i]].key == NONE:
                link(pool, table[i], end)


@_inner
def _num_full(s, q, r, num_tokens):  # type: ignore[no-untyped-def]
    """Blocks of request r that its first `num_tokens` tokens fill and for which the trace has a key."""
    if not s.caching:
        return 0
    return min(num_tokens // s.block_size, q.key_ptr[r + 1] - q.key_ptr[r])


@_inner
def _table(s, q):  # type: ignore[no-untyped-def]
    """A row of block ids per live request."""
    longest = 0
    for r in range(len(q.prompt)):
        longest = max(longest, q.prompt[r] + q.output[r])
    return np.empty((s.concurrency, longest // s.block_size + 1), np.int32)


@_inner
def _next_target(s, filled, hit_tokens, prompt, end):  # type: ignore[no-untyped-def]
    """Tokens filled after the next step of `in_order`: a chunk of the prompt, or output up to the end of a
    block."""
    if filled == 0:
        return min(hit_tokens + s.chunk, prompt)
    if filled < prompt:
        return min(filled + s.chunk, prompt)
    return min((filled // s.block_size + 1) * s.block_size, end)


@_inner
def _in_order(pool, s, q):  # type: ignore[no-untyped-def]
    """Schedule `in_order`; the live requests' rows are a ring from `oldest`, `mine` is the newest's."""
    table, held = _table(s, q), np.zeros(s.concurrency, np.int64)
    oldest = num_live = 0
    for r in range(len(q.prompt)):
        pool.counts[REQUEST] = pool.counts[CLOCK] = r
        prompt, end, start = q.prompt[r], q.prompt[r] + q.output[r], q.key_ptr[r]
        if num_live == s.concurrency:
            release(pool, table[oldest], held[oldest], s.new_order)
            oldest, num_live = (oldest + 1) % s.concurrency, num_live - 1
        mine = (oldest + num_live) % s.concurrency
        q.columns[_CACHED, r] = num_cached(pool, q.keys, start, start + _num_full(s, q, r, prompt))
        hits = num_hits(pool, q.keys, start, start + _num_full(s, q, r, prompt - 1))
        filled = held[mine] = keyed = 0
        while filled < end:
            target = _next_target(s, filled, hits * s.block_size, prompt, end)
            num_blocks = (target + s.block_size - 1) // s.block_size
            while True:
                if filled == 0:
                    fits = admit(pool, table[mine], q.keys, start, hits, num_blocks)
                else:
                    fits = grow(pool, table[mine], held[mine], num_blocks)
                if fits or num_live == 0:
                    break
                release(pool, table[oldest], held[oldest], s.new_order)
                oldest, num_live = (oldest + 1) % s.concurrency, num_live - 1
            if not fits:
                break
            if filled == 0:
                held[mine] = keyed = hits
            q.columns[_ALLOCATED, r] += num_blocks - held[mine]
            held[mine], filled = num_blocks, target
            keyed = set_keys(pool, table[mine], q.keys, start, keyed, _num_full(s, q, r, target))
        if filled < prompt:
            q.columns[_STATUS, r] = PROMPT_TOO_LONG
            release(pool, table[mine], held[mine], s.new_order)
            continue
        q.columns[_STATUS, r] = SERVED if filled == end else CUT
        q.columns[_HIT, r] = hits * s.block_size
        q.columns[_GENERATED, r] = filled - prompt
        num_live += 1


class Live(NamedTuple):
    """The state of `continuous`, with C rows for live requests."""

    table: np.ndarray  # (C, blocks of the longest request) int32
    held: np.ndarray  # (C,) int64, blocks in the row
    keyed: np.ndarray  # (C,) int64, of those the ones with a key
    computed: np.ndarray  # (R,) int64 tokens
    known: np.ndarray  # (R,) int64 tokens: prompt and output so far
    row_of: np.ndarray  # (R,) int64
    running: np.ndarray  # (C,) int64, requests, oldest first
    preempted: np.ndarray  # (C,) int64, requests, the next to resume last
    free_rows: np.ndarray  # (C,) int64
    turn: np.ndarray  # (R,) int8: may come, must wait for the turn before it, or was passed over so
    ready: np.ndarray  # (R,) int64, requests passed over whose turn before has ended since, in that order
    num: np.ndarray  # (6,) int64: how many run, are preempted, rows are free; the next request to arrive;
    # how many are, and were, ready


_RUNNING, _WAITING, _ROWS, _NEXT, _READY, _TAKEN = range(6)
_MAY_COME, _MUST_WAIT, _PASSED_OVER = range(3)


@_inner
def _leave(pool, s, live, r):  # type: ignore[no-untyped-def]
    """Request r gives up its blocks and its row."""
    row = live.row_of[r]
    release(pool, live.table[row], live.held[row], s.new_order)
    live.free_rows[live.num[_ROWS]] = row
    live.num[_ROWS] += 1


@_inner
def _end(q, live, r):  # type: ignore[no-untyped-def]
    """After request r the next turn of its conversation may come."""
    after = q.following[r]
    if after == NONE:
        return
    if live.turn[after] == _PASSED_OVER:
        live.ready[live.num[_READY]] = after
        live.num[_READY] += 1
    live.turn[after] = _MAY_COME


@_inner
def _expected(q, live):  # type: ignore[no-untyped-def]
    """Whether a request may come in. Passes over the turns whose turn before is still there."""
    while live.num[_NEXT] < len(q.prompt) and live.turn[live.num[_NEXT]] != _MAY_COME:
        live.turn[live.num[_NEXT]] = _PASSED_OVER
        live.num[_NEXT] += 1
    return live.num[_WAITING] or live.num[_TAKEN] < live.num[_READY] or live.num[_NEXT] < len(q.prompt)


@_inner
def _advance(pool, s, q, live):  # type: ignore[no-untyped-def]
    """Running requests get their next tokens, the oldest first. False: a request was preempted."""
    room = True
    i = 0
    while i < live.num[_RUNNING]:
        r = live.running[i]
        row = live.row_of[r]
        pool.counts[REQUEST] = r
        target = min(live.computed[r] + s.chunk, live.known[r])
        num_blocks = max(live.held[row], (target + s.block_size - 1) // s.block_size)
        while num_blocks > live.held[row] and not grow(pool, live.table[row], live.held[row], num_blocks):
            room = False
            live.num[_RUNNING] -= 1
            victim = live.running[live.num[_RUNNING]]
            _leave(pool, s, live, victim)
            live.preempted[live.num[_WAITING]] = victim
            live.num[_WAITING] += 1
            q.columns[_PREEMPTED, victim] += 1
            if victim == r:
                return room
        q.columns[_ALLOCATED, r] += num_blocks - live.held[row]
        live.held[row], live.computed[r] = num_blocks, target
        num_full = _num_full(s, q, r, target)
        if num_full > live.keyed[row]:
            set_keys(pool, live.table[row], q.keys, q.key_ptr[r], live.keyed[row], num_full)
            live.keyed[row] = num_full
        i += 1
    return room


@_inner
def _come_in(pool, s, q, live):  # type: ignore[no-untyped-def]
    """The next waiting request gets its first chunk, preempted ones before new ones. False: no room."""
    resumed, place = live.num[_WAITING] > 0, _NEXT
    r = live.num[_NEXT]
    if resumed:
        r = live.preempted[live.num[_WAITING] - 1]
    elif live.num[_TAKEN] < live.num[_READY]:
        r, place = live.ready[live.num[_TAKEN]], _TAKEN
    start = q.key_ptr[r]
    if not resumed:
        pool.counts[CLOCK] = max(pool.counts[CLOCK], r)
        if q.prompt[r] + max(q.output[r] - 1, 0) > s.num_usable * s.block_size:
            q.columns[_STATUS, r] = REQUEST_TOO_LONG
            live.num[place] += 1
            _end(q, live, r)
            return True
        num_full = _num_full(s, q, r, q.prompt[r])
        q.columns[_CACHED, r] = num_cached(pool, q.keys, start, start + num_full)
    pool.counts[REQUEST] = r
    hits = num_hits(pool, q.keys, start, start + _num_full(s, q, r, live.known[r] - 1))
    target = min(hits * s.block_size + s.chunk, live.known[r])
    num_blocks = (target + s.block_size - 1) // s.block_size
    row = live.free_rows[live.num[_ROWS] - 1]
    if not admit(pool, live.table[row], q.keys, start, hits, num_blocks):
        return False
    live.num[_ROWS] -= 1
    if resumed:
        live.num[_WAITING] -= 1
        q.columns[_RESUMED, r] += live.known[r]
        q.columns[_RESUMED_HIT, r] += hits * s.block_size
    else:
        live.num[place] += 1
        q.columns[_HIT, r] = hits * s.block_size
    q.columns[_ALLOCATED, r] += num_blocks - hits
    live.row_of[r], live.held[row], live.computed[r] = row, num_blocks, target
    num_full = _num_full(s, q, r, target)
    live.keyed[row] = set_keys(pool, live.table[row], q.keys, start, hits, num_full)
    live.running[live.num[_RUNNING]] = r
    live.num[_RUNNING] += 1
    return True


@_inner
def _commit(pool, s, q, live):  # type: ignore[no-untyped-def]
    """Requests that have computed all their tokens get their next one; the last one is never computed."""
    still = 0
    for i in range(live.num[_RUNNING]):
        r = live.running[i]
        if live.computed[r] == live.known[r]:
            if q.columns[_GENERATED, r] < q.output[r]:
                q.columns[_GENERATED, r] += 1
                live.known[r] += 1
            if q.columns[_GENERATED, r] == q.output[r]:
                _leave(pool, s, live, r)
                _end(q, live, r)
                continue
        live.running[still] = r
        still += 1
    live.num[_RUNNING] = still


@_inner
def _continuous(pool, s, q):  # type: ignore[no-untyped-def]
    """Schedule `continuous`."""
    rows, num_requests = s.concurrency, len(q.prompt)
    live = Live(
        _table(s, q), np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(num_requests, np.int64),
        q.prompt.copy(), np.zeros(num_requests, np.int64), np.zeros(rows, np.int64),
        np.zeros(rows, np.int64), np.arange(rows), np.zeros(num_requests, np.int8),
        np.zeros(num_requests, np.int64), np.array([0, 0, rows, 0, 0, 0]),
    )  # fmt: skip
    for r in range(num_requests):
        if q.following[r] != NONE:
            live.turn[q.following[r]] = _MUST_WAIT
    while live.num[_RUNNING] or _expected(q, live):
        room = _advance(pool, s, q, live)
        while room and live.num[_RUNNING] < rows and _expected(q, live):
            room = _come_in(pool, s, q, live)
        _commit(pool, s, q, live)


@cached_njit(nogil=True)
def run_in_order(pool, requests, settings):  # type: ignore[no-untyped-def]
    """The whole trace; the arguments are the fields of `Pool`, `Requests` and `Settings` as tuples."""
    _in_order(Pool(*pool), Settings(*settings), Requests(*requests))


@cached_njit(nogil=True)
def run_continuous(pool, requests, settings):  # type: ignore[no-untyped-def]
    """As `run_in_order`."""
    _continuous(Pool(*pool), Settings(*settings), Requests(*requests))
