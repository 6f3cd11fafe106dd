"""The KV cache with its latents outside HBM: a step's selected units are fetched before attention reads them.

Block tables and selections stay those of a cache that holds everything; only here, in `resolve`,
a global slot becomes a place in HBM. Attention is given the same rows in the same shapes, so its
results are the same bit for bit. Every layer has a residency map of its own: layers select
different tokens, and a map they shared would move all layers' latents for what one of them wants.

A layer's whole selection is fetched in one batch. Only a prefill chunk may select more than HBM
holds; its rows are then gathered in waves. Knows no request, no scheduler and nothing of where a
store keeps its units.

    tiers = TierStack(store, None, num_layers=61, units_per_layer=512)
    cache = OffloadedCache(model.setup, 512, 16, tiers=tiers, hbm_blocks=64)
    runner = ModelRunner(model, cache, sampler)
    cache.total.missed_units                # all layers, so far
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..errors import UserError
from ..kv.fetches import HBM, NUM_TIERS, FetchCounters, LayerFetch, Transfer, first_touches, layer_fetch
from ..kv.residency import Residency
from ..kv.stores.stack import LOST, TierStack
from ..model.batch import Batch
from ..model.cache import KVCache
from ..model.layers import ModelSetup
from .config import Granularity, PrefetchKind
from .losses import UnitsLost
from .offload_index import OffloadedIndex
from .prefetch import Prefetcher
from .unit_buffer import UnitBuffer

OnFetch = Callable[[LayerFetch], None]
"""Is told each layer's fetch, layers in order."""


def tokens_of_unit(granularity: Granularity, block_size: int) -> int:
    return block_size if granularity == "block" else 1


def unit_bytes(setup: ModelSetup, block_size: int, granularity: Granularity) -> int:
    """Bytes of what a store keeps under one key."""
    row = setup.args.latent_dim * setup.compute_dtype.itemsize
    return row * tokens_of_unit(granularity, block_size)


class OffloadedCache(KVCache):
    """`num_blocks` blocks a layer, of which the latents of `hbm_blocks` are in HBM and all others in `tiers`.

    The tiers have to have room for all units of all layers: what is in HBM may be there as well.
    """

    def __init__(
        self,
        setup: ModelSetup,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        *,
        tiers: TierStack,
        hbm_blocks: int,
        granularity: Granularity = "block",
        policy: str = "lru",
        prefetch: PrefetchKind = "none",
        index_tiers: TierStack | None = None,
        staged: bool | None = None,
    ) -> None:
        """`policy` chooses who leaves HBM. `index_tiers` take the indexer's keys, which else stay in HBM.
        `staged`: see `UnitBuffer`. Raises `UserError` when HBM is to hold nothing."""
        if hbm_blocks < 1:
            raise UserError(f"--hbm-blocks {hbm_blocks}: use at least 1")
        hbm_blocks = min(hbm_blocks, num_blocks)
        super().__init__(
            setup,
            num_blocks,
            block_size,
            device,
            latent_blocks=hbm_blocks,
            index_layers=1 if index_tiers else None,
        )
        self.unit_tokens = tokens_of_unit(granularity, block_size)
        self.unit_bytes = unit_bytes(setup, block_size, granularity)
        if tiers.unit_bytes != self.unit_bytes:
            raise ValueError(f"the tiers keep units of {tiers.unit_bytes} bytes, not {self.unit_bytes}")
        self.tiers = tiers
        self._on_fetch: OnFetch | None = None
        self.counters = [FetchCounters() for _ in self.latent]
        self.peak_units = 0  # most units that one layer of a decode step has selected
        num_units, num_slots = (
            blocks * block_size // self.unit_tokens for blocks in (num_blocks, hbm_blocks)
        )
        self._residency = [Residency(num_units, num_slots, policy) for _ in self.latent]
        self._buffers = [
            UnitBuffer(x, self.unit_tokens, tiers, i, staged=staged) for i, x in enumerate(self.latent)
        ]
        self._prefetcher = Prefetcher(prefetch, len(self.latent), self._prefetch)
        self._tier_of_unit = np.zeros(num_units, dtype=np.int8)  # all HBM but while a layer is resolved
        self._scratch = np.zeros(num_units, dtype=np.int64)
        self.index: OffloadedIndex | None = None
        if index_tiers is not None:
            scales = None if self.index_scale is None else self.index_scale[0]
            self.index = OffloadedIndex(index_tiers, self.index_k[0], scales)
        self._write = _Write.nothing()
        self._in_waves = False  # the layer under way did not fit HBM, so that slots are global

    def write_latent(self, layer_id: int, batch: Batch, latent: torch.Tensor) -> None:  # (N, C + R)
        """A unit whose first token is written anew needs nothing of what it held before."""
        residency, write = self._residency[layer_id], self._write_of(batch)
        rows_of_layer = self.latent[layer_id].view(-1, latent.shape[-1])
        for start, wave in self._waves(write.units):
            fetched = self._bring(layer_id, wave, write.begun)
            self.counters[layer_id].refilled_units += len(fetched)
            residency.mark_dirty(wave)
            places = self._places(layer_id, write.slots, write.slots // self.unit_tokens)
            if len(wave) == len(write.units):
                rows_of_layer.index_copy_(0, self._on_device(places), latent)
            else:
                rows = np.flatnonzero((write.unit_of_row >= start) & (write.unit_of_row < start + len(wave)))
                rows_of_layer.index_copy_(0, self._on_device(places[rows]), latent[self._on_device(rows)])
        if write.is_decode:
            self._prefetcher.start(layer_id)

    def write_index(self, layer_id: int, batch: Batch, key: torch.Tensor, scale: torch.Tensor | None) -> None:
        if self.index is not None:
            self.index.fetch(layer_id, batch)
        super().write_index(layer_id, batch, key, scale)
        if self.index is not None:
            self.index.save(layer_id, batch)

    def resolve(self, layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Where `read_latent` finds what is selected, `(N, K)`: in HBM, which holds it now.

        Raises `UserError` when a decode step selects more units than HBM holds, and `UnitsLost`.
        """
        self._prefetcher.join()
        slots = super().resolve(layer_id, batch, positions).cpu().numpy()
        unit_of = slots // self.unit_tokens  # -1 stays -1
        units, _ = first_touches(unit_of[unit_of >= 0], self._scratch)
        residency, counters = self._residency[layer_id], self.counters[layer_id]
        num_missed = int((~residency.is_resident(units)).sum())
        self._in_waves = len(units) > residency.num_slots
        if self._write.is_decode:
            self._check_capacity(layer_id, len(units))
            self._prefetcher.selected(layer_id, units, num_missed)
            counters.used_units = self._prefetcher.used_units[layer_id]
        counters.requested_units += len(units)
        counters.missed_units += num_missed
        self._fetch_selected(layer_id, units, unit_of if self._write.is_decode else unit_of[-1:])
        if self._in_waves:
            counters.refetched_units -= num_missed  # counted off here, and on again as the waves fetch them
            return self._on_device(slots)
        places = self._places(layer_id, slots, unit_of)
        return self._on_device(np.where(slots < 0, -1, places))

    def read_latent(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """See `KVCache`. Where HBM does not hold all that a chunk selects, fetches it in waves."""
        if not self._in_waves:
            return super().read_latent(layer_id, slots)
        return self.gather(layer_id, slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """Latents `(n, K, C + R)` at any global `slots (n, K)`, as many at a time as HBM holds."""
        residency = self._residency[layer_id]
        flat = slots.cpu().numpy().ravel()
        unit_of = flat // self.unit_tokens
        units = np.unique(unit_of[flat >= 0])
        units = units[np.argsort(~residency.is_resident(units), kind="stable")]  # what is here goes first
        rows = self.latent[layer_id].flatten(0, 1)
        gathered = rows.new_zeros(flat.size, rows.shape[-1])
        for _, wave in self._waves(units):
            self.counters[layer_id].refetched_units += len(self._bring(layer_id, wave))
            in_wave = np.flatnonzero((flat >= 0) & np.isin(unit_of, wave))
            places = self._places(layer_id, flat[in_wave], unit_of[in_wave])
            gathered[self._on_device(in_wave)] = rows.index_select(0, self._on_device(places))
        return gathered.view(*slots.shape, -1)

    def void(self, block_ids: Sequence[int]) -> None:
        """Nobody will read these blocks again as they are: every tier forgets them, none is written back."""
        self._prefetcher.join()
        units_a_block = self.block_size // self.unit_tokens
        units = (np.asarray(block_ids)[:, None] * units_a_block + np.arange(units_a_block)).ravel()
        for layer_id, residency in enumerate(self._residency):
            residency.drop(units)
            self.tiers.drop(layer_id, units)
            if self.index is not None:
                self.index.tiers.drop(layer_id, np.asarray(block_ids))

    @contextlib.contextmanager
    def reporting(self, on_fetch: OnFetch) -> Iterator[None]:
        """Tells of every layer's fetch in the forward run inside."""
        self._on_fetch = on_fetch
        try:
            yield
        finally:
            self._on_fetch = None

    @property
    def total(self) -> FetchCounters:
        """All layers' counters, summed."""
        return sum(self.counters, FetchCounters())

    @property
    def prefetcher(self) -> Prefetcher:
        return self._prefetcher

    def _write_of(self, batch: Batch) -> _Write:
        """Worked out by the first layer of a forward, for all of them."""
        if self._write.batch is not batch:
            self._write = _Write.of(batch, self.unit_tokens)
        return self._write

    def _check_capacity(self, layer_id: int, num_units: int) -> None:
        """Else a decode step would fetch what it has just evicted, over and over."""
        self.peak_units = max(self.peak_units, num_units)
        if num_units <= self._residency[layer_id].num_slots:
            return
        blocks = -(-num_units * self.unit_tokens // self.block_size)
        raise UserError(
            f"a step reads {blocks} blocks of layer {layer_id}, HBM holds {self.latent[0].shape[0]}; "
            f"use --hbm-blocks {blocks} at least, or lower --max-batch-size"
        )

    def _fetch_selected(self, layer_id: int, units: np.ndarray, rows: np.ndarray) -> None:
        """Brings what is selected in one batch, unless waves will; reports it by the `rows`' units (R, K)."""
        if self._on_fetch is None:
            if not self._in_waves:
                self._bring(layer_id, units)
            return
        missing = units[~self._residency[layer_id].is_resident(units)]
        transfer = None
        if self._in_waves:
            self._tier_of_unit[missing] = self.tiers.locate(layer_id, missing)
        else:
            tally = _Tally.of(self, layer_id)
            self._tier_of_unit[missing] = self._bring(layer_id, units)
            transfer = tally.until(_Tally.of(self, layer_id), len(missing))
        fetch = layer_fetch(
            rows,
            self._tier_of_unit,
            transfer,
            self._scratch,
            unit_bytes=self.unit_bytes,
            token_bytes=self.latent_bytes_per_token,
        )
        self._tier_of_unit[missing] = HBM
        self._on_fetch(fetch)

    def _prefetch(self, layer_id: int, units: np.ndarray) -> np.ndarray:
        """Brings what is guessed, as far as a tier has it; returns the units that came."""
        residency = self._residency[layer_id]
        units = units[: residency.num_slots]
        missing = units[~residency.is_resident(units)]
        came = missing[self._bring(layer_id, units, optional=True) != LOST]
        self.counters[layer_id].prefetched_units += len(came)
        return came

    def _waves(self, units: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """As many units at a time as HBM holds, with the index of the first."""
        num_slots = self._residency[0].num_slots
        for start in range(0, len(units), num_slots):
            yield start, units[start : start + num_slots]

    def _places(self, layer_id: int, slots: np.ndarray, unit_of: np.ndarray) -> np.ndarray:
        """Rows of the HBM tensor where global `slots`, of resident units, lie."""
        slot_of = self._residency[layer_id].slot_of
        return slots + (slot_of[unit_of] - unit_of) * self.unit_tokens

    def _on_device(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.latent[0].device)

    def _bring(
        self, layer_id: int, units: np.ndarray, blank: np.ndarray | None = None, optional: bool = False
    ) -> np.ndarray:
        """Makes distinct `units` resident, those in `blank` without bytes.

        Returns the tier that gave each of those that were fetched, in the order of `units`. One that
        no tier has stays away and is `LOST` if it is `optional`; else `UnitsLost` is raised.
        """
        moves = self._residency[layer_id].admit(units)
        if not len(moves.units):
            return np.empty(0, dtype=np.int8)
        wanted = slice(None) if blank is None else ~np.isin(moves.units, blank)
        try:
            self._save(layer_id, moves.victims[moves.victim_dirty], moves.victim_slots[moves.victim_dirty])
            served_by = self._load(layer_id, moves.units[wanted], moves.slots[wanted])
        except BaseException:
            self._residency[layer_id].drop(moves.units)  # they are not where the map says
            raise
        counters = self.counters[layer_id]
        counters.evicted_units += len(moves.victims)
        lost = moves.units[wanted][served_by == LOST]
        if len(lost):
            self._residency[layer_id].drop(lost)
            if not optional:
                raise self._lost(layer_id, lost, "the tiers have lost what was selected")
        return served_by

    def _save(self, layer_id: int, units: np.ndarray, slots: np.ndarray) -> None:
        if not len(units):
            return
        stored = self._buffers[layer_id].save(units, slots)
        self.counters[layer_id].written_units += int(stored.sum())
        if not stored.all():
            raise self._lost(layer_id, units[~stored], "the tiers do not take what leaves HBM")

    def _lost(self, layer_id: int, units: np.ndarray, what: str) -> UnitsLost:
        blocks = frozenset((units * self.unit_tokens // self.block_size).tolist())
        return UnitsLost(layer_id, units, blocks, self.tiers.explain(what))

    def _load(self, layer_id: int, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        if not len(units):
            return np.empty(0, dtype=np.int8)
        served_by = self._buffers[layer_id].load(units, slots)
        self.counters[layer_id].fetched_units += int((served_by != LOST).sum())
        return served_by


@dataclasses.dataclass(frozen=True)
class _Write:
    """Where a forward writes its rows: the same in all layers."""

    batch: Batch | None
    slots: np.ndarray  # (N,) global
    units: np.ndarray  # (U,) distinct, ascending
    unit_of_row: np.ndarray  # (N,) index into `units`
    begun: np.ndarray  # units whose first token is written
    is_decode: bool

    @classmethod
    def of(cls, batch: Batch, unit_tokens: int) -> _Write:
        slots = batch.slots.cpu().numpy()
        units, unit_of_row = np.unique(slots // unit_tokens, return_inverse=True)
        begun = np.unique(slots[slots % unit_tokens == 0] // unit_tokens)
        return cls(batch, slots, units, unit_of_row, begun, all(s.num_rows == 1 for s in batch.segments))

    @classmethod
    def nothing(cls) -> _Write:
        nothing = np.empty(0, dtype=np.int64)
        return cls(None, nothing, nothing, nothing, nothing, False)


@dataclasses.dataclass(frozen=True)
class _Tally:
    """What the tiers have counted so far, HBM's part from the layer's own counters; (T,) each."""

    read_ops: np.ndarray
    evicted_units: np.ndarray
    written_units: np.ndarray
    errors: np.ndarray
    latency_us: np.ndarray

    @classmethod
    def of(cls, cache: OffloadedCache, layer_id: int) -> _Tally:
        counters = cache.counters[layer_id]
        tally = cls(*(np.zeros(NUM_TIERS, dtype=np.int64) for _ in range(4)), np.zeros(NUM_TIERS))
        tally.evicted_units[HBM] = counters.evicted_units
        tally.written_units[HBM] = counters.fetched_units
        for tier, stats in enumerate(cache.tiers.stats()):
            if stats is not None:
                tally.read_ops[tier] = stats.read_ops
                tally.evicted_units[tier] = stats.evicted_units
                tally.written_units[tier] = stats.stored_units
                tally.errors[tier] = stats.errors + stats.corrupt_units
                tally.latency_us[tier] = stats.read_us + stats.write_us
        return tally

    def until(self, later: _Tally, num_units: int) -> Transfer:
        return Transfer(
            read_ops=later.read_ops - self.read_ops,
            evicted_units=later.evicted_units - self.evicted_units,
            written_units=later.written_units - self.written_units,
            errors=later.errors - self.errors,
            latency_us=later.latency_us - self.latency_us,
            num_units=num_units,
        )
