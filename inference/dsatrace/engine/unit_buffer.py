"""One layer's HBM slots as a store sees them: rows of bytes that units are loaded into and saved from.

On the CPU a store reads and writes the tensor itself. On a GPU the bytes go through a host
buffer, pinned and announced to the store once. Knows neither what lies in which slot nor why.

    buffer = UnitBuffer(latent, unit_tokens=16, store)
    hits = buffer.load(keys, slots)         # (N,) bool: store -> tensor
    stored = buffer.save(keys, slots)       # (N,) bool: tensor -> store
"""

from __future__ import annotations

import numpy as np
import torch

from ..kv.stores.interface import Store


class UnitBuffer:
    """`latent (blocks, block, W)` as slots of `unit_tokens` rows."""

    def __init__(
        self, latent: torch.Tensor, unit_tokens: int, store: Store, *, staged: bool | None = None
    ) -> None:
        """`staged`: through a host buffer, even where the tensor is in host memory."""
        self._store = store
        self._bytes = latent.view(torch.uint8).view(-1, store.unit_bytes)  # (slots, unit_bytes)
        assert unit_tokens * latent.shape[-1] * latent.element_size() == store.unit_bytes
        self._staged = latent.is_cuda if staged is None else staged
        host = self._bytes
        if self._staged:
            host = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=latent.is_cuda)
        self._host = host
        self._rows = host.numpy()
        store.register(self._rows)

    def load(self, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
        hits = self._store.fetch(keys, self._rows, self._host_rows(slots))
        if self._staged:
            self._bytes.index_copy_(
                0, self._on_device(slots), self._host[: len(slots)].to(self._bytes.device)
            )
        return hits

    def save(self, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
        if self._staged:
            self._host[: len(slots)] = self._bytes.index_select(0, self._on_device(slots)).cpu()
        return self._store.put(keys, self._rows, self._host_rows(slots))

    def _host_rows(self, slots: np.ndarray) -> np.ndarray:
        return np.arange(len(slots)) if self._staged else slots

    def _on_device(self, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slots).to(self._bytes.device)
