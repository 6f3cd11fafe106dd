"""A random choice over sets: any id that the step does not ask for, each as likely as the others.

The seed repeats the choices, for ids recorded in the same order.
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.kv.policies.ordered import splitmix64
from dsatrace.selection_replay.replayed import Replayed, scratch, walked
from dsatrace.selection_replay.steps import Start, Steps

NOWHERE = -1


def random_choice(steps: Steps, size: int, start: Start, seed: int) -> Replayed:
    place, held = np.full(steps.num_ids, NOWHERE, np.int32), np.empty(size, np.int32)
    state = np.array([seed & (2**64 - 1)], np.uint64)
    return walked(_walk, steps, size, start, place, held, scratch(steps)[0], state)


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    num_first: int,
    place: np.ndarray,
    held: np.ndarray,
    missed: np.ndarray,
    state: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions. `held[place[id]]` is id, and a step's ids come first."""
    num_held, evictions = num_first, 0
    for id_ in range(num_first):
        place[id_] = held[id_] = id_
    for step in range(len(ptr) - 1):
        num_hits = num_missed = 0
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            at = place[id_]
            if at == NOWHERE:
                missed[num_missed] = id_
                num_missed += 1
                continue
            other = held[num_hits]
            held[at], place[other] = other, at
            held[num_hits], place[id_] = id_, num_hits
            num_hits += 1
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - len(held))
        evictions += num_victims * counted[step]
        for _ in range(num_victims):
            choices = np.uint64(num_held - num_hits)
            at = num_hits + np.int64(((splitmix64(state) >> np.uint64(32)) * choices) >> np.uint64(32))
            place[held[at]] = NOWHERE
            num_held -= 1
            held[at] = held[num_held]
            if at < num_held:
                place[held[at]] = at
        for id_ in missed[:num_missed]:
            held[num_held], place[id_] = id_, num_held
            num_held += 1
    return evictions
