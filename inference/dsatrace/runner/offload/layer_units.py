"""One layer's latents between HBM and the tiers: which units are in HBM, and bringing in those that are not.

`LayerUnits` has a residency map, which says where units lie and which are evicted, moves bytes between
the layer's tensor and the tiers, and counts. Knows no batch, no request and no other layer.

    units = LayerUnits(3, latent, 16, tiers, num_units=512, policy="lru")
    served_by = units.bring(np.array([7, 9]))     # in HBM now; the tiers that gave those that were not
    units.places(slots, slots // 16)              # rows of the layer's tensor
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsatrace.kv.tiers.fetches import FetchCounters
from dsatrace.kv.tiers.residency import Residency
from dsatrace.kv.tiers.stack import LOST, TierStack


class UnitsLost(RuntimeError):
    """No tier gives back, or takes, units that lie nowhere else; their blocks are void."""

    def __init__(self, layer_id: int, units: np.ndarray, block_ids: frozenset[int], what: str) -> None:
        super().__init__(f"layer {layer_id}: {what} ({len(units)} units)")
        self.layer_id = layer_id
        self.units = units
        self.block_ids = block_ids


class LayerUnits:
    """`num_units` units of `unit_tokens` tokens; `latent (hbm_blocks, block, W)` holds some, one per slot."""

    def __init__(
        self,
        layer_id: int,
        latent: torch.Tensor,
        unit_tokens: int,
        tiers: TierStack,
        *,
        num_units: int,
        policy: str,
        staged: bool | None = None,
    ) -> None:
        """`staged`: bytes move through a host buffer, even where the tensor is in host memory."""
        self.counters = FetchCounters()
        self._layer_id = layer_id
        self._unit_tokens = unit_tokens
        self._block_size = latent.shape[1]
        self._tiers = tiers
        num_slots = latent.shape[0] * latent.shape[1] // unit_tokens
        self._residency = Residency(num_units, num_slots, policy)
        assert unit_tokens * latent.shape[-1] * latent.element_size() == tiers.unit_bytes
        self._bytes = latent.view(torch.uint8).view(num_slots, tiers.unit_bytes)
        self._staged = latent.is_cuda if staged is None else staged
        self._host = self._bytes
        if self._staged:
            self._host = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=latent.is_cuda)
        self._rows = self._host.numpy()
        tiers.register(self._rows)

    @property
    def num_slots(self) -> int:
        """Units that HBM holds."""
        return self._residency.num_slots

    def is_here(self, units: np.ndarray) -> np.ndarray:
        """Which of `units (N,)` are in HBM, (N,) bool."""
        return self._residency.is_resident(units)

    def locate(self, units: np.ndarray) -> np.ndarray:
        """The tier below HBM that would be asked for each unit, (N,) int8."""
        return self._tiers.locate(self._layer_id, units)

    def places(self, slots: np.ndarray, unit_of: np.ndarray) -> np.ndarray:
        """Rows of the layer's tensor where global `slots` of units that are here lie."""
        rows: np.ndarray = slots + (self._residency.slot_of[unit_of] - unit_of) * self._unit_tokens
        return rows

    def waves(self, units: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """As many of distinct `units` at a time as HBM holds, with the index of the first."""
        for start in range(0, len(units), self.num_slots):
            yield start, units[start : start + self.num_slots]

    def bring(
        self, units: np.ndarray, blank: np.ndarray | None = None, *, optional: bool = False
    ) -> np.ndarray:
        """Makes distinct `units` resident, those in `blank` without bytes.

        Returns the tier that gave each fetched unit, in the order of `units`. A unit that no tier has is
        `LOST` and stays away if `optional`; else `UnitsLost` is raised.
        """
        moves = self._residency.admit(units)
        if not len(moves.units):
            return np.empty(0, dtype=np.int8)
        wanted = slice(None) if blank is None else ~np.isin(moves.units, blank)
        try:
            self._save(moves.victims[moves.victim_dirty], moves.victim_slots[moves.victim_dirty])
            served_by = self._load(moves.units[wanted], moves.slots[wanted])
        except BaseException:
            self._residency.drop(moves.units)  # they are not where the map says
            raise
        self.counters.evicted_units += len(moves.victims)
        lost = moves.units[wanted][served_by == LOST]
        if len(lost):
            self._residency.drop(lost)
            if not optional:
                raise self._lost(lost, "the tiers have lost what was selected")
        return served_by

    def guess(self, units: np.ndarray) -> np.ndarray:
        """Brings those `units` that a tier has; returns the units that came."""
        units = units[: self.num_slots]
        missing = units[~self.is_here(units)]
        came: np.ndarray = missing[self.bring(units, optional=True) != LOST]
        self.counters.prefetched_units += len(came)
        return came

    def written(self, units: np.ndarray) -> None:
        """Units that are here were written to, so the tiers' copies are stale."""
        self._residency.mark_dirty(units)

    def drop(self, units: np.ndarray) -> None:
        """Forgets what they hold, in HBM and the tiers."""
        self._residency.drop(units)
        self._tiers.drop(self._layer_id, units)

    def _save(self, units: np.ndarray, slots: np.ndarray) -> None:
        if not len(units):
            return
        if self._staged:
            self._host[: len(slots)] = self._bytes.index_select(0, self._on_device(slots)).cpu()
        stored = self._tiers.put(self._layer_id, units, self._rows, self._host_rows(slots))
        self.counters.written_units += int(stored.sum())
        if not stored.all():
            raise self._lost(units[~stored], "the tiers do not take what leaves HBM", "they are full")

    def _load(self, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Which tier gave each unit; the slots of lost ones hold anything."""
        if not len(units):
            return np.empty(0, dtype=np.int8)
        served_by = self._tiers.fetch(self._layer_id, units, self._rows, self._host_rows(slots))
        if self._staged:
            loaded = self._host[: len(slots)].to(self._bytes.device)
            self._bytes.index_copy_(0, self._on_device(slots), loaded)
        self.counters.fetched_units += int((served_by != LOST).sum())
        return served_by

    def _host_rows(self, slots: np.ndarray) -> np.ndarray:
        return np.arange(len(slots)) if self._staged else slots

    def _on_device(self, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slots).to(self._bytes.device)

    def _lost(self, units: np.ndarray, what: str, otherwise: str = "") -> UnitsLost:
        blocks = frozenset((units * self._unit_tokens // self._block_size).tolist())
        return UnitsLost(self._layer_id, units, blocks, self._tiers.explain(what, otherwise))
