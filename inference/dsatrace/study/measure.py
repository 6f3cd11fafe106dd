"""The values of the metrics, for all requests of a replay or for some of them.

`metrics` lists every metric with its formula and denominator.

    values = measure(replayed)
    measure(replayed, of_workload(replayed, "qa"))["sharing_fraction_mean"]
    per_turn(replayed)[0]["hit_rate_first_prefill"]
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from dsatrace.kv.blocks import HIT
from dsatrace.schema import nearest_rank
from dsatrace.study.metrics import SHARING, SPREAD, check_values
from dsatrace.study.requests import UNKNOWN
from dsatrace.study.run import Replayed

Mask = NDArray[np.bool_]
Value = float | int | None
_PERCENTS = {"median": 50, "p90": 90, "p99": 99}


def measure(replayed: Replayed, chosen: Mask | None = None) -> dict[str, Value]:
    """Every metric, over the `chosen` requests (R,) or all; those of a host pool only if there is one.

    Raises `ValueError` for an impossible value, such as a share above 1.
    """
    chosen = np.ones(len(replayed.requests), bool) if chosen is None else chosen
    values = _of_requests(replayed, chosen) | _of_blocks(replayed, chosen)
    check_values(values)
    return values


def of_workload(replayed: Replayed, name: str) -> Mask:
    """(R,) the requests of a workload."""
    requests = replayed.requests
    chosen: Mask = requests.workload == requests.workload_names.index(name)
    return chosen


def workloads_in(replayed: Replayed) -> list[str]:
    """The workloads that have requests, in the order of the trace's names."""
    return [replayed.requests.workload_names[i] for i in np.unique(replayed.requests.workload)]


def per_turn(replayed: Replayed) -> list[dict[str, Value]]:
    """A row per turn, in order; turn None is of the requests whose turn is unknown."""
    rows = []
    for turn in np.unique(replayed.requests.turn):
        values = _of_requests(replayed, replayed.requests.turn == turn)
        check_values(values)
        names = (
            "num_requests", "num_rejected", "prompt_tokens", "prompt_blocks", "hit_blocks",
            "sharing_fraction_mean", "sharing_fraction_median", "sharing_above_0", "hit_rate_first_prefill",
            "hit_rate_infinite",
        )  # fmt: skip
        number = None if turn == UNKNOWN else int(turn)
        rows.append({"turn": number, **{name: values[name] for name in names}})
    return rows


def sharing_fractions(replayed: Replayed, chosen: Mask | None = None) -> NDArray[np.float64]:
    """Hit tokens / prompt tokens of each request, in order; 0 for a rejected one."""
    chosen = np.ones(len(replayed.requests), bool) if chosen is None else chosen
    fractions: NDArray[np.float64] = replayed.result.hit_tokens[chosen] / replayed.trace.prompt_tokens[chosen]
    return fractions


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCounts:
    """The U different blocks that the chosen requests cached or hit."""

    keys: NDArray[np.int32]  # (U,)
    accesses: NDArray[np.int64]  # (U,)
    hits: NDArray[np.int64]  # (U,)


def block_counts(replayed: Replayed, chosen: Mask | None = None) -> BlockCounts:
    events = _accesses_of(replayed, chosen)
    accesses = np.bincount(events["key"], minlength=replayed.trace.num_keys)
    hits = np.bincount(events["key"][events["kind"] == HIT], minlength=replayed.trace.num_keys)
    keys = np.flatnonzero(accesses)
    return BlockCounts(keys.astype(np.int32), accesses[keys], hits[keys])


def reuse_gaps(
    replayed: Replayed, chosen: Mask | None = None, *, hits_only: bool = False
) -> NDArray[np.float64]:
    """Trace seconds between one access of a block and its next, or between hits; of all blocks."""
    events = _accesses_of(replayed, chosen)
    if hits_only:
        events = events[events["kind"] == HIT]
    order = np.argsort(events["key"], kind="stable")
    keys, times = events["key"][order], replayed.trace.time_s[events["clock"][order]]
    gaps: NDArray[np.float64] = np.diff(times)[keys[1:] == keys[:-1]]
    return gaps


def recounted_by_chunk(replayed: Replayed, chunk_tokens: int, served: Mask) -> NDArray[np.int64]:
    """If every prefill chunk began with a lookup: tokens found, prompt tokens and chunk ends, (3, R).

    Each is a sum over the chunks of a request, 0 for one that is not `served`. A lookup finds the full
    blocks before the chunk, the request's hits and its own earlier chunks; without prefix caching, nothing.
    """
    prompt, start, size = replayed.trace.prompt_tokens, replayed.result.hit_tokens, replayed.trace.block_size
    num_chunks = np.where(served, -((start - prompt) // chunk_tokens), 0)
    request = np.repeat(np.arange(len(prompt)), num_chunks)
    number = np.arange(len(request)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    begins = start[request] + number * chunk_tokens
    found = begins // size * size * replayed.settings.prefix_caching
    columns = (found, prompt[request], np.minimum(begins + chunk_tokens, prompt[request]))
    return np.array([np.bincount(request, column, len(prompt)) for column in columns]).astype(np.int64)


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None if whole is 0."""
    return float(part / whole) if whole else None


def _of_requests(replayed: Replayed, chosen: Mask) -> dict[str, Value]:
    result, trace = replayed.result, replayed.trace
    served = result.served & chosen

    def total(values: NDArray[np.integer], of: Mask = chosen) -> int:
        return int(values[of].sum())

    prompt, hit = total(trace.prompt_tokens), total(result.hit_tokens)
    full_blocks, hit_blocks = total(trace.prompt_blocks), hit // trace.block_size
    resumed, resumed_hit = total(result.resumed_tokens), total(result.resumed_hit_tokens)
    found, looked_up, _ = map(total, recounted_by_chunk(replayed, replayed.settings.recount_tokens, served))
    fractions = sharing_fractions(replayed, chosen)
    values: dict[str, Value] = {
        "num_requests": int(chosen.sum()),
        "num_served": int(served.sum()),
        "num_rejected": int((chosen & ~result.served).sum()),
        "prompt_tokens": prompt,
        "prompt_blocks": full_blocks,
        "hit_blocks": hit_blocks,
        **_statistics("sharing_fraction", fractions, SHARING),
        "sharing_above_0": ratio(int((fractions > 0).sum()), len(fractions)),
        "hit_rate_first_prefill": ratio(hit, prompt),
        "hit_rate_served": ratio(hit, total(trace.prompt_tokens, served)),
        "hit_rate_with_preempted": ratio(hit + resumed_hit, prompt + resumed),
        "hit_rate_blocks": ratio(hit_blocks, full_blocks),
        "hit_rate_blocks_any": ratio(total(result.cached_blocks, served), full_blocks),
        "hit_rate_infinite": ratio(total(replayed.unlimited.hit_tokens), prompt),
        "hit_rate_chunks_recounted": ratio(found, looked_up),
    }
    if replayed.host_hits is not None:
        host = total(replayed.host_hits, served)
        values["hit_rate_host"] = ratio(host * trace.block_size, prompt - hit)
        values["hit_rate_with_host"] = ratio(hit + host * trace.block_size, prompt)
        values["host_hit_blocks"] = host
    return values


def _of_blocks(replayed: Replayed, chosen: Mask) -> dict[str, Value]:
    counts = block_counts(replayed, chosen)
    hit = counts.hits > 0
    allocated, reused = int(replayed.result.blocks_allocated[chosen].sum()), int(counts.hits.sum())
    return {
        "block_reuse_rate": ratio(reused, allocated + reused),
        "blocks_allocated": allocated,
        "blocks_reused": reused,
        "blocks_unique": len(counts.keys),
        "blocks_evicted": int(chosen[replayed.evictions["request"]].sum()),
        "blocks_hit": ratio(int(hit.sum()), len(counts.keys)),
        **_statistics("accesses_per_block", counts.accesses, SPREAD),
        **_statistics("hits_per_block", counts.hits, SPREAD),
        **_statistics("accesses_per_hit_block", counts.accesses[hit], SPREAD),
        **_statistics("hits_per_hit_block", counts.hits[hit], SPREAD),
        **_statistics("reuse_gap_s", reuse_gaps(replayed, chosen), SPREAD),
        **_statistics("hit_gap_s", reuse_gaps(replayed, chosen, hits_only=True), SPREAD),
    }


def _accesses_of(replayed: Replayed, chosen: Mask | None) -> np.ndarray:
    events = replayed.accesses
    return events if chosen is None or chosen.all() else events[chosen[events["request"]]]


def _statistics(name: str, values: np.ndarray, statistics: tuple[str, ...]) -> dict[str, Value]:
    """All are None if there is no value."""
    if not len(values):
        return {f"{name}_{statistic}": None for statistic in statistics}
    ascending = np.sort(values)
    known = {"mean": ascending.mean(), "min": ascending[0], "max": ascending[-1]}
    for statistic, percent in _PERCENTS.items():
        known[statistic] = ascending[nearest_rank(len(ascending), percent)]
    return {f"{name}_{statistic}": float(known[statistic]) for statistic in statistics}
