"""The same requests through the engine's own scheduler, with the token simulator in place of a model.

The replay gives the hits of a block pool; this gives the hits of the serving engine, with its
chunked prefill, growth, preemption and virtual clock. One request at a time, both follow the
same rules and must agree. With several, the engine's arrivals and step times decide which
requests are live together. Knows no file.

    check = through_the_engine(replayed)
    check.num_equal, check.num_requests
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsatrace.engine.simulated_prefixes import NO_TOKEN, Turn, simulate_prefixes
from dsatrace.study.requests import StudyRequests
from dsatrace.study.run import Replayed


@dataclasses.dataclass(frozen=True)
class EngineCheck:
    """The engine's hits beside the replay's; tokens are those of served requests."""

    num_requests: int
    num_equal: int  # requests whose first prefill hits as many tokens as in the replay
    num_rejected: int
    prompt_tokens: int
    hit_tokens: int
    replay_hit_tokens: int
    num_prefill_tokens: int
    num_preemptions: int

    @property
    def hit_rate(self) -> float:
        """Hit tokens / prompt tokens, at first prefills."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "hit_rate_first_prefill": self.hit_rate}


def through_the_engine(replayed: Replayed) -> EngineCheck:
    """Serves the replay's requests by its settings: block size, blocks, live requests, prefill chunk."""
    settings = replayed.settings
    hits = simulate_prefixes(
        _turns(replayed.requests.as_tokens(), settings.decode, settings.schedule == "in_order"),
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or replayed.trace.num_blocks_at_most,
        max_batch_size=settings.concurrency,
        prefill_chunk=settings.chunk_tokens,
        prefix_caching=settings.prefix_caching,
    )
    served = [found for found in hits if not found.rejected]
    found_tokens = np.array([found.hit_tokens for found in hits])
    return EngineCheck(
        num_requests=len(hits),
        num_equal=int((found_tokens == replayed.result.hit_tokens).sum()),
        num_rejected=len(hits) - len(served),
        prompt_tokens=sum(found.prompt_tokens for found in served),
        hit_tokens=int(found_tokens.sum()),
        replay_hit_tokens=int(replayed.result.hit_tokens.sum()),
        num_prefill_tokens=sum(found.num_prefill_tokens for found in served),
        num_preemptions=sum(found.num_preemptions for found in served),
    )


def _turns(requests: StudyRequests, decode: bool, keeps_last: bool) -> Iterator[Turn]:
    """`keeps_last` adds a token: the in-order replay caches the last token too, which the engine would
    compute only for a token after it."""
    for request in requests:
        answer: list[int] = []
        if decode and request.num_response_tokens:
            # An answer of which only the length is known gets ids of its own.
            made_up = [-2 - request.index] * request.num_response_tokens
            answer = request.response_ids.tolist() or made_up
            answer += [NO_TOKEN] * keeps_last
        yield request.arrival_s, request.prompt_ids.tolist(), answer
