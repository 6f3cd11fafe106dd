"""From logits to tokens: greedy at temperature 0, else one seeded stream per request.

A stream depends on the seed and the request's id alone, so a request's tokens do not change with its
batch. An end of sequence that comes before `min_new_tokens` is drawn as any token is, and then once more
without the stop tokens: so all tokens before it are those of a run without the limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from dsatrace.engine.live import LiveRequest


class Sampler:
    """`sampler(logits (M, V), requests (M,)) -> tokens (M,)`."""

    def __init__(
        self, seed: int = 0, stop_tokens: frozenset[int] = frozenset(), min_new_tokens: int = 0
    ) -> None:
        self.seed = seed
        self.stop_tokens = stop_tokens
        self.min_new_tokens = min_new_tokens
        self._streams: dict[str, torch.Generator] = {}

    def __call__(self, logits: torch.Tensor, requests: Sequence[LiveRequest]) -> list[int]:
        if all(live.request.temperature == 0 for live in requests):
            rows, tokens = logits, logits.argmax(dim=-1).tolist()
        else:
            rows = logits.double().cpu()
            tokens = [self._sample(row, live) for row, live in zip(rows, requests, strict=True)]
        for i, live in enumerate(requests):
            if live.num_answered < self.min_new_tokens and tokens[i] in self.stop_tokens:
                live.answer_end = live.num_answered if live.answer_end is None else live.answer_end
                tokens[i] = self._sample(self._without_stops(rows[i]), live)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drops a finished request's stream."""
        self._streams.pop(request_id, None)

    def _without_stops(self, logits: torch.Tensor) -> torch.Tensor:
        stops = [token for token in self.stop_tokens if token < len(logits)]
        return logits.index_fill(0, torch.tensor(stops, device=logits.device), -torch.inf)

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
