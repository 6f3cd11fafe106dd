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
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dsatrace.kv.policies.bypass import bypassing_hits
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.replay import replay
from dsatrace.study.measure import Mask, ratio, recounted_by_chunk, sharing_fractions
from dsatrace.study.run import Replayed

CHUNK_SIZES = (64, 256, 512, 2048, 8192)
NO_PARTIAL_BLOCKS = "unknown: the trace has no ids of partial blocks"


@dataclasses.dataclass(frozen=True)
class Definition:
    """One hit rate, `numerator / denominator`; None if the trace cannot tell, and `formula` says why."""

    name: str
    formula: str
    numerator: float | None
    denominator: float | None
    used_by: str = ""

    @property
    def value(self) -> float | None:
        if self.numerator is None or self.denominator is None:
            return None
        return ratio(self.numerator, self.denominator)

    def record(self) -> dict[str, object]:
        """For explain.json."""
        return {"value": self.value, **{k: v for k, v in dataclasses.asdict(self).items() if k != "name"}}


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
    result, served = replayed.result, replayed.result.served
    hit, prompt = result.hit_tokens, replayed.trace.prompt_tokens
    everyone = np.ones(len(served), bool)
    formula = "hit tokens / prompt tokens, first prefill, served requests"
    yield _summed("token_weighted", formula, hit, prompt, served, "vLLM's hits / queries")
    formula = "the same over all prompts, rejected ones too"
    yield _summed("token_weighted_with_rejected", formula, hit, prompt, everyone)
    formula = "hit tokens / (prompt + output tokens)"
    yield _summed("token_weighted_with_outputs", formula, hit, replayed.trace.total_tokens, served)
    formula = "with what preempted requests looked up on return"
    hit_again, prompt_again = hit + result.resumed_hit_tokens, prompt + result.resumed_tokens
    yield _summed("with_preempted", formula, hit_again, prompt_again, served)
    formula, chosen = "token-weighted, over the last half of the requests", served & _last_half(prompt)
    yield _summed("second_half", formula, hit, prompt, chosen, "simulators with a warm-up")
    formula = "token-weighted, without first turns"
    yield _summed("after_turn_0", formula, hit, prompt, served & (replayed.requests.turn > 0))


def _summed(
    name: str,
    formula: str,
    part: NDArray[np.integer],
    whole: NDArray[np.integer],
    chosen: Mask,
    used_by: str = "",
) -> Definition:
    """Sums over the `chosen` requests."""
    return Definition(name, formula, int(part[chosen].sum()), int(whole[chosen].sum()), used_by)


def _over_requests(replayed: Replayed) -> Iterator[Definition]:
    fractions, served = sharing_fractions(replayed), int(replayed.result.served.sum())
    total, hit = float(fractions.sum()), int((fractions > 0).sum())
    yield Definition("per_request_mean", "mean of hit / prompt tokens, served requests", total, served)
    formula = "the same, a rejected request counts 0"
    yield Definition("per_request_mean_rejected_as_0", formula, total, len(fractions))
    yield Definition("per_request_mean_of_hits", "the same, over requests that hit anything", total, hit)
    yield Definition("requests_with_a_hit", "requests that hit anything / served requests", hit, served)


def _over_blocks(replayed: Replayed) -> Iterator[Definition]:
    result, size = replayed.result, replayed.trace.block_size
    served = result.served
    hit = int(result.hit_tokens[served].sum()) // size
    full = int(replayed.trace.prompt_blocks[served].sum())
    all_blocks = int((-(-replayed.trace.prompt_tokens[served] // size)).sum())
    yield Definition("blocks_full", "hit blocks / full prompt blocks", hit, full, "block-level simulators")
    formula = "hit blocks / prompt blocks, partial last ones too"
    yield Definition("blocks_with_partial", formula, hit, all_blocks, "traces of block ids")
    formula = "full prompt blocks cached, contiguous or not / full prompt blocks"
    cached = int(result.cached_blocks[served].sum())
    yield Definition("blocks_any_position", formula, cached, full, "block-level caches")
    reused = result.num_hit_blocks
    formula = "reused / (allocated + reused), outputs' blocks too"
    yield Definition("block_reuse_rate", formula, reused, result.num_blocks_allocated + reused)
    accesses = int(result.key_accesses.sum())
    formula = "1 - different blocks / accesses, outputs' blocks too"
    yield Definition("repeated_accesses", formula, accesses - result.num_unique_keys, accesses)


def _other_caches(replayed: Replayed) -> Iterator[Definition]:
    config = replayed.settings.config(replayed.trace.num_blocks_at_most)
    config = dataclasses.replace(config, record_events=False)
    prompts_only = replay(replayed.trace, dataclasses.replace(config, decode=False))
    infinite, prompt = replayed.unlimited.hit_tokens, replayed.trace.prompt_tokens
    formula = "token-weighted, requests end with their prompt"
    yield _summed("answers_not_cached", formula, prompts_only.hit_tokens, prompt, prompts_only.served)
    formula = "token-weighted, nothing is ever evicted"
    yield _summed("infinite_cache", formula, infinite, prompt, np.ones(len(prompt), bool), "ideal hit rates")
    formula = "mean of hit / prompt tokens, nothing is ever evicted"
    mean = float((infinite / prompt).sum())
    yield Definition("infinite_cache_per_request_mean", formula, mean, len(prompt))


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
            yield Definition(chained, NO_PARTIAL_BLOCKS, None, None)
            yield Definition(unchained, NO_PARTIAL_BLOCKS, None, None)
            continue
        seen, total = _num_seen(itertools.chain.from_iterable(_prefixes(replayed, partial)))
        yield Definition(chained, f"{of_what}; equal with all before them", seen, total, "sets of hashes")
        if not by_token:
            yield Definition(unchained, "unknown: the trace's ids stand for whole prefixes", None, None)
            continue
        seen, total = _num_seen(_content_names(replayed, partial))
        yield Definition(unchained, f"{of_what}; equal by themselves", seen, total, "sets of hashes")


def _num_seen(names: Iterator[Hashable]) -> tuple[int, int]:
    """How many of the names occurred before, and how many there are."""
    seen: set[Hashable] = set()
    num_names = 0
    for name in names:
        num_names += 1
        seen.add(name)
    return num_names - len(seen), num_names


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
        yield from (Definition(f"prompts_{name}", NO_PARTIAL_BLOCKS, None, None) for name in rules)
        return
    chains = list(_prefixes(replayed, partial=True))
    stream = AccessStream.of(chains)
    capacity = replayed.settings.num_blocks or max(1, stream.num_blocks)
    hits = {
        "lru": _lru_hits(chains, capacity),
        "fifo": _fifo_hits(chains, capacity),
        "optimal": bypassing_hits(stream, stream.lengths, capacity),
    }
    prompt = replayed.trace.prompt_tokens
    for name, blocks in hits.items():
        tokens = np.minimum(blocks * replayed.trace.block_size, prompt)
        used_by = f"kvcache-simulator 0.1's {name}"
        yield _summed(f"prompts_{name}", rule + rules[name], tokens, prompt, _last_half(prompt), used_by)


def _last_half(requests: NDArray[np.integer]) -> Mask:
    mask: Mask = np.arange(len(requests)) >= len(requests) // 2
    return mask


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


def _knows_partial_blocks(replayed: Replayed) -> bool:
    """Whether the trace tells the content of the prompts' partial last blocks."""
    requests, trace = replayed.requests, replayed.trace
    in_blocks = requests.tokens_per_id == trace.block_size != 1
    return not in_blocks or np.array_equal(np.diff(requests.prompt_offsets), trace.needed_blocks)


def _prefixes(replayed: Replayed, partial: bool) -> Iterator[list[Hashable]]:
    """For each prompt's blocks names that stand for a block and all before it."""
    trace, requests = replayed.trace, replayed.requests
    in_blocks = requests.tokens_per_id == trace.block_size != 1
    tokens = requests if in_blocks else requests.as_tokens()
    for i, num_full in enumerate(replayed.trace.prompt_blocks.tolist()):
        keys: list[Hashable] = [*trace.keys_of(i)[:num_full]]
        if partial and trace.prompt_tokens[i] % trace.block_size:
            rest = tokens.prompt(i)[num_full if in_blocks else num_full * trace.block_size :]
            keys.append((keys[-1] if keys else None, rest.tobytes()))
        yield keys


def _content_names(replayed: Replayed, partial: bool) -> Iterator[Hashable]:
    """Each prompt block's tokens."""
    size = replayed.trace.block_size
    for i, num_full in enumerate(replayed.trace.prompt_blocks.tolist()):
        tokens = replayed.requests.prompt(i)
        data = tokens[: len(tokens) if partial else num_full * size].tobytes()
        width = size * tokens.itemsize
        yield from (data[at : at + width] for at in range(0, len(data), width))


def _chunks(replayed: Replayed) -> Iterator[Definition]:
    """A counter that looks up before every prefill chunk. No engine saves work by these hits."""
    served = replayed.result.served
    for size in CHUNK_SIZES:
        found, prompts, ends = recounted_by_chunk(replayed, size, served)
        name = f"chunks_of_{size}_recounted"
        formula = "full-block tokens before the chunk / prompt tokens, over chunks"
        yield Definition(name, formula, found, prompts)
        formula = "full-block tokens before the chunk / tokens up to its end, over chunks"
        yield Definition(f"{name}_to_their_end", formula, found, ends)
