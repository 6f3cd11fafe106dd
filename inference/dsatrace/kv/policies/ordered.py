"""LRU, MRU, FIFO, FILO (by last use or by entry, oldest or newest first), and a random choice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner
from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape, same_stamp, tick, withdraw

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = 2**64 - 1


class OrderedState(NamedTuple):
    """Evicts the block used (or else cached) the longest time ago, or, newest first, the shortest."""

    by_recency: bool
    sign: int  # -1: newest first


def ordered_state(shape: Shape, *, by_recency: bool, newest_first: bool) -> OrderedState:
    return OrderedState(by_recency, -1 if newest_first else 1)


def _sign_stamp(policy: OrderedState, cache: Cache, slot: int, access: Access) -> None:
    cache.stamp[slot] *= policy.sign


def _restamp(policy: OrderedState, cache: Cache, slot: int) -> None:
    if policy.by_recency:
        cache.stamp[slot] = policy.sign * tick(cache)


RULES[OrderedState] = Rules(enter=_sign_stamp, released=_restamp)


class UniformState(NamedTuple):
    """Evicts any evictable block, each equally likely; a seed repeats its choices."""

    state: np.ndarray  # (1,) uint64


def uniform_state(shape: Shape, *, seed: int) -> UniformState:
    return UniformState(np.array([seed & _64_BITS], np.uint64))


@inner
def splitmix64(state: np.ndarray) -> np.uint64:
    """Steele, Lea and Flood, OOPSLA 2014."""
    state[0] += np.uint64(_GOLDEN)
    bits = state[0]
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_MIX_1)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: np.uint64 = bits ^ (bits >> np.uint64(31))
    return mixed


def _equal_key(policy: UniformState, cache: Cache, slot: int, access: Access) -> None:
    cache.stamp[slot] = 0  # slots with equal keys make a bag of the heap


def _any_slot(policy: UniformState, cache: Cache) -> int:
    size = np.uint64(cache.heap_size[0])
    at = ((splitmix64(policy.state) >> np.uint64(32)) * size) >> np.uint64(32)
    slot: int = cache.heap[0, np.int64(at)]
    withdraw(cache, slot)
    return slot


RULES[UniformState] = Rules(enter=_equal_key, released=same_stamp, victim=_any_slot)
