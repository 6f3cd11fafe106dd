"""What an engine with prefix caching would find cached: a trace through its scheduler, without a model.

Chunked prefill, decode, growth and preemption are the engine's own; only tokens and times
are made up, by the token simulator. `kv.replay` asks the same of the block pool alone and is
much faster. Where both follow the same rules, one request at a time, their answers are equal:
the engine never computes its last token, so this is `ReplayConfig(schedule="continuous")`.

    turns = [(0.0, [1, 2, 3, 4], [5, 6]), (9.0, [1, 2, 3, 4, 5, 6, 7], [8])]
    [hits.hit_tokens for hits in simulate_prefixes(turns, block_size=2, num_blocks=64)]    # [0, 4]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import Engine, serve
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Admission, Scheduler
from dsatrace.engine.simulator import StepTime, TokenSimulator
from dsatrace.workloads.request import Request

NO_TOKEN = -1
"""Ends answers: no vocabulary has it."""

Turn = tuple[float, Sequence[int], Sequence[int]]
"""Arrival in seconds from the start, token ids of the prompt, token ids of the answer."""


@dataclasses.dataclass(frozen=True)
class PrefixHits:
    """One request. A hit counts where its prefill first begins; what it finds when it comes back
    from a preemption stands apart."""

    rejected: bool  # not even an empty cache holds it
    prompt_tokens: int
    hit_tokens: int
    num_prefill_tokens: int  # computed by prefill, with what preemptions made it compute again
    num_preemptions: int
    resumed_tokens: int  # looked up when it came back: prompt and answer so far
    resumed_hit_tokens: int  # of those

    @classmethod
    def of(cls, live: LiveRequest) -> PrefixHits:
        return cls(
            rejected=live.state == "rejected",
            prompt_tokens=live.prompt_len,
            hit_tokens=live.prefix_hit_tokens or 0,
            num_prefill_tokens=live.num_prefill_tokens,
            num_preemptions=live.num_preemptions,
            resumed_tokens=live.resumed_tokens,
            resumed_hit_tokens=live.resumed_hit_tokens,
        )


def simulate_prefixes(
    turns: Iterable[Turn],
    *,
    block_size: int,
    num_blocks: int,
    max_batch_size: int = 1,
    prefill_chunk: int = 256,
    prefix_caching: bool = True,
    admission: Admission = "continuous",
    step_time: StepTime | None = None,
) -> list[PrefixHits]:
    """The hits of each request, in the order of `turns`, which are sorted by arrival.

    `step_time` says how long a request stays, and so who is served together. A request whose
    answer is empty ends with its prompt.
    """
    answers: dict[str, Sequence[int]] = {}

    def requests() -> Iterator[Request]:
        for i, (arrival_s, prompt, answer) in enumerate(turns):
            answers[f"{i}"] = answer
            num_tokens = max(1, len(answer))  # the first token comes with the prompt and costs no slot
            yield Request(f"{i}", tuple(prompt), num_tokens, arrival_s=arrival_s, stop_at_eos=False)

    pool = new_pool(num_blocks, block_size, prefix_caching)
    runner = TokenSimulator(NO_TOKEN, lambda request: answers[request.request_id], step_time)
    engine = Engine(Scheduler(pool, max_batch_size, prefill_chunk), runner, clock=VirtualClock())
    hits: dict[int, PrefixHits] = {}
    for live in serve(engine, requests()):
        hits[int(live.request_id)] = PrefixHits.of(live)
        del answers[live.request_id]
    return [hits[i] for i in range(len(hits))]
