"""What a buffer of one size misses under each policy, by name.

A buffer holds B ids. A step's ids are resident together: a rule never evicts one of them, but goes on
to the next of its own choice. Which ids miss is decided before the step changes anything.

    misses(steps, "fifo", 4096).misses            # (T,) missed ids of each step
    misses(steps, "random", 4096, seed=7, start="first-b")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from dsatrace.errors import UserError
from dsatrace.selection_replay.fifo import fifo
from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.optimum import optimum
from dsatrace.selection_replay.replayed import Replayed
from dsatrace.selection_replay.steps import Start, Steps


def _lru(steps: Steps, size: int, start: Start) -> Replayed:
    result = lru(steps, [size], start=start)
    return Replayed(result.misses[:, 0], int(result.evictions[0]))


@dataclasses.dataclass(frozen=True)
class Policy:
    """One policy. `takes`: which of "start", "seed" and "sinks" it heeds."""

    name: str
    meaning: str
    source: str
    replay: Callable[..., Replayed]
    takes: tuple[str, ...] = ()
    fills: bool = True  # every id of a step becomes resident, so the largest step must fit


# fmt: off
_POLICIES = (
    Policy("lru", "the least recently selected id; of one step, the lowest", "Mattson et al. 1970, on sets",
           _lru, ("start",)),
    Policy("fifo", "the id that became resident first", "SGLang's fifo, on sets", fifo, ("start",)),
    Policy("opt", "the id whose next use is farthest: the bound", "Belady 1966, with the step's set pinned",
           optimum, ("start",)),
)
# fmt: on

POLICIES: Mapping[str, Policy] = MappingProxyType({policy.name: policy for policy in _POLICIES})


def misses(
    steps: Steps,
    policy: str,
    size: int,
    *,
    seed: int = 0,
    start: Start = "empty",
    pin_newest: bool = False,
    sinks: int = 4,
) -> Replayed:
    """Replays the steps through a buffer of `size` ids.

    With `pin_newest`, a step's newest id hits in a slot of its own: it neither enters the buffer nor
    counts as a use of what the buffer holds. Settings that a policy does not take change nothing.
    Raises `UserError` for an unknown name, or if a step does not fit.
    """
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r}; choose from {', '.join(POLICIES)}")
    chosen = POLICIES[policy]
    asked = steps.without_newest() if pin_newest else steps
    largest = int(asked.sizes.max(initial=0))
    if chosen.fills and largest > size:
        raise UserError(f"a buffer of {size} ids does not hold a step of {largest}; give at least {largest}")
    settings = {"seed": seed, "start": start, "sinks": sinks}
    return chosen.replay(asked, size, **{name: settings[name] for name in chosen.takes})
