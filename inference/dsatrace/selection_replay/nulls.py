"""What a stream of selections is held against: the same sizes, chosen without any knowledge.

`uniform` selects at random from what is visible, `recency` the newest ids, `shuffled` keeps the stream's
own sets and forgets their order in time. `chance` is the share that a random selector holds of any other
set: k / N. Random numbers come from a counter and a seed, so a null is the same on every machine.

    null_of(steps, "uniform", seed=seed_of(0, "r17", 5))        # Steps
    chance(steps)               # 0.0156 at 2,048 of 131,072
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.selection_replay.bits import ONE, lowest_bit
from dsatrace.selection_replay.steps import Steps
from dsatrace.trace.selections import copy_runs

CHANCE_BITS = 32
CHANCE_UNIT = 2.0**-CHANCE_BITS
"""Expected counts are summed in this unit, each rounded down to it: then their sum has no order."""


def expected_shared(one: np.ndarray, other: np.ndarray, visible: np.ndarray) -> int:
    """Ids that two random sets share, summed over pairs, in `CHANCE_UNIT`: the sum of one * other / visible.

    All (n,) int64: the sizes of both sets, and from how many ids they are chosen.
    """
    products, among = one * other, np.maximum(visible, 1)
    whole, rest = np.divmod(products, among)
    return (int(whole.sum()) << CHANCE_BITS) + int(((rest << CHANCE_BITS) // among).sum())


def chance(steps: Steps) -> float | None:
    """Share of a counted step's ids that a random selector of its size holds, k / N; None without ids."""
    sizes, visible = steps.sizes[steps.num_warm :], steps.visible[steps.num_warm :]
    total = int(sizes.sum())
    return expected_shared(sizes, sizes, visible) * CHANCE_UNIT / total if total else None


def seed_of(seed: int, *stream: str | int) -> int:
    """A seed for one stream, from the run's seed and what names the stream (request, layer)."""
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(steps: Steps, seed: int) -> Steps:
    """Per step as many ids, each set of the visible ids equally likely; ascending.

    Two streams with the same seed get related sets: give each its own, see `seed_of`. Raises ValueError
    where a step has more ids than it could choose from.
    """
    sizes = steps.sizes
    _refuse_too_many(sizes, steps.visible)
    ids, num_ids = np.empty(len(steps.ids), np.int32), _num_ids(steps)
    _choose(ids, steps.ptr, steps.visible, num_ids, np.uint64(seed))
    return dataclasses.replace(steps, ids=ids, num_ids=num_ids)


def recency(steps: Steps) -> Steps:
    """Per step as many ids, the last that are visible; ascending. Raises ValueError as `uniform` does."""
    sizes = steps.sizes
    _refuse_too_many(sizes, steps.visible)
    first = np.repeat(steps.visible - sizes - steps.ptr[:-1], sizes)
    ids = (first + np.arange(len(steps.ids))).astype(np.int32)
    return dataclasses.replace(steps, ids=ids, num_ids=_num_ids(steps))


def shuffled(steps: Steps, seed: int) -> Steps:
    """The stream's own steps in a random order: which ids are popular stays, when they are is lost.

    A step moves as a whole: its ids, its newest id and the number it chose from. So each set is still one
    that was really selected, and sizes, k / N and the share of pinned newest ids stay; but a set may come
    before the step in which its ids were written, so no causal selector could make this stream. To cut such
    sets would change sizes and favour early steps. Warm steps are shuffled among themselves, so the counted
    sets are the same ones. With one seed for all layers of a request, a step's layers stay together.
    """
    order = np.arange(steps.num_steps)
    _shuffle(order[: steps.num_warm], np.uint64(seed))
    _shuffle(order[steps.num_warm :], np.uint64(seed))
    sizes = steps.sizes[order]
    ptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.empty(len(steps.ids), np.int32)
    copy_runs(steps.ids, steps.ptr[:-1][order], steps.ptr[1:][order], ptr[:-1], ids)
    return dataclasses.replace(
        steps, ids=ids, ptr=ptr, newest=steps.newest[order], visible=steps.visible[order]
    )


NULLS: dict[str, Callable[[Steps, int], Steps]] = {
    "uniform": uniform,
    "recency": lambda steps, _: recency(steps),
    "shuffled": shuffled,
}


def null_of(steps: Steps, name: str, seed: int, ordered: bool = True) -> Steps | None:
    """One of `NULLS`; None for recency where ids have no order (slots, experts)."""
    return NULLS[name](steps, seed) if ordered or name != "recency" else None


def _num_ids(steps: Steps) -> int:
    return max(steps.num_ids, int(steps.visible.max(initial=0)))


def _refuse_too_many(sizes: np.ndarray, visible: np.ndarray) -> None:
    if (sizes > visible).any():
        step = int(np.argmax(sizes > visible))
        raise ValueError(f"step {step} selects {sizes[step]} ids, but only {visible[step]} are visible")


@cached_njit(nogil=True, inline="always")
def _mixed(counter):  # type: ignore[no-untyped-def]
    """A 64-bit number that looks random, from a counter (splitmix64's finish)."""
    z = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@cached_njit(nogil=True)
def _below(state, limit):  # type: ignore[no-untyped-def]
    """A random number below `limit` < 2^32, each equally likely; `state` (1,) uint64 moves on."""
    low_bits, bound = np.uint64(0xFFFFFFFF), np.uint64(limit)
    while True:
        state[0] += np.uint64(0x9E3779B97F4A7C15)
        product = (_mixed(state[0]) >> np.uint64(32)) * bound
        # Of 2^32 draws the first 2^32 mod limit of each stride are one too many.
        low = product & low_bits
        if low >= bound or low >= (np.uint64(1 << 32) - bound) % bound:
            return np.int64(product >> np.uint64(32))


@cached_njit(nogil=True)
def _choose(ids, ptr, visible, num_ids, seed):  # type: ignore[no-untyped-def]
    """Fills each step of `ids` by Floyd's method: one draw per id, whatever is visible."""
    words = np.zeros(num_ids // 64 + 1, np.uint64)
    state = np.empty(1, np.uint64)
    for step in range(len(ptr) - 1):
        state[0] = _mixed(seed + np.uint64(step + 1) * np.uint64(0xD1342543DE82EF95))
        size, among = ptr[step + 1] - ptr[step], visible[step]
        for last in range(among - size, among):
            drawn = _below(state, last + 1)
            bit = ONE << np.uint64(drawn & 63)
            if words[drawn >> 6] & bit:
                drawn = last
                bit = ONE << np.uint64(drawn & 63)
            words[drawn >> 6] |= bit
        place = ptr[step]
        for word in range(among // 64 + 1):
            bits = words[word]
            words[word] = np.uint64(0)
            while bits:
                ids[place] = word * 64 + lowest_bit(bits)
                place += 1
                bits &= bits - ONE


@cached_njit(nogil=True)
def _shuffle(order, seed):  # type: ignore[no-untyped-def]
    """Fisher and Yates, in place."""
    state = np.full(1, seed, np.uint64)
    for last in range(len(order) - 1, 0, -1):
        other = _below(state, last + 1)
        order[last], order[other] = order[other], order[last]
