"""Ordered lists of small integers, compiled: several disjoint lists over the same items.

Each list is circular with an extra node that marks its end, so that no operation has a special
case. Used for an order with removals (SIEVE) and for evicted blocks (the ghosts of S3-FIFO and ARC).
Knows no cache.

    lists = empty_lists(num_items=10, num_lists=2)
    append(lists, 0, 7); append(lists, 0, 3)
    oldest(lists, 0)                # 7
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsatrace.jit import inner

IN_NONE = -1


class Lists(NamedTuple):
    """M items in L lists; nodes M to M + L - 1 are the lists' ends."""

    newer: np.ndarray  # (M + L,) int32, the next node after each, appended later
    older: np.ndarray  # (M + L,) int32, the one before each
    list_of: np.ndarray  # (M + L,) int8, IN_NONE for an item in no list
    size: np.ndarray  # (L,) int64


def empty_lists(num_items: int, num_lists: int) -> Lists:
    nodes = np.arange(num_items + num_lists, dtype=np.int32)
    return Lists(nodes, nodes.copy(), np.full(len(nodes), IN_NONE, np.int8), np.zeros(num_lists, np.int64))


@inner
def end(lists: Lists, which: int) -> int:
    """The node after the newest and before the oldest."""
    return len(lists.newer) - len(lists.size) + which


@inner
def oldest(lists: Lists, which: int) -> int:
    """The item appended first; of an empty list, its end."""
    item: int = lists.newer[end(lists, which)]
    return item


@inner
def append(lists: Lists, which: int, item: int) -> None:
    """Adds an item, which must be in no list, after the newest."""
    after = end(lists, which)
    before = lists.older[after]
    lists.newer[before], lists.older[item] = item, before
    lists.newer[item], lists.older[after] = after, item
    lists.list_of[item] = which
    lists.size[which] += 1


@inner
def take_out(lists: Lists, item: int) -> None:
    before, after = lists.older[item], lists.newer[item]
    lists.newer[before], lists.older[after] = after, before
    lists.size[lists.list_of[item]] -= 1
    lists.list_of[item] = IN_NONE
