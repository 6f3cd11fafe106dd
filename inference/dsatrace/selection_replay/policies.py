"""What a buffer of one size misses under each policy, by name.

A buffer holds B ids. A step's ids are resident together: a rule never evicts one of them, but goes on
to the next of its own choice. Which ids miss is decided before the step changes anything.

From an empty buffer, names of ids do not matter where the order inside a step is kept; to LRU and LFU
their order matters, to a window they are positions. The order inside a step matters to SGLang's order,
FIFO, random and S3-FIFO.

    misses(steps, "fifo", 4096).misses            # (T,) missed ids of each step
    misses(steps, "random", 4096, seed=7, start="first-b")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from dsatrace.errors import UserError
from dsatrace.selection_replay.engine_order import engine_order
from dsatrace.selection_replay.fifo import fifo
from dsatrace.selection_replay.lfu import lfu
from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.optimum import optimum
from dsatrace.selection_replay.random_choice import random_choice
from dsatrace.selection_replay.replayed import Replayed, largest_step
from dsatrace.selection_replay.s3fifo import s3fifo
from dsatrace.selection_replay.steps import Start, Steps
from dsatrace.selection_replay.without_order import nothing, previous, window


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
    pins_newest: bool = False  # has a slot of its own for the newest id, whatever the others have
    fills: bool = True  # every id of a step becomes resident, so the largest step must fit


# fmt: off
_POLICIES = (
    Policy("lru", "the least recently selected id; of one step, the lowest", "Mattson et al. 1970, on sets",
           _lru, ("start",)),
    Policy("sglang", "LRU in the order of SGLang's kernel", "SGLang 0.5.23, hisparse.cuh; read, not run",
           engine_order, ("start",), pins_newest=True),
    Policy("fifo", "the id that became resident first", "SGLang's fifo, on sets", fifo, ("start",)),
    Policy("random", "any id, each as likely as the others", "SplitMix64, by the seed",
           random_choice, ("start", "seed")),
    Policy("lfu", "the id selected least often since it became resident, then the least recent",
           "SGLang's lfu, on sets", lfu, ("start",)),
    Policy("s3-fifo", "unused ids of a small queue, then of the main one",
           "Yang et al., SOSP 2023, on sets", s3fifo, ("start",)),
    Policy("window", "all but the first few ids and the newest", "StreamingLLM; Xiao et al., ICLR 2024",
           window, ("sinks",), fills=False),
    Policy("previous", "all but the ids of the step before", "Levy 2603.13430, section 5.3",
           previous, ("start",), fills=False),
    Policy("none", "every id: there is no buffer", "the upper bound of misses", nothing, fills=False),
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
    largest = largest_step(asked)
    if chosen.fills and largest > size:
        raise UserError(f"a buffer of {size} ids does not hold a step of {largest}; give at least {largest}")
    settings = {"seed": seed, "start": start, "sinks": sinks}
    return chosen.replay(asked, size, **{name: settings[name] for name in chosen.takes})
