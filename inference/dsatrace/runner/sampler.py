"""From logits to tokens: greedy at temperature 0, else one seeded stream per request.

A stream depends on the seed and the request's id alone, so a request's tokens do not change with its
batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from dsatrace.engine.live import LiveRequest


class Sampler:
    """`sampler(logits (M, V), requests (M,)) -> tokens (M,)`."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._streams: dict[str, torch.Generator] = {}

    def __call__(self, logits: torch.Tensor, requests: Sequence[LiveRequest]) -> list[int]:
        if all(live.request.temperature == 0 for live in requests):
            return logits.argmax(dim=-1).tolist()
        rows = logits.double().cpu()
        return [self._sample(row, live) for row, live in zip(rows, requests, strict=True)]

    def forget(self, request_id: str) -> None:
        """Drops a finished request's stream."""
        self._streams.pop(request_id, None)

    def _sample(self, logits: torch.Tensor, live: LiveRequest) -> int:
        if live.request.temperature == 0:
            return int(logits.argmax())
        # The best logit becomes 0 first, so that no temperature, however small, makes it infinite.
        probabilities = ((logits - logits.max()) / live.request.temperature).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._stream(live.request.request_id)))

    def _stream(self, request_id: str) -> torch.Generator:
        if request_id not in self._streams:
            digest = hashlib.blake2b(f"{self.seed}/{request_id}".encode(), digest_size=8).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            self._streams[request_id] = stream
        return self._streams[request_id]
