"""The tiers below HBM as one: a local pool, a remote pool, or the first as a cache of the second.

With both, the local pool is a write-back cache: a unit that is put lies there alone until it is
evicted, and a unit fetched from the remote pool is kept there too. The remote pool needs room for all
units that the local one does not hold, better for all: an outdated copy there is not served, but
takes up its room until it is overwritten.

The stack knows which store holds the current version of a unit, and asks no other. A store that fails
costs its units, never a wrong byte and never the run: a `StoreError` becomes a miss or a unit that is
not stored; it is counted by the store and kept in `last_error`. Knows no tensor, no token and no
request.

    stack = TierStack(open_store("ram", 73728, 512), remote, num_layers=61, units_per_layer=4096)
    stored = stack.put(layer_id, units, pool, rows)       # (N,) bool
    tiers = stack.fetch(layer_id, units, pool, rows)      # (N,) int8: LOCAL, REMOTE or LOST
"""

from __future__ import annotations

import threading

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
"""Instead of a tier: no store has this unit."""


class TierStack:
    """Units of all layers in one or two stores, which have no other user.

    Arrays are those of `Store`, but `units (N,)` are distinct ids below `units_per_layer`. Calls may
    come from any thread and are carried out one after another.
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
        """`policy`, one of `TIER_POLICIES`: what the local pool evicts if there is a remote one.

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
        self.read_units = np.zeros(len(TIER_NAMES), dtype=np.int64)  # by tier, as counted here
        self.written_units = np.zeros(len(TIER_NAMES), dtype=np.int64)
        self._num_layers, self._units_per_layer = num_layers, units_per_layer
        num_units = num_layers * units_per_layer
        # By tier and unit id over all layers. This decides; the residency only says what to evict.
        self._is_current = {tier: np.zeros(num_units, dtype=bool) for tier in self._stores}
        self._holds = {tier: np.zeros(num_units, dtype=bool) for tier in self._stores}  # any version
        self._residency: Residency | None = None
        if local is not None and remote is not None:
            room = num_units if local.capacity_units is None else min(local.capacity_units, num_units)
            self._residency = Residency(num_units, room, policy)
        self._scratch = np.empty((0, self.unit_bytes), dtype=np.uint8)  # for write-backs
        self._lock = threading.Lock()

    def fetch(self, layer_id: int, units: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Reads unit i into `out[rows[i]]`. Returns the tier that had it, (N,) int8: LOCAL, REMOTE or LOST.

        Takes at most one batch per store, and one of write-backs to keep the remote units. Rows of
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
        """The tier that would be asked for each unit, (N,) int8; LOST if none is known to have it."""
        with self._lock:
            ids = self._ids(layer_id, units)
            tiers = np.full(len(ids), LOST, dtype=np.int8)
            for tier in reversed(self._stores):
                tiers[self._is_current[tier][ids]] = tier
            return tiers

    def put(self, layer_id: int, units: np.ndarray, data: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Stores `data[rows[i]]` as unit i. Returns which are stored, (N,) bool.

        Older versions are no longer served, even those of units that are not stored.
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
        """Forgets `units`, known or not: no store serves them any more."""
        with self._lock:
            self.last_error = None
            ids = self._ids(layer_id, units)
            for tier in self._stores:
                self._evict(tier, ids[self._holds[tier][ids]])
                self._forget(tier, ids)

    def explain(self, what: str, otherwise: str = "") -> str:
        """`what` happened in the last call, with its cause: a store's failure, else `otherwise`."""
        why = otherwise if self.last_error is None else str(self.last_error)
        return f"{what}: {why}" if why else what

    def register(self, buffer: np.ndarray) -> None:
        """See `Store.register`; raises `StoreError` if a store cannot."""
        for store in self._stores.values():
            store.register(buffer)

    def stats(self) -> tuple[StoreStats | None, ...]:
        """The stores' counts so far by tier, None for HBM and for a tier without a store."""
        stores = [self._stores.get(tier) for tier in range(len(TIER_NAMES))]
        return tuple(None if store is None else store.stats() for store in stores)

    def counts(self, hbm_evicted: int, hbm_written: int) -> TierCounts:
        """The counts so far by tier; HBM's are the caller's."""
        stats = self.stats()

        def column(dtype: type, *names: str) -> np.ndarray:
            return np.array(
                [0 if s is None else sum(getattr(s, name) for name in names) for s in stats], dtype
            )

        read_ops, evicted = column(np.int64, "read_ops"), column(np.int64, "evicted_units")
        written, errors = column(np.int64, "stored_units"), column(np.int64, "errors", "corrupt_units")
        evicted[HBM], written[HBM] = hbm_evicted, hbm_written
        return TierCounts(read_ops, evicted, written, errors, column(np.float64, "read_us", "write_us"))

    def close(self) -> None:
        """Closes the stores, the second even if the first fails to close."""
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

        Resident ones count as used and stay; as many of the others as fit get room, unless the victim
        for one could not be written back.
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
        """Evicts `victims (V,)` from the local pool, after writing back those that lie nowhere else.

        Returns which are gone, (V,) bool.
        """
        self._write_back(victims[~self._is_current[REMOTE][victims]])
        gone: np.ndarray = self._is_current[REMOTE][victims] | ~self._is_current[LOCAL][victims]
        if self._evict(LOCAL, victims[gone]):
            self._is_current[LOCAL][victims[gone]] = False
        else:
            gone = ~self._is_current[LOCAL][victims]
        return gone

    def _write_back(self, ids: np.ndarray) -> None:
        """Copies units from the local pool to the remote one, as many as the two manage."""
        if len(self._scratch) < len(ids):
            self._scratch = np.empty((len(ids), self.unit_bytes), dtype=np.uint8)
        rows = np.arange(len(ids))
        read = np.flatnonzero(self._read(LOCAL, ids, self._scratch, rows))
        self._write(REMOTE, ids[read], self._scratch, read)

    # One batch of one store; an empty batch makes no call.

    def _read(self, tier: int, ids: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The hits, (N,) bool. A unit that misses is lost; after an error the store may still have it."""
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
        """Which are stored, (N,) bool. Of the others the store holds no version, even after an error."""
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
        """Whether the store answered. A unit that it keeps all the same takes up room, but is not served."""
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
        """Ids and rows, (N,) int64; raises `ValueError` before anything has happened."""
        ids = self._ids(layer_id, units)
        return ids, check_batch(self.unit_bytes, self._keys(ids), buffer, rows)

    def _ids(self, layer_id: int, units: np.ndarray) -> np.ndarray:
        """Ids over all layers, (N,) int64."""
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
        """The keys that `unit_keys` makes, for units of any layers, (N,) uint64."""
        layer_ids, units = np.divmod(ids, self._units_per_layer)
        return (layer_ids << UNIT_ID_BITS | units).astype(np.uint64)
