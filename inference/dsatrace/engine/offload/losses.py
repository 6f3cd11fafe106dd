"""What an offloaded cache raises in the middle of a forward: KV that no tier has.

raise UnitsLost(3, units, block_ids=frozenset({7}), what="the tiers have lost what was selected")
"""

from __future__ import annotations

import numpy as np


class UnitsLost(RuntimeError):
    """No tier gives back, or took, units that lie nowhere else; their blocks are void."""

    def __init__(self, layer_id: int, units: np.ndarray, block_ids: frozenset[int], what: str) -> None:
        super().__init__(f"layer {layer_id}: {what} ({len(units)} units)")
        self.layer_id = layer_id
        self.units = units
        self.block_ids = block_ids
