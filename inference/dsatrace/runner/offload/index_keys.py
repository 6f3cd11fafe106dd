"""The indexer's keys outside HBM: a layer's keys are fetched before its indexer scans them.

The indexer reads every key of a context, so nothing is selected and nothing is kept: HBM holds one
layer's keys at a time, in a tensor that all layers share. Every layer of every forward fetches its
requests' blocks and puts back those that were written to. A unit is a block's keys, then its
scales. Knows no request and no store.

    index = OffloadedIndex(tiers, keys, scales, layers=range(61))
    index.fetch(layer_id, batch); ...; index.save(layer_id, batch)      # around the write of new keys
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from dsatrace.kv.tiers.stack import LOST, TierStack
from dsatrace.model.batch import Batch
from dsatrace.runner.offload.layer_units import UnitsLost


class OffloadedIndex:
    """`keys (num_blocks, block, D)` and, with fp8, `scales (num_blocks, block)` hold one layer at a time.

    `layers` are those that have an indexer; the tiers need room for no others.
    """

    def __init__(
        self, tiers: TierStack, keys: torch.Tensor, scales: torch.Tensor | None, layers: Iterable[int]
    ) -> None:
        self.tiers = tiers
        self._number = {layer: i for i, layer in enumerate(layers)}  # what the tiers call a layer
        num_blocks, self._block_size = keys.shape[:2]
        self._parts = [x.view(num_blocks, -1).view(torch.uint8) for x in (keys, scales) if x is not None]
        self._widths = [part.shape[1] for part in self._parts]
        assert sum(self._widths) == tiers.unit_bytes
        self._host = torch.empty(num_blocks, tiers.unit_bytes, dtype=torch.uint8, pin_memory=keys.is_cuda)
        self._rows = self._host.numpy()
        tiers.register(self._rows)

    def fetch(self, layer_id: int, batch: Batch) -> None:
        """Brings the keys of all earlier tokens of the batch's requests; raises `UnitsLost`."""
        tables = [
            segment.blocks[: -(-segment.first_pos // self._block_size)].cpu().numpy()
            for segment in batch.segments
        ]
        blocks = np.unique(np.concatenate(tables))
        if not len(blocks):
            return
        served_by = self.tiers.fetch(self._number[layer_id], blocks, self._rows, np.arange(len(blocks)))
        self._require(layer_id, blocks, served_by != LOST, "the tiers have lost indexer keys")
        where = torch.from_numpy(blocks)
        pieces = self._host[: len(blocks)].split(self._widths, dim=1)
        for part, piece in zip(self._parts, pieces, strict=True):
            part.index_copy_(0, where.to(part.device), piece.to(part.device))

    def save(self, layer_id: int, batch: Batch) -> None:
        """Puts the blocks that the batch has written to; raises `UnitsLost`."""
        blocks = np.unique(batch.slots.cpu().numpy() // self._block_size)
        where = torch.from_numpy(blocks)
        pieces = [part.index_select(0, where.to(part.device)).cpu() for part in self._parts]
        torch.cat(pieces, dim=1, out=self._host[: len(blocks)])
        stored = self.tiers.put(self._number[layer_id], blocks, self._rows, np.arange(len(blocks)))
        self._require(layer_id, blocks, stored, "the tiers do not take indexer keys", "they are full")

    def drop(self, blocks: np.ndarray) -> None:
        """What they hold is void, in every layer."""
        for number in self._number.values():
            self.tiers.drop(number, blocks)

    def _require(
        self, layer_id: int, blocks: np.ndarray, moved: np.ndarray, what: str, otherwise: str = ""
    ) -> None:
        """Raises `UnitsLost` unless all `blocks (N,)` were `moved (N,)`."""
        lost = blocks[~moved]
        if len(lost):
            raise UnitsLost(layer_id, lost, frozenset(lost.tolist()), self.tiers.explain(what, otherwise))
