"""Made-up selections of two kinds, for sizing and timing a trace: they say nothing about any model.

- `clustered`: attention sinks (1/32 of the selection), recent tokens (1/4), hot spots
  that persist (2/3), and noise; a step keeps about 0.85 of the one before it;
- `uniform`: every position alike, each step anew: the worst case for a compressor.

Knows numpy and captures; no file.

    source = SyntheticSelections("clustered", num_layers=61, top_k=2048, seed=0)
    capture = source.capture(seq_len=[32768], step_idx=0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from dsatrace.kv.prefix import RequestPrefix
from dsatrace.trace.capture import StepCapture

Kind = Literal["clustered", "uniform"]
KINDS: tuple[Kind, ...] = ("clustered", "uniform")

SPOT_TOKENS, SPOT_WIDTH = 32, 128  # selected tokens of a hot spot, and the positions they lie in
SPOT_SHARE = 2 / 3  # of the selection
SPOT_CHURN = 0.1  # share of the spots that a step draws anew
NOISE_SHARE = 0.03


class SyntheticSelections:
    """Selections of `num_layers` layers over successive steps; the same seed gives the same ones.

    `shared_layers` use another layer's (see `manifest.shared_layers`).
    """

    def __init__(
        self,
        kind: Kind,
        num_layers: int,
        top_k: int,
        seed: int = 0,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        self._kind = kind
        self._num_layers = num_layers
        self._top_k = top_k
        self._shared_layers = shared_layers or {}
        self._rng = np.random.default_rng(seed)
        self._spots: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # by layer and request

    def capture(
        self,
        seq_len: Sequence[int],  # (B,) positions visible to each request's query
        step_idx: int,
        *,
        request_ids: Sequence[str] = (),
        forward_idx: int | None = None,
        batch_size: int | None = None,
    ) -> StepCapture:
        """One decode step, with scores, as the model thread would hand it over."""
        batch, top_k, layers = len(seq_len), self._top_k, self._num_layers
        positions = np.full((layers, batch, top_k), -1, dtype=np.int32)
        for layer in range(layers):
            for b, visible in enumerate(seq_len):
                chosen = self._choose(layer, b, visible)
                positions[layer, b, : len(chosen)] = self._rng.permutation(chosen)
        scores = -np.sort(-self._rng.normal(2, 1, (layers, batch, top_k)).astype(np.float32))
        stats = np.stack(
            [scores.min(-1), scores.mean(-1), scores.max(-1), self._rng.exponential(0.01, (layers, batch))],
            axis=-1,
        ).astype(np.float32)
        for layer, source in self._shared_layers.items():
            for of_layers in (positions, scores, stats):
                of_layers[layer] = of_layers[source]
        return StepCapture(
            phase="decode",
            request_ids=tuple(request_ids) or tuple(f"r{b}" for b in range(batch)),
            step_idx=(step_idx,) * batch,
            seq_len=np.array(seq_len, dtype=np.int32),
            batch_size=batch if batch_size is None else batch_size,
            positions=positions,
            score_stats=stats,
            scores=scores,
            prefixes=tuple(RequestPrefix(0, f"{self._rng.integers(1 << 62):016x}") for _ in range(batch)),
            forward_idx=step_idx if forward_idx is None else forward_idx,
            step_wall_us=float(self._rng.uniform(20_000, 60_000)),
            step_synced=True,
        )

    def _choose(self, layer: int, request: int, visible: int) -> np.ndarray:
        """min(top_k, visible) distinct positions."""
        if visible <= self._top_k:
            return np.arange(visible)
        if self._kind == "uniform":
            return self._rng.choice(visible, self._top_k, replace=False)
        num_noise = int(self._top_k * NOISE_SHARE)
        wanted = [
            np.arange(self._top_k // 32),
            np.arange(visible - self._top_k // 4, visible),
            self._spot_tokens(layer, request, visible),
        ]
        regular = np.unique(np.concatenate(wanted))
        regular = self._rng.permutation(regular)[: self._top_k - num_noise]
        rest = np.setdiff1d(np.arange(visible), regular, assume_unique=True)
        return np.concatenate([regular, self._rng.choice(rest, self._top_k - len(regular), replace=False)])

    def _spot_tokens(self, layer: int, request: int, visible: int) -> np.ndarray:
        """Tokens of the hot spots, some of which have just been drawn anew."""
        rng, num_spots = self._rng, max(1, int(self._top_k * SPOT_SHARE / SPOT_TOKENS))
        last_start = max(1, visible - SPOT_WIDTH)
        if (layer, request) not in self._spots:
            offsets = rng.random((num_spots, SPOT_WIDTH)).argsort(1)[:, :SPOT_TOKENS]
            self._spots[layer, request] = (rng.integers(last_start, size=num_spots), offsets)
        starts, offsets = self._spots[layer, request]  # (spots,) positions; (spots, tokens) from there
        new = rng.random(num_spots) < SPOT_CHURN
        starts[new] = rng.integers(last_start, size=int(new.sum()))
        tokens = (starts[:, None] + offsets).ravel()
        return tokens[tokens < visible]
