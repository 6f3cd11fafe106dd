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

from dsatrace.engine.simulator import NO_TOKEN, Turn, simulate_prefixes
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
    hit_tokens = np.zeros(len(replayed.result.hit_tokens), dtype=np.int64)
    num_rejected = prompt_tokens = num_prefill_tokens = num_preemptions = 0
    for live in simulate_prefixes(
        _turns(replayed.requests.as_tokens(), settings.decode, settings.schedule == "in_order"),
        block_size=settings.block_size,
        num_blocks=settings.num_blocks or replayed.trace.num_blocks_at_most,
        max_batch_size=settings.concurrency,
        prefill_chunk=settings.chunk_tokens,
        prefix_caching=settings.prefix_caching,
    ):
        if live.state == "rejected":
            num_rejected += 1
            continue
        hit_tokens[int(live.request_id)] = live.prefix_hit_tokens or 0
        prompt_tokens += live.prompt_len
        num_prefill_tokens += live.num_prefill_tokens
        num_preemptions += live.num_preemptions
    return EngineCheck(
        num_requests=len(hit_tokens),
        num_equal=int((hit_tokens == replayed.result.hit_tokens).sum()),
        num_rejected=num_rejected,
        prompt_tokens=prompt_tokens,
        hit_tokens=int(hit_tokens.sum()),
        replay_hit_tokens=int(replayed.result.hit_tokens.sum()),
        num_prefill_tokens=num_prefill_tokens,
        num_preemptions=num_preemptions,
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
