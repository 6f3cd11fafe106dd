"""An eviction order of the tiers in plain Python: a policy of the registry, called unit by unit.

residency._order = PlainOrder("arc", num_slots, residency.slot_of)
"""

from __future__ import annotations

import numpy as np

from dsatrace.kv.policies.compiled import Access
from dsatrace.kv.tiers.residency import ABSENT
from helpers.plain_policies import make_policy


class PlainOrder:
    """As a simulation calls a policy for a request's blocks.

    Resident units are pinned first, new ones on admission; all are unpinned at the end, in the order given.
    """

    def __init__(self, name: str, num_slots: int, slot_of: np.ndarray) -> None:
        self._slot_of = slot_of
        self._policy = make_policy(name, num_slots)

    def admit(self, units: np.ndarray, free: np.ndarray) -> np.ndarray:
        policy, access, num_free = self._policy, Access(), len(free)
        victims: list[int] = []
        here = [unit for unit in units.tolist() if self._slot_of[unit] != ABSENT]
        for unit in here:
            policy.pin(unit)
        for unit in units.tolist():
            if unit in here:
                policy.hit(unit, access)
                continue
            policy.miss(unit, access)
            if num_free:
                num_free -= 1
            else:
                victims.append(policy.evict())
            policy.insert(unit, access)
            policy.pin(unit)
        for unit in units.tolist():
            policy.unpin(unit)
        return np.concatenate([free, self._slot_of[np.array(victims, dtype=np.int64)]])

    def forget(self, units: np.ndarray) -> None:
        for unit in units.tolist():
            self._policy.forget(unit)
