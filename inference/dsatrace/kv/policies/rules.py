"""How a policy's compiled rules are found: by the type of its state.

A policy is a NamedTuple of arrays and up to five plain functions over it and the `Cache`.
The replay calls `enter`, `victim` and the rest by name, and numba compiles them into the
loop of that policy alone: nothing is compiled for policies nobody asks for, and nothing
is looked up while the loop runs. The meaning of each rule is `PlainPolicy`'s.

    RULES[LfuState] = Rules(again=count_use)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from numba.extending import overload

from dsatrace.kv.policies.cache import Cache, pop, tick
from dsatrace.kv.policies.policy import Access

Rule = Callable[..., Any]


def nothing_on_miss(policy: Any, cache: Cache, block: int, access: Access) -> None:
    """The policy remembers no block that left."""


def nothing_to_do(policy: Any, cache: Cache, slot: int, access: Access) -> None:
    """The policy keeps no account of this."""


def fresh_stamp(policy: Any, cache: Cache, slot: int) -> None:
    """Recency: in use until now."""
    cache.stamp[slot] = tick(cache)


def same_stamp(policy: Any, cache: Cache, slot: int) -> None:
    """Order of entry, or of what the policy says otherwise."""


def first_of_queue_0(policy: Any, cache: Cache) -> int:
    return pop(cache, 0)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Without any, LRU."""

    miss: Rule = nothing_on_miss
    enter: Rule = nothing_to_do
    again: Rule = nothing_to_do
    released: Rule = fresh_stamp
    victim: Rule = first_of_queue_0


RULES: dict[type, Rules] = {}


def miss(policy: Any, cache: Cache, block: int, access: Access) -> None:
    """Compiled only, like the four below."""


def enter(policy: Any, cache: Cache, slot: int, access: Access) -> None: ...


def again(policy: Any, cache: Cache, slot: int, access: Access) -> None: ...


def released(policy: Any, cache: Cache, slot: int) -> None: ...


def victim(policy: Any, cache: Cache) -> int:  # type: ignore[empty-body]
    ...


# strict=False: numba would compare annotations as well, and rules annotate their own state.
@overload(miss, strict=False)
def _miss(policy: Any, cache: Any, block: Any, access: Any) -> Rule:
    return RULES[policy.instance_class].miss


@overload(enter, strict=False)
def _enter(policy: Any, cache: Any, slot: Any, access: Any) -> Rule:
    return RULES[policy.instance_class].enter


@overload(again, strict=False)
def _again(policy: Any, cache: Any, slot: Any, access: Any) -> Rule:
    return RULES[policy.instance_class].again


@overload(released, strict=False)
def _released(policy: Any, cache: Any, slot: Any) -> Rule:
    return RULES[policy.instance_class].released


@overload(victim, strict=False)
def _victim(policy: Any, cache: Any) -> Rule:
    return RULES[policy.instance_class].victim
