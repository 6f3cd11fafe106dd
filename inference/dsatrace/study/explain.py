"""One trace under every definition of a hit rate in use, to see which one another tool's number is.

Each line has its numerator and denominator. The definitions differ in what they count (tokens,
blocks, requests), in the denominator, in the cache, and in what counts as equal. A published
number that fits a definition is no proof that it was obtained so.

    for line in explain(replayed):
        line.name, line.value, line.numerator, line.denominator
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsatrace.kv.blocks import HIT
from dsatrace.kv.policies.bypass import bypassing_hits
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.replay import replay
from dsatrace.study.measure import ratio, recounted_by_chunk, sharing_fractions
from dsatrace.study.run import Replayed

CHUNK_SIZES = (64, 256, 512, 2048, 8192)
NO_PARTIAL_BLOCKS = "the trace has no ids of partial blocks"
Column = NDArray[np.number] | NDArray[np.bool_]
"""(R,) a number of each request."""


@dataclasses.dataclass(frozen=True)
class Definition:
    """One hit rate, `numerator / denominator`; None if the trace cannot tell, and `formula` says why."""

    name: str
    formula: str
    numerator: float | None
    denominator: float | None
    used_by: str = ""
    mean: float | None = None  # over seeds
    low: float | None = None  # 95 % interval: of the mean over seeds, else of the rate over conversations
    high: float | None = None
    by_request: NDArray[np.number] | None = dataclasses.field(default=None, repr=False, compare=False)
    """(2, R) what both sides are sums of."""

    @classmethod
    def of(cls, name: str, formula: str, part: Column, whole: Column, used_by: str = "") -> Definition:
        """The sums over requests."""
        sums = (part.sum().item(), whole.sum().item())
        return cls(name, formula, *sums, used_by, by_request=np.array([part, whole]))

    @classmethod
    def unknown(cls, name: str, why: str) -> Definition:
        return cls(name, f"unknown: {why}", None, None)

    @property
    def value(self) -> float | None:
        if self.numerator is None or self.denominator is None:
            return None
        return ratio(self.numerator, self.denominator)

    def with_spread(self, entry: Mapping[str, float]) -> Definition:
        """With the mean and the ends of an interval, as far as there are any."""
        return dataclasses.replace(self, mean=entry.get("mean"), low=entry.get("low"), high=entry.get("high"))

    def record(self) -> dict[str, object]:
        """For explain.json."""
        fields = {k: v for k, v in vars(self).items() if k not in ("name", "by_request")}
        return {"value": self.value, **fields}


def explain(replayed: Replayed) -> list[Definition]:
    """Every definition, those of the replayed cache first; raises `ValueError` for a rate above 1."""
    lines = [
        *_over_tokens(replayed),
        *_over_requests(replayed),
        *_over_blocks(replayed),
        *_other_caches(replayed),
        *_sets_of_hashes(replayed),
        *_prompts_alone(replayed),
        *_chunks(replayed),
    ]
    for line in lines:
        if line.value is not None and not 0 <= line.value <= 1 + 1e-9:
            raise ValueError(f"{line.name} is {line.value}; a share lies between 0 and 1")
    return lines


def _over_tokens(replayed: Replayed) -> Iterator[Definition]:
    result, served, line = replayed.result, replayed.result.served, Definition.of
    hit, prompt = result.hit_tokens, replayed.trace.prompt_tokens
    last_half = served & _last_half(prompt)
    later = served & (replayed.requests.turn > 0)
    formula = "hit tokens / prompt tokens, first prefill, served requests"
    yield line("token_weighted", formula, hit * served, prompt * served, "vLLM's hits / queries")
    yield line("token_weighted_with_rejected", "the same over all prompts, rejected ones too", hit, prompt)
    formula = "hit tokens / (prompt + output tokens)"
    yield line("token_weighted_with_outputs", formula, hit * served, replayed.trace.total_tokens * served)
    formula = "with what preempted requests looked up on return"
    hit_again, prompt_again = hit + result.resumed_hit_tokens, prompt + result.resumed_tokens
    yield line("with_preempted", formula, hit_again * served, prompt_again * served)
    formula = "token-weighted, over the last half of the requests"
    yield line("second_half", formula, hit * last_half, prompt * last_half, "simulators with a warm-up")
    yield line("after_turn_0", "token-weighted, without first turns", hit * later, prompt * later)


def _over_requests(replayed: Replayed) -> Iterator[Definition]:
    fractions, served, line = sharing_fractions(replayed), replayed.result.served, Definition.of
    yield line("per_request_mean", "mean of hit / prompt tokens, served requests", fractions, served)
    formula = "the same, a rejected request counts 0"
    yield line("per_request_mean_rejected_as_0", formula, fractions, np.ones_like(served))
    formula = "the same, over requests that hit anything"
    yield line("per_request_mean_of_hits", formula, fractions, fractions > 0)
    formula = "requests that hit anything / served requests"
    yield line("requests_with_a_hit", formula, fractions > 0, served)


def _over_blocks(replayed: Replayed) -> Iterator[Definition]:
    result, size, line = replayed.result, replayed.trace.block_size, Definition.of
    served, num_requests = result.served, len(replayed.requests)
    hit, full = result.hit_tokens * served // size, replayed.trace.prompt_blocks * served
    all_blocks = -(-replayed.trace.prompt_tokens // size) * served
    yield line("blocks_full", "hit blocks / full prompt blocks", hit, full, "block-level simulators")
    formula = "hit blocks / prompt blocks, partial last ones too"
    yield line("blocks_with_partial", formula, hit, all_blocks, "traces of block ids")
    formula = "full prompt blocks cached, contiguous or not / full prompt blocks"
    yield line("blocks_any_position", formula, result.cached_blocks * served, full, "block-level caches")
    events = replayed.accesses
    reused = np.bincount(events["request"][events["kind"] == HIT], minlength=num_requests)
    formula = "reused / (allocated + reused), outputs' blocks too"
    yield line("block_reuse_rate", formula, reused, result.blocks_allocated + reused)
    again = np.ones(len(events), bool)
    again[np.unique(events["key"], return_index=True)[1]] = False
    accesses = np.bincount(events["request"], minlength=num_requests)
    repeated = np.bincount(events["request"][again], minlength=num_requests)
    formula = "1 - different blocks / accesses, outputs' blocks too"
    yield line("repeated_accesses", formula, repeated, accesses)


def _other_caches(replayed: Replayed) -> Iterator[Definition]:
    config = replayed.settings.config(replayed.trace.num_blocks_at_most)
    config = dataclasses.replace(config, record_events=False)
    prompts_only = replay(replayed.trace, dataclasses.replace(config, decode=False))
    infinite, prompt, line = replayed.unlimited.hit_tokens, replayed.trace.prompt_tokens, Definition.of
    formula = "token-weighted, requests end with their prompt"
    yield line("answers_not_cached", formula, prompts_only.hit_tokens, prompt * prompts_only.served)
    formula = "token-weighted, nothing is ever evicted"
    yield line("infinite_cache", formula, infinite, prompt, "ideal hit rates")
    formula = "mean of hit / prompt tokens, nothing is ever evicted"
    yield line("infinite_cache_per_request_mean", formula, infinite / prompt, np.ones_like(prompt))


def _sets_of_hashes(replayed: Replayed) -> Iterator[Definition]:
    """A set of the prompts' block hashes that only grows: the count of a few lines of Python.

    A request's own earlier blocks are in the set too. Unchained, blocks of the same tokens are
    equal, which a trace of block ids does not tell.
    """
    by_token = replayed.requests.tokens_per_id == 1
    for suffix, partial in (("", False), ("_with_partial", True)):
        of_what = "blocks seen before / prompt blocks" + (", partial ones too" if partial else "")
        chained, unchained = f"chained_hashes{suffix}", f"unchained_hashes{suffix}"
        if partial and not _knows_partial_blocks(replayed):
            for name in (chained, unchained):
                yield Definition.unknown(name, NO_PARTIAL_BLOCKS)
            continue
        counts = _num_seen(_prefix_names(replayed, partial))
        formula = f"{of_what}; equal with all before them"
        yield Definition.of(chained, formula, *counts, "sets of hashes")
        if not by_token:
            yield Definition.unknown(unchained, "the trace's ids stand for whole prefixes")
            continue
        counts = _num_seen(_content_names(replayed, partial))
        yield Definition.of(unchained, f"{of_what}; equal by themselves", *counts, "sets of hashes")


def _num_seen(names: Iterable[Iterable[Hashable]]) -> tuple[Column, Column]:
    """How many of each request's names occurred before, and how many there are."""
    seen: set[Hashable] = set()
    counts = []
    for of_request in names:
        known, num_names = len(seen), 0
        for name in of_request:
            num_names += 1
            seen.add(name)
        counts.append((num_names - (len(seen) - known), num_names))
    repeated, total = np.array(counts).T
    return repeated, total


def _prompts_alone(replayed: Replayed) -> Iterator[Definition]:
    """Caches of prompts only, a request at a time, measured once they are warm.

    A prompt's partial last block counts and may be hit, so all of a prompt may be.
    """
    rule = "prompts only, the partial last block counts, last half of the requests: "
    rules = {
        "lru": "LRU; of a prompt longer than the cache its first blocks stay, one less than fit",
        "fifo": "FIFO of any block, the request's own ones too",
        "optimal": "the blocks looked up again first are kept, others left out",
    }
    if not _knows_partial_blocks(replayed):
        yield from (Definition.unknown(f"prompts_{name}", NO_PARTIAL_BLOCKS) for name in rules)
        return
    chains = list(_prefix_names(replayed, partial=True))
    stream = AccessStream.of(chains)
    capacity = replayed.settings.num_blocks or max(1, stream.num_blocks)
    hits = {
        "lru": _lru_hits(chains, capacity),
        "fifo": _fifo_hits(chains, capacity),
        "optimal": bypassing_hits(stream, stream.lengths, capacity),
    }
    prompt = replayed.trace.prompt_tokens
    measured = _last_half(prompt)
    for name, blocks in hits.items():
        tokens = np.minimum(blocks * replayed.trace.block_size, prompt)
        used_by = f"kvcache-simulator 0.1's {name}"
        yield Definition.of(
            f"prompts_{name}", rule + rules[name], tokens * measured, prompt * measured, used_by
        )


def _lru_hits(chains: Iterable[Sequence[Hashable]], capacity: int) -> NDArray[np.int64]:
    """(R,) cached blocks before the first that is not, where the least recent block makes room, a tail first.

    A prompt longer than the cache takes all of it, and then gives up the last block that it inserted.
    """
    cached: OrderedDict[Hashable, None] = OrderedDict()
    hits = []
    for blocks in chains:
        hits.append(_num_leading(blocks, cached))
        for block in blocks[: hits[-1]]:
            del cached[block]
        while cached and len(cached) + len(blocks) > capacity:
            cached.popitem(last=False)
        fits = len(blocks) <= capacity or hits[-1] == capacity
        for block in reversed(blocks[: capacity if fits else capacity - 1]):
            cached[block] = None
    return np.array(hits, np.int64)


def _fifo_hits(chains: Iterable[Sequence[Hashable]], capacity: int) -> NDArray[np.int64]:
    """The same where the oldest block makes room."""
    cached: OrderedDict[Hashable, None] = OrderedDict()
    hits = []
    for blocks in chains:
        hits.append(_num_leading(blocks, cached))
        for block in blocks:
            if block not in cached:
                if len(cached) == capacity:
                    cached.popitem(last=False)
                cached[block] = None
    return np.array(hits, np.int64)


def _num_leading(blocks: Iterable[Hashable], cached: Container[Hashable]) -> int:
    return sum(1 for _ in itertools.takewhile(cached.__contains__, blocks))


def _last_half(requests: NDArray[np.integer]) -> NDArray[np.bool_]:
    return np.arange(len(requests)) >= len(requests) // 2


def _knows_partial_blocks(replayed: Replayed) -> bool:
    """Whether the trace tells the content of the prompts' partial last blocks."""
    requests, trace = replayed.requests, replayed.trace
    in_blocks = requests.tokens_per_id == trace.block_size != 1
    return not in_blocks or np.array_equal(np.diff(requests.prompt_offsets), trace.needed_blocks)


def _prefix_names(replayed: Replayed, partial: bool) -> Iterator[list[Hashable]]:
    """Of each request, for each prompt block a name that stands for it and all before it."""
    trace, requests = replayed.trace, replayed.requests
    in_blocks = requests.tokens_per_id == trace.block_size != 1
    tokens = requests if in_blocks else requests.as_tokens()
    for i, num_full in enumerate(replayed.trace.prompt_blocks.tolist()):
        keys: list[Hashable] = [*trace.keys_of(i)[:num_full]]
        if partial and trace.prompt_tokens[i] % trace.block_size:
            rest = tokens.prompt(i)[num_full if in_blocks else num_full * trace.block_size :]
            keys.append((keys[-1] if keys else None, rest.tobytes()))
        yield keys


def _content_names(replayed: Replayed, partial: bool) -> Iterator[list[Hashable]]:
    """Of each request, each prompt block's tokens."""
    size = replayed.trace.block_size
    for i, num_full in enumerate(replayed.trace.prompt_blocks.tolist()):
        tokens = replayed.requests.prompt(i)
        data = tokens[: len(tokens) if partial else num_full * size].tobytes()
        width = size * tokens.itemsize
        yield [data[at : at + width] for at in range(0, len(data), width)]


def _chunks(replayed: Replayed) -> Iterator[Definition]:
    """A counter that looks up before every prefill chunk. No engine saves work by these hits."""
    for size in CHUNK_SIZES:
        found, prompts, ends = recounted_by_chunk(replayed, size, replayed.result.served)
        name = f"chunks_of_{size}_recounted"
        formula = "full-block tokens before the chunk / prompt tokens, over chunks"
        yield Definition.of(name, formula, found, prompts)
        formula = "full-block tokens before the chunk / tokens up to its end, over chunks"
        yield Definition.of(f"{name}_to_their_end", formula, found, ends)
