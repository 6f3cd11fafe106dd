"""The KV cache with its latents outside HBM: a step's selected units are fetched before attention reads them.

Block tables and selections are those of a cache that holds everything; only `resolve` turns a
global slot into a place in HBM. Attention gets the same rows in the same shapes, so its results are
equal bit for bit. Each layer has its own residency map, since layers select different tokens.

A layer's whole selection is fetched in one batch. Only a prefill chunk may select more than HBM
holds; its rows are then gathered in waves. Knows no request, no scheduler and no store.

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

from dsatrace.errors import UserError
from dsatrace.kv.tiers.fetches import HBM, FetchCounters, LayerFetch, TierCounts, first_touches, layer_fetch
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.model.batch import Batch
from dsatrace.model.cache import KVCache
from dsatrace.model.layers import ModelSetup
from dsatrace.runner.offload.index_keys import OffloadedIndex
from dsatrace.runner.offload.layer_units import LayerUnits
from dsatrace.runner.offload.prefetch import Prefetcher
from dsatrace.runner.settings import Granularity, PrefetchKind

OnFetch = Callable[[LayerFetch], None]
"""Called with each layer's fetch, in the order of the layers."""


def tokens_of_unit(granularity: Granularity, block_size: int) -> int:
    return block_size if granularity == "block" else 1


def unit_bytes(setup: ModelSetup, block_size: int, granularity: Granularity) -> int:
    """Bytes that a store keeps under one key."""
    row = setup.args.latent_dim * setup.compute_dtype.itemsize
    return row * tokens_of_unit(granularity, block_size)


class OffloadedCache(KVCache):
    """`num_blocks` blocks per layer: the latents of `hbm_blocks` are in HBM, all others in `tiers`.

    The tiers need room for all units of all layers, since a unit in HBM may be there as well.
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
        """`policy` chooses what leaves HBM. `index_tiers` take the indexer's keys, which else stay in HBM.
        `staged`: see `LayerUnits`. Raises `UserError` when HBM is to hold nothing."""
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
        num_units = num_blocks * block_size // self.unit_tokens
        self.tiers = tiers
        self.hbm_blocks = hbm_blocks
        self.layers = [
            LayerUnits(i, x, self.unit_tokens, tiers, num_units=num_units, policy=policy, staged=staged)
            for i, x in enumerate(self.latent)
        ]
        self.index: OffloadedIndex | None = None
        if index_tiers is not None:
            scales = None if self.index_scale is None else self.index_scale[0]
            self.index = OffloadedIndex(index_tiers, self.index_k[0], scales, self.indexer_layers)
        self.prefetcher = Prefetcher(prefetch, len(self.latent), lambda i, units: self.layers[i].guess(units))
        self.peak_units = 0  # most units that a decode step has selected in one layer
        self._on_fetch: OnFetch | None = None
        self._tier_of_unit = np.zeros(num_units, dtype=np.int8)  # all HBM but while a layer is resolved
        self._scratch = np.zeros(num_units, dtype=np.int64)
        self._write: _Write | None = None  # of the forward under way
        self._in_waves = False  # the layer under way does not fit HBM, so that its slots are global

    def write_latent(self, layer_id: int, batch: Batch, latent: torch.Tensor) -> None:  # (N, C + R)
        """A unit whose first token is written is not fetched: what it held before is void."""
        layer, write = self.layers[layer_id], self._write_of(batch)
        rows_of_layer = self.latent[layer_id].view(-1, latent.shape[-1])
        for start, wave in layer.waves(write.units):
            layer.counters.refilled_units += len(layer.bring(wave, write.begun))
            layer.written(wave)
            places = layer.places(write.slots, write.slots // self.unit_tokens)
            if len(wave) == len(write.units):
                rows_of_layer.index_copy_(0, self._on_device(places), latent)
            else:
                rows = np.flatnonzero((write.unit_of_row >= start) & (write.unit_of_row < start + len(wave)))
                rows_of_layer.index_copy_(0, self._on_device(places[rows]), latent[self._on_device(rows)])
        if write.is_decode:
            self.prefetcher.start(layer_id)

    def write_index(self, layer_id: int, batch: Batch, key: torch.Tensor, scale: torch.Tensor | None) -> None:
        if self.index is not None:
            self.index.fetch(layer_id, batch)
        super().write_index(layer_id, batch, key, scale)
        if self.index is not None:
            self.index.save(layer_id, batch)

    def resolve(self, layer_id: int, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Fetches what is selected; returns where `read_latent` finds it in HBM, `(N, K)`.

        Raises `UserError` when a decode step selects more units than HBM holds, and `UnitsLost`.
        """
        self.prefetcher.join()
        slots = super().resolve(layer_id, batch, positions).cpu().numpy()
        layer, is_decode = self.layers[layer_id], self._write_of(batch).is_decode
        unit_of = slots // self.unit_tokens  # -1 stays -1
        units, _ = first_touches(unit_of[unit_of >= 0], self._scratch)
        num_missed = int((~layer.is_here(units)).sum())
        self._in_waves = len(units) > layer.num_slots
        layer.counters.requested_units += len(units)
        layer.counters.missed_units += num_missed
        if is_decode:
            self._check_capacity(layer_id, len(units))
            self.prefetcher.selected(layer_id, units, num_missed)
            layer.counters.used_units = self.prefetcher.used_units[layer_id]
        self._fetch_selected(layer, units, unit_of if is_decode else unit_of[-1:])
        if self._in_waves:
            layer.counters.refetched_units -= num_missed  # the waves count these units again
            return self._on_device(slots)
        return self._on_device(np.where(slots < 0, -1, layer.places(slots, unit_of)))

    def read_latent(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """See `KVCache`. Fetches in waves where HBM does not hold all that a chunk selects."""
        if not self._in_waves:
            return super().read_latent(layer_id, slots)
        return self.gather(layer_id, slots)

    def gather(self, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
        """Latents `(n, K, C + R)` at any global `slots (n, K)`, as many at a time as HBM holds."""
        layer = self.layers[layer_id]
        flat = slots.cpu().numpy().ravel()
        unit_of = flat // self.unit_tokens
        units = np.unique(unit_of[flat >= 0])
        units = units[np.argsort(~layer.is_here(units), kind="stable")]  # first those that are here
        rows = self.latent[layer_id].flatten(0, 1)
        gathered = rows.new_zeros(flat.size, rows.shape[-1])
        for _, wave in layer.waves(units):
            layer.counters.refetched_units += len(layer.bring(wave))
            in_wave = np.flatnonzero((flat >= 0) & np.isin(unit_of, wave))
            places = layer.places(flat[in_wave], unit_of[in_wave])
            gathered[self._on_device(in_wave)] = rows.index_select(0, self._on_device(places))
        return gathered.view(*slots.shape, -1)

    def void(self, block_ids: Sequence[int]) -> None:
        """These blocks will not be read again: every tier forgets them, none is written back."""
        self.prefetcher.wait()
        blocks, units_a_block = np.asarray(block_ids, dtype=np.int64), self.block_size // self.unit_tokens
        units = (blocks[:, None] * units_a_block + np.arange(units_a_block)).ravel()
        for layer in self.layers:
            layer.drop(units)
        if self.index is not None:
            self.index.drop(blocks)

    @contextlib.contextmanager
    def reporting(self, on_fetch: OnFetch) -> Iterator[None]:
        """Calls `on_fetch` for every layer of the forward run inside."""
        self._on_fetch = on_fetch
        try:
            yield
        finally:
            self._on_fetch = None

    @property
    def total(self) -> FetchCounters:
        """All layers' counters, summed."""
        return sum((layer.counters for layer in self.layers), FetchCounters())

    def _write_of(self, batch: Batch) -> _Write:
        """Computed by the first layer of a forward, for all layers."""
        if self._write is None or self._write.batch is not batch:
            self.prefetcher.join()  # a failed forward may have left a guess
            self._write = _Write.of(batch, self.unit_tokens)
        return self._write

    def _check_capacity(self, layer_id: int, num_units: int) -> None:
        """More units than HBM holds would be fetched and evicted in turn, over and over."""
        self.peak_units = max(self.peak_units, num_units)
        if num_units > self.layers[layer_id].num_slots:
            blocks = -(-num_units * self.unit_tokens // self.block_size)
            raise UserError(
                f"a step reads {blocks} blocks of layer {layer_id}, HBM holds {self.hbm_blocks}; "
                f"use --hbm-blocks {blocks} at least, or lower --max-batch-size"
            )

    def _fetch_selected(self, layer: LayerUnits, units: np.ndarray, rows: np.ndarray) -> None:
        """Brings what is selected in one batch, unless waves will; reports the units (R, K) of `rows`."""
        if self._on_fetch is None:
            if not self._in_waves:
                layer.bring(units)
            return
        missing = units[~layer.is_here(units)]
        moved = None
        if self._in_waves:
            self._tier_of_unit[missing] = layer.locate(missing)
        else:
            before = self._counts(layer)
            self._tier_of_unit[missing] = layer.bring(units)
            moved = self._counts(layer) - before
        fetch = layer_fetch(
            rows,
            self._tier_of_unit,
            self._scratch,
            moved,
            num_fetched=len(missing),
            unit_bytes=self.unit_bytes,
            token_bytes=self.latent_bytes_per_token,
        )
        self._tier_of_unit[missing] = HBM
        self._on_fetch(fetch)

    def _counts(self, layer: LayerUnits) -> TierCounts:
        counters = layer.counters
        return self.tiers.counts(counters.evicted_units, counters.fetched_units)

    def _on_device(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(indices).to(self.latent[0].device)


@dataclasses.dataclass(frozen=True)
class _Write:
    """Where a forward writes its rows: the same in all layers."""

    batch: Batch
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
