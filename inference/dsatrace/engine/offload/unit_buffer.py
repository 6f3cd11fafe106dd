"""One layer's HBM slots as the tiers see them: rows of bytes that units are loaded into and saved from.

On the CPU a tier reads and writes the tensor itself. On a GPU the bytes go through a host
buffer, pinned and announced to the tiers once. Knows neither what lies in which slot nor why.

    buffer = UnitBuffer(latent, 16, tiers, layer_id=3)
    served_by = buffer.load(units, slots)   # (N,) int8: tiers -> tensor
    stored = buffer.save(units, slots)      # (N,) bool: tensor -> tiers
"""

from __future__ import annotations

import numpy as np
import torch

from ...kv.stores.stack import TierStack


class UnitBuffer:
    """`latent (blocks, block, W)` as slots of `unit_tokens` rows."""

    def __init__(
        self,
        latent: torch.Tensor,
        unit_tokens: int,
        tiers: TierStack,
        layer_id: int,
        *,
        staged: bool | None = None,
    ) -> None:
        """`staged`: through a host buffer, even where the tensor is in host memory."""
        self._tiers = tiers
        self._layer_id = layer_id
        self._bytes = latent.view(torch.uint8).view(-1, tiers.unit_bytes)  # (slots, unit_bytes)
        assert unit_tokens * latent.shape[-1] * latent.element_size() == tiers.unit_bytes
        self._staged = latent.is_cuda if staged is None else staged
        host = self._bytes
        if self._staged:
            host = torch.empty(self._bytes.shape, dtype=torch.uint8, pin_memory=latent.is_cuda)
        self._host = host
        self._rows = host.numpy()
        tiers.register(self._rows)

    def load(self, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Which tier gave each unit, as `TierStack.fetch` says it; slots of lost ones hold anything."""
        served_by = self._tiers.fetch(self._layer_id, units, self._rows, self._host_rows(slots))
        if self._staged:
            self._bytes.index_copy_(
                0, self._on_device(slots), self._host[: len(slots)].to(self._bytes.device)
            )
        return served_by

    def save(self, units: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Which units a tier has now, (N,) bool."""
        if self._staged:
            self._host[: len(slots)] = self._bytes.index_select(0, self._on_device(slots)).cpu()
        return self._tiers.put(self._layer_id, units, self._rows, self._host_rows(slots))

    def _host_rows(self, slots: np.ndarray) -> np.ndarray:
        return np.arange(len(slots)) if self._staged else slots

    def _on_device(self, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slots).to(self._bytes.device)
