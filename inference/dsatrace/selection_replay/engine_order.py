"""SGLang's hot buffer: LRU in the order of its kernel, at one size.

From the oldest to the newest, a step leaves: ids that it did not ask for in their old order, its
missed ids as they were emitted, then its hits in their old order. The missed ids replace the oldest of
the first group. While the sequence fits the buffer, nothing is looked up, nothing misses, and id i
stands in slot i; so a sequence that outgrows the buffer finds the ids 0 to B - 1 there, 0 as the
oldest. So does "first-b", a prefill that the buffer was filled from; "empty" is a prefill on another
machine. The newest token lies in a slot outside the order: `misses(..., pin_newest=True)`.

A larger buffer can miss what a smaller one holds: while the sequence fits the larger one, that one
does not learn which ids are in use. So this is no stack algorithm, and is replayed size by size.

Source: sglang 0.5.23, `hisparse.cuh` and `hisparse_coordinator.py`. They were read, not run: no GPU has
confirmed this replay. The kernel for speculative decoding, `hisparse_spec.cuh`, is another one.
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit, inner
from dsatrace.selection_replay.replayed import ABSENT, BEFORE, Replayed, scratch, walked
from dsatrace.selection_replay.steps import Start, Steps


def engine_order(steps: Steps, size: int, start: Start) -> Replayed:
    visible = np.require(steps.visible, np.int64, ["C", "W"])
    used, order = np.full(steps.num_ids, ABSENT, np.int32), np.empty(size + 1, np.int32)
    return walked(_walk, steps, size, start, visible, used, order, *scratch(steps))


@inner
def _hold_first(order: np.ndarray, used: np.ndarray, num_first: int) -> None:
    used[:] = ABSENT
    for id_ in range(num_first):
        order[id_] = id_
        used[id_] = BEFORE


@cached_njit(nogil=True, _nrt=False)
def _walk(
    ids: np.ndarray,
    ptr: np.ndarray,
    counted: np.ndarray,
    num_first: int,
    visible: np.ndarray,
    used: np.ndarray,
    order: np.ndarray,
    missed: np.ndarray,
    hits: np.ndarray,
    misses: np.ndarray,
) -> int:
    """Fills `misses`; returns the evictions. `order` has one place more than the buffer."""
    size = len(order) - 1
    num_held, evictions = num_first, 0
    _hold_first(order, used, num_first)
    fitted = False
    for step in range(len(ptr) - 1):
        if visible[step] <= size:
            fitted = True
            continue
        if fitted:
            fitted = False
            num_held = min(size, len(used))
            _hold_first(order, used, num_held)
        num_missed = 0
        for id_ in ids[ptr[step] : ptr[step + 1]]:
            missed[num_missed] = id_
            num_missed += used[id_] == ABSENT
            used[id_] = ABSENT if used[id_] == ABSENT else step
        misses[step] = num_missed
        num_victims = max(0, num_held + num_missed - size)
        evictions += num_victims * counted[step]
        num_hits = num_stale = num_kept = 0
        for at in range(num_held):
            id_ = order[at]
            is_hit = used[id_] == step
            hits[num_hits] = id_
            num_hits += is_hit
            is_kept = not is_hit and num_stale >= num_victims
            order[num_kept] = id_
            num_kept += is_kept
            num_stale += not is_hit
            used[id_] = used[id_] if is_hit or is_kept else ABSENT
        for id_ in missed[:num_missed]:
            order[num_kept] = id_
            used[id_] = step
            num_kept += 1
        for id_ in hits[:num_hits]:
            order[num_kept] = id_
            num_kept += 1
        num_held = num_kept
    return evictions
