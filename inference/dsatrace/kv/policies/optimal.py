"""OPT: evicts the block whose next use is farthest, the bound no policy can beat.

Belady's rule (IBM Systems Journal, 1966) with requests as the unit: all blocks of a request are
pinned together while it is in flight, and none is left out of the cache. Exchanging a victim for one
whose next use is farther never loses a hit, so the rule is optimal for cached blocks. A parent is
used whenever its child is, so a parent that is used again is never evicted before its child: the rule
is optimal for unbroken prefixes and under the leaf constraint, too. Of blocks never used again, the least
recent goes. Needs the future: `Access.next_use`.
"""

from __future__ import annotations

from typing import NamedTuple

from dsatrace.kv.policies.compiled import RULES, Access, Cache, Rules, Shape


class OptimalState(NamedTuple):
    unused: bool  # numba has no empty tuple class


def optimal_state(shape: Shape) -> OptimalState:
    return OptimalState(False)


def _farthest_first(policy: OptimalState, cache: Cache, slot: int, access: Access) -> None:
    cache.value[slot] = -float(access.next_use)


RULES[OptimalState] = Rules(enter=_farthest_first, again=_farthest_first)
