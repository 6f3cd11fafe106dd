"""The tiers below HBM as one: a local pool, a remote pool, or the first as a cache of the second.

With both, the local pool is a write-back cache: what is put lies there alone until it has to
make room, and what is fetched from the remote pool is kept there too. The remote pool needs
room for all units that the local one does not hold, and does best with room for all: a copy
of it that is out of date is not served any more, but keeps its place until it is overwritten.

Which store holds the current version of a unit is known here, and no store is asked for any
other. A store that fails costs its units, never a wrong byte and never the run: `StoreError`
ends here as a miss or as not stored, is counted by the store, and is kept in `last_error`.
Knows no tensor, no token and no request.

    stack = TierStack(ram_store(73728, 512), remote, num_layers=61, units_per_layer=4096)
    stored = stack.put(layer_id, units, pool, rows)       # (N,) bool
    tiers = stack.fetch(layer_id, units, pool, rows)      # (N,) int8: LOCAL, REMOTE or LOST
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from dsatrace.kv.stores.interface import (
    UNIT_ID_BITS,
    Store,
    StoreError,
    StoreStats,
    are_distinct,
    check_batch,
)
from dsatrace.kv.tiers.fetches import HBM, LOCAL, REMOTE, TierCounts
from dsatrace.kv.tiers.residency import Residency
from dsatrace.schema import TIER_NAMES

LOST = -1
"""Instead of a tier: nobody gives this unit."""


def tier_counts(hbm_evicted: int, hbm_written: int, stats: Sequence[StoreStats | None]) -> TierCounts:
    """`stats` by tier, None for HBM and for a tier that is not there."""

    def column(*names: str) -> list[float]:
        return [0 if x is None else sum(getattr(x, name) for name in names) for x in stats]

    counts = (column("read_ops"), column("evicted_units"), column("stored_units"))
    read_ops, evicted, written = (np.array(values, dtype=np.int64) for values in counts)
    evicted[HBM], written[HBM] = hbm_evicted, hbm_written
    errors = np.array(column("errors", "corrupt_units"), dtype=np.int64)
    return TierCounts(read_ops, evicted, written, errors, np.array(column("read_us", "write_us")))


class TierStack:
    """Units of all layers in one or two stores, which nobody else uses meanwhile.

    Arrays are those of `Store`, but `units (N,)` are distinct ids below `units_per_layer`.
    Calls may come from any thread and are carried out one after the other.
    """

    def __init__(
        self,
        local: Store | None,
        remote: Store | None,
        *,
        num_layers: int,
        units_per_layer: int,
        policy: str = "lru",
    ) -> None:
        """`policy`, one of `TIER_POLICIES`, says what the local pool gives up where there is a remote one.

        Raises `UserError` for an unknown policy, `ValueError` for stores that cannot be stacked.
        """
        self._stores = {
            tier: store for tier, store in ((LOCAL, local), (REMOTE, remote)) if store is not None
        }
        sizes = {store.unit_bytes for store in self._stores.values()}
        if len(sizes) != 1:
            raise ValueError(f"a stack takes one or two stores with units of one size, not {sorted(sizes)}")
        self.unit_bytes = sizes.pop()
        self.last_error: StoreError | None = None  # of the last fetch, put or drop
        self.read_units = np.zeros(len(TIER_NAMES), dtype=np.int64)  # by tier: what it gave, by our count
        self.written_units = np.zeros(len(TIER_NAMES), dtype=np.int64)  # and what it took
        self._num_layers, self._units_per_layer = num_layers, units_per_layer
        num_units = num_layers * units_per_layer
        # By tier and unit id over all layers. The truth; the residency only says who makes room for whom.
        self._is_current = {tier: np.zeros(num_units, dtype=bool) for tier in self._stores}
        self._holds = {tier: np.zeros(num_units, dtype=bool) for tier in self._stores}  # any version
        self._residency: Residency | None = None
        if local is not None and remote is not None:
            room = num_units if local.capacity_units is None else min(local.capacity_units, num_units)
            self._residency = Residency(num_units, room, policy)
        self._scratch = np.empty((0, self.unit_bytes), dtype=np.uint8)  # what is written back passes here
        self._lock = threading.Lock()

    def fetch(self, layer_id: int, units: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Reads unit i into `out[rows[i]]`. Returns the tier that gave it, (N,) int8: LOCAL, REMOTE or LOST.

        One batch a store at most, and to keep what the remote one gave, one of write-backs. Rows of
        units that are LOST hold anything afterwards.
        """
        with self._lock:
            self.last_error = None
            ids, rows = self._checked(layer_id, units, out, rows)
            if not are_distinct(rows):
                raise ValueError("a fetch names a row twice; which unit should it hold?")
            tiers = np.full(len(ids), LOST, dtype=np.int8)
            for tier in self._stores:
                asked = np.flatnonzero((tiers == LOST) & self._is_current[tier][ids])
                tiers[asked[self._read(tier, ids[asked], out, rows[asked])]] = tier
            if self._residency is not None:
                here = self._residency.is_resident(ids)
                kept = np.flatnonzero(here | (tiers == REMOTE))
                promoted = kept[self._make_room(ids[kept]) & ~here[kept]]
                self._write(LOCAL, ids[promoted], out, rows[promoted])
            return tiers

    def locate(self, layer_id: int, units: np.ndarray) -> np.ndarray:
        """The tier that would be asked for each unit, (N,) int8; LOST where none is known to have it."""
        with self._lock:
            ids = self._ids(layer_id, units)
            tiers = np.full(len(ids), LOST, dtype=np.int8)
            for tier in reversed(self._stores):
                tiers[self._is_current[tier][ids]] = tier
            return tiers

    def put(self, layer_id: int, units: np.ndarray, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Stores `data[rows[i]]` as unit i. Returns which are stored somewhere, (N,) bool.

        Older versions are void from here on, also those of units that are not stored.
        """
        with self._lock:
            self.last_error = None
            ids, rows = self._checked(layer_id, units, data, rows)
            stored = np.zeros(len(ids), dtype=bool)
            for is_current in self._is_current.values():
                is_current[ids] = False
            if LOCAL in self._stores:
                has_room = np.ones(len(ids), dtype=bool) if self._residency is None else self._make_room(ids)
                room = np.flatnonzero(has_room)
                stored[room] = self._write(LOCAL, ids[room], data, rows[room])
            if REMOTE in self._stores:
                rest = np.flatnonzero(~stored)
                stored[rest] = self._write(REMOTE, ids[rest], data, rows[rest])
            return stored

    def drop(self, layer_id: int, units: np.ndarray) -> None:
        """The bytes of `units`, known or not, are void: no store gives them any more."""
        with self._lock:
            self.last_error = None
            ids = self._ids(layer_id, units)
            for tier in self._stores:
                self._evict(tier, ids[self._holds[tier][ids]])
                self._forget(tier, ids)

    def explain(self, what: str, otherwise: str = "") -> str:
        """`what` happened in the last call, and why: a store has failed in it, or else `otherwise`."""
        why = otherwise if self.last_error is None else str(self.last_error)
        return f"{what}: {why}" if why else what

    def register(self, buffer: np.ndarray) -> None:
        """See `Store.register`; a store that cannot says so by `StoreError`, before the run has begun."""
        for store in self._stores.values():
            store.register(buffer)

    def stats(self) -> tuple[StoreStats | None, ...]:
        """The stores' counts so far by tier, None for HBM and for a tier that is not there."""
        stores = [self._stores.get(tier) for tier in range(len(TIER_NAMES))]
        return tuple(None if store is None else store.stats() for store in stores)

    def counts(self, hbm_evicted: int, hbm_written: int) -> TierCounts:
        """The same by tier, with what HBM has counted itself."""
        return tier_counts(hbm_evicted, hbm_written, self.stats())

    def close(self) -> None:
        """Closes the stores, the second also where the first does not close."""
        local, remote = self._stores.get(LOCAL), self._stores.get(REMOTE)
        try:
            if local is not None:
                local.close()
        finally:
            if remote is not None:
                remote.close()

    # Room in the local pool.

    def _make_room(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` are in the local pool or may be put there now, (N,) bool.

        Those that are here are used and stay; as many of the others as fit get room, unless the
        unit that had to go for one could not be written back.
        """
        residency = self._residency
        assert residency is not None
        here = residency.is_resident(ids)
        room_left = residency.num_slots - np.count_nonzero(here)
        moves = residency.admit(ids[here | (np.cumsum(~here) <= room_left)])
        stays = ~self._retire(moves.victims)
        if stays.any():
            residency.drop(moves.units[np.isin(moves.slots, moves.victim_slots[stays])])
            residency.admit(moves.victims[stays])
        return residency.is_resident(ids)

    def _retire(self, victims: np.ndarray) -> np.ndarray:
        """Evicts `victims (V,)` from the local pool, those that lie nowhere else after writing them back.

        Returns which went, (V,) bool.
        """
        self._write_back(victims[~self._is_current[REMOTE][victims]])
        gone = self._is_current[REMOTE][victims] | ~self._is_current[LOCAL][victims]
        if not self._evict(LOCAL, victims[gone]):
            return ~self._is_current[LOCAL][victims]
        self._is_current[LOCAL][victims[gone]] = False
        return gone

    def _write_back(self, ids: np.ndarray) -> None:
        """From the local pool to the remote one, as many as the two manage."""
        if len(self._scratch) < len(ids):
            self._scratch = np.empty((len(ids), self.unit_bytes), dtype=np.uint8)
        rows = np.arange(len(ids))
        read = np.flatnonzero(self._read(LOCAL, ids, self._scratch, rows))
        self._write(REMOTE, ids[read], self._scratch, read)

    # One batch of one store. Nothing is asked for an empty one.

    def _read(self, tier: int, ids: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The hits, (N,) bool. What a store misses it has lost; after an error it may have it still."""
        if not len(ids):
            return np.zeros(0, dtype=bool)
        try:
            hits = self._stores[tier].fetch(self._keys(ids), out, rows)
        except StoreError as error:
            self.last_error = error
            return np.zeros(len(ids), dtype=bool)
        self.read_units[tier] += np.count_nonzero(hits)
        self._forget(tier, ids[~hits])
        return hits

    def _write(self, tier: int, ids: np.ndarray, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which are stored, (N,) bool; of the others, also after an error, the store holds no version."""
        if not len(ids):
            return np.zeros(0, dtype=bool)
        try:
            stored = self._stores[tier].put(self._keys(ids), data, rows)
        except StoreError as error:
            self.last_error = error
            stored = np.zeros(len(ids), dtype=bool)
        self.written_units[tier] += np.count_nonzero(stored)
        self._is_current[tier][ids[stored]] = True
        self._holds[tier][ids] = stored
        self._forget(tier, ids[~stored])
        return stored

    def _evict(self, tier: int, ids: np.ndarray) -> bool:
        """Whether the store answered; a unit it keeps nevertheless takes up room, but is not asked for."""
        if len(ids):
            try:
                gone = self._stores[tier].evict(self._keys(ids))
                self._holds[tier][ids[gone]] = False
            except StoreError as error:
                self.last_error = error
                return False
        return True

    def _forget(self, tier: int, ids: np.ndarray) -> None:
        self._is_current[tier][ids] = False
        if len(ids) and tier == LOCAL and self._residency is not None:
            self._residency.drop(ids)

    # Names of units.

    def _checked(
        self, layer_id: int, units: np.ndarray, buffer: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and rows, (N,) int64, or `ValueError` before anything has happened."""
        ids = self._ids(layer_id, units)
        return ids, check_batch(self.unit_bytes, self._keys(ids), buffer, rows)

    def _ids(self, layer_id: int, units: np.ndarray) -> np.ndarray:
        """Dense over all layers, (N,) int64."""
        units = np.asarray(units, dtype=np.int64)
        if not 0 <= layer_id < self._num_layers:
            raise ValueError(f"layer {layer_id} of {self._num_layers}")
        if len(units) and not 0 <= int(units.min()) <= int(units.max()) < self._units_per_layer:
            raise ValueError(
                f"units {units.min()}..{units.max()} of a layer that has {self._units_per_layer}"
            )
        if not are_distinct(units):
            raise ValueError("a batch names a unit twice")
        return layer_id * self._units_per_layer + units

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        """As `unit_keys` makes them, for units of any layers, (N,) uint64."""
        layer_ids, units = np.divmod(ids, self._units_per_layer)
        return (layer_ids << UNIT_ID_BITS | units).astype(np.uint64)
