"""The KV cache with its latents outside HBM: a step's selected units are fetched where attention reads them.

Block tables, slots and selections stay those of a cache that holds everything; only here,
below `resolve`, a global slot becomes a place in HBM. Attention is given the same rows in
the same shapes, so its results are the same bit for bit. Indexer keys stay resident. Every
layer has a residency map of its own: layers select different tokens, and a map they shared
would move all layers' latents for what one of them wants.

Before attention reads, the layer's whole selection is fetched in one batch. Only a prefill
chunk may select more than HBM holds; its rows are then gathered in waves. Knows no request,
no scheduler and nothing of where a store keeps its units.

    store = MemoryStore(unit_bytes(model.setup, 16, "block"))
    cache = OffloadedCache(model.setup, 512, 16, store=store, hbm_blocks=64)
    runner = ModelRunner(model, cache, sampler)
    cache.counters[0].bytes_read            # layer 0, so far
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from ..errors import UserError
from ..kv.fetches import FetchCounters, LayerFetch, SelectedUnits, layer_fetch, num_runs
from ..kv.residency import Residency
from ..kv.stores.interface import Store, unit_keys
from ..model.batch import Batch
from ..model.cache import KVCache
from ..model.layers import ModelSetup
from .unit_buffer import UnitBuffer

Granularity = Literal["block", "row"]
"""What moves as one: a block of one layer, or a row, one token of one layer."""

OnFetch = Callable[[LayerFetch], None]
"""Called once a layer and forward, before anything is fetched for it."""


class UnitsLost(RuntimeError):
    """The store does not give back, or did not take, units that lie nowhere else; they are void."""

    def __init__(self, layer_id: int, units: np.ndarray, what: str) -> None:
        super().__init__(f"layer {layer_id}: the store {what} {len(units)} units, unit {units[0]} first")
        self.layer_id = layer_id
        self.units = units


def tokens_of_unit(granularity: Granularity, block_size: int) -> int:
    return block_size if granularity == "block" else 1


def unit_bytes(setup: ModelSetup, block_size: int, granularity: Granularity) -> int:
    """Bytes of what a store keeps under one key."""
    row = setup.args.latent_dim * setup.compute_dtype.itemsize
    return row * tokens_of_unit(granularity, block_size)


class OffloadedCache(KVCache):
    """`num_blocks` blocks a layer, of which the latents of `hbm_blocks` are in HBM and all others in `store`.

    The store has to have room for all units of all layers: what is in HBM may be there as well.
    """

    def __init__(
        self,
        setup: ModelSetup,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        *,
        store: Store,
        hbm_blocks: int,
        granularity: Granularity = "block",
        staged: bool | None = None,
    ) -> None:
        """`staged`: see `UnitBuffer`. Raises `UserError` when HBM is to hold nothing."""
        if hbm_blocks < 1:
            raise UserError(f"--hbm-blocks {hbm_blocks}: use at least 1")
        hbm_blocks = min(hbm_blocks, num_blocks)
        super().__init__(setup, num_blocks, block_size, device, latent_blocks=hbm_blocks)
        self.unit_tokens = tokens_of_unit(granularity, block_size)
        self.unit_bytes = unit_bytes(setup, block_size, granularity)
        if store.unit_bytes != self.unit_bytes:
            raise ValueError(f"the store keeps units of {store.unit_bytes} bytes, not {self.unit_bytes}")
        units_a_block = block_size // self.unit_tokens
        self.on_fetch: OnFetch | None = None
        self.counters = [FetchCounters() for _ in self.latent]
        self.peak_units = 0  # most units that one layer of a decode step has selected
        self._residency = [
            Residency(num_blocks * units_a_block, hbm_blocks * units_a_block) for _ in self.latent
        ]
        self._buffers = [UnitBuffer(x, self.unit_tokens, store, staged=staged) for x in self.latent]

    def write_latent(self, layer_id: int, batch: Batch, latent: torch.Tensor) -> None:  # (N, C + R)
        """A unit whose first token is written anew needs nothing of what it held before."""
        residency = self._residency[layer_id]
        slots = batch.slots.cpu().numpy()
        units, unit_of_row = np.unique(slots // self.unit_tokens, return_inverse=True)
        begun = np.unique(slots[slots % self.unit_tokens == 0] // self.unit_tokens)
        rows_of_layer = self.latent[layer_id].view(-1, latent.shape[-1])
        for start, wave in self._waves(units):
            fetched = self._bring(layer_id, wave, blank=begun)
            self.counters[layer_id].refilled_units += fetched
            residency.mark_dirty(wave)
            rows = np.flatnonzero((unit_of_row >= start) & (unit_of_row < start + len(wave)))
            places = self._places(residency.slot_of, slots[rows])
            chosen = latent if len(rows) == len(slots) else latent[self._on_device(rows)]
            rows_of_layer.index_copy_(0, self._on_device(places), chosen)

    def resolve(self, layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Global slots `(N, K)`, as ever; what they name is in HBM now, unless a prefill wants too much.

        Raises `UserError` when a decode step selects more units than HBM holds.
        """
        slots = super().resolve(layer_id, batch, positions)
        residency, counters = self._residency[layer_id], self.counters[layer_id]
        selected = SelectedUnits.of(
            slots.cpu().numpy(), batch.row_to_request.cpu().numpy(), len(batch.segments), self.unit_tokens
        )
        fetch = layer_fetch(layer_id, selected, ~residency.is_resident(selected.units))
        if self.on_fetch is not None:
            self.on_fetch(fetch)
        counters.requested_units += fetch.num_units
        counters.missed_units += fetch.num_missed
        counters.bytes_useful += int(fetch.charged_tokens.sum()) * self.latent_bytes_per_token
        if all(segment.num_rows == 1 for segment in batch.segments):
            self.peak_units = max(self.peak_units, fetch.num_units)
            self._check_capacity(layer_id, fetch.num_units)
        if fetch.num_units <= residency.num_slots:
            self._bring(layer_id, selected.units)
        else:  # counted off here, and on again unit by unit as `read_latent` fetches them
            counters.refetched_units -= fetch.num_missed
        return slots

    def read_latent(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """See `KVCache`. Fetches in waves what is not resident, when `resolve` could not."""
        residency = self._residency[layer_id]
        host = slots.cpu().numpy()
        missing = ~residency.is_resident(np.maximum(host, 0) // self.unit_tokens) & (host >= 0)
        if not missing.any():
            places = np.where(host < 0, 0, self._places(residency.slot_of, np.maximum(host, 0)))
            return super().read_latent(layer_id, self._on_device(places))
        units = np.unique(host[host >= 0] // self.unit_tokens)
        units = units[np.argsort(~residency.is_resident(units), kind="stable")]  # what is here goes first
        rows = self.latent[layer_id].flatten(0, 1)
        gathered = rows.new_zeros(host.size, rows.shape[-1])
        flat = host.ravel()
        for _, wave in self._waves(units):
            self.counters[layer_id].refetched_units += self._bring(layer_id, wave)
            in_wave = np.flatnonzero((flat >= 0) & np.isin(flat // self.unit_tokens, wave))
            places = self._places(residency.slot_of, flat[in_wave])
            gathered[self._on_device(in_wave)] = rows.index_select(0, self._on_device(places))
        return gathered.view(*host.shape, -1)

    @property
    def total(self) -> FetchCounters:
        """All layers' counters, summed."""
        return sum(self.counters, FetchCounters())

    def _check_capacity(self, layer_id: int, num_units: int) -> None:
        """Else a decode step would fetch what it has just evicted, over and over."""
        if num_units <= self._residency[layer_id].num_slots:
            return
        blocks = -(-num_units * self.unit_tokens // self.block_size)
        raise UserError(
            f"a decode step reads {blocks} blocks of layer {layer_id}, HBM holds {self.latent[0].shape[0]}; "
            f"use --hbm-blocks {blocks} at least, or lower --max-batch-size"
        )

    def _waves(self, units: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """As many units at a time as HBM holds, with the index of the first."""
        num_slots = self._residency[0].num_slots
        for start in range(0, len(units), num_slots):
            yield start, units[start : start + num_slots]

    def _places(self, slot_of: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Rows of the HBM tensor where resident global `slots` lie."""
        unit, offset = np.divmod(slots, self.unit_tokens)
        return slot_of[unit] * self.unit_tokens + offset

    def _on_device(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.latent[0].device)

    def _bring(self, layer_id: int, units: np.ndarray, blank: np.ndarray | None = None) -> int:
        """Makes distinct `units` resident, those in `blank` without bytes. Returns how many were fetched."""
        moves = self._residency[layer_id].admit(units)
        wanted = np.ones(len(moves.units), dtype=bool) if blank is None else ~np.isin(moves.units, blank)
        self.counters[layer_id].evicted_units += len(moves.victims)
        try:
            self._save(layer_id, moves.victims[moves.victim_dirty], moves.victim_slots[moves.victim_dirty])
            self._load(layer_id, moves.units[wanted], moves.slots[wanted])
        except BaseException:
            self._residency[layer_id].drop(moves.units)  # they are not where the map says
            raise
        return int(wanted.sum())

    def _save(self, layer_id: int, units: np.ndarray, slots: np.ndarray) -> None:
        if not len(units):
            return
        started = time.perf_counter()
        stored = self._buffers[layer_id].save(unit_keys(layer_id, units), slots)
        counters = self.counters[layer_id]
        counters.write_us += (time.perf_counter() - started) * 1e6
        counters.write_batches += 1
        counters.written_units += int(stored.sum())
        counters.bytes_written += int(stored.sum()) * self.unit_bytes
        if not stored.all():
            raise UnitsLost(layer_id, units[~stored], "has no room for")

    def _load(self, layer_id: int, units: np.ndarray, slots: np.ndarray) -> None:
        if not len(units):
            return
        started = time.perf_counter()
        hits = self._buffers[layer_id].load(unit_keys(layer_id, units), slots)
        counters = self.counters[layer_id]
        counters.read_us += (time.perf_counter() - started) * 1e6
        counters.read_batches += 1
        counters.read_ops += num_runs(units)
        counters.fetched_units += int(hits.sum())
        counters.bytes_read += int(hits.sum()) * self.unit_bytes
        if not hits.all():
            raise UnitsLost(layer_id, units[~hits], "no longer holds")
