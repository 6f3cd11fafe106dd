"""The second implementation of `summary.json`, from a run's full-level records.

Standard library only, and like `plain.py` it shares nothing with the fast path but
`schema.py`. It sees only what is on disk.

    summary = summarize(records, num_requests=2, top_k=2048, block_sizes=(16, 32, 64))
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from dsatrace.schema import SCHEMA_VERSION, TIER_NAMES, distribution, quantile_histogram

Record = dict[str, Any]


def summarize(
    records: Sequence[Record],
    *,
    num_requests: int,
    top_k: int,
    block_sizes: Sequence[int],
    state: str = "complete",
    selections: str = "synthetic",
) -> Record:
    """The record of summary.json; nothing was traced live, so there is no tracing cost."""
    steps = [group for group in forwards(records) if group[0]["phase"] == "decode"]
    sparse = [record for record in records if record["path"] == "sparse"]
    histograms = {
        "unique_blocks": Counter(record["unique_blocks"] for record in records),
        "tokens_per_touched_block": Counter(count for record in records for count in block_counts(record)),
        "offsets": Counter(
            record["seq_len_current"] - 1 - position
            for record in records
            for position in record["selected_token_pos"]
        ),
        "prefix_intersection_ratio": Counter(record["prefix"]["intersection_ratio"] for record in records),
        "step_us": Counter(round(group[0]["step_wall_us"]) for group in steps),
    }
    at_sizes = [Counter(num_blocks(record, size) for record in sparse) for size in block_sizes]
    named = ("unique_blocks", "tokens_per_touched_block", "offsets", "prefix_intersection_ratio")
    latents = sum(record["kv_fetch"][tier]["bytes_read"] for record in records for tier in TIER_NAMES)
    scan = sum(record["indexer_scan"]["bytes_read"] for record in records)
    return {
        "schema_version": SCHEMA_VERSION,
        "state": state,
        "selections": selections,
        "counts": {
            "steps": len(steps),
            "prefills": len(list(forwards(records))) - len(steps),
            "records": len(records),
            "sparse_records": len(sparse),
            "requests": num_requests,
        },
        "dropped_steps": 0,
        **{name: described(histograms[name]) for name in named},
        "prefix_hot_blocks": hot_blocks(records),
        "step_ms": {name: _ms(_quantile(histograms["step_us"], q)) for name, q in _STEP_QUANTILES},
        "blocks_touched": [
            blocks_touched(sparse, counts, size, top_k)
            for counts, size in zip(at_sizes, block_sizes, strict=True)
        ],
        "step_overlap": overlap(sparse, lambda key: (key[0], key[1] - 1, key[2])),
        "layer_overlap": overlap(sparse, lambda key: (key[0], key[1], key[2] - 1)),
        "kv_fetch": {tier: fetch_totals(records, tier) for tier in TIER_NAMES},
        "bytes_read": {
            "without_indexer_scan": latents,
            "indexer_scan": scan,
            "with_indexer_scan": latents + scan,
        },
        "tracing_cost": None,
        "histograms": {name: _json(counts) for name, counts in histograms.items()}
        | {f"unique_blocks_at_{size}": _json(c) for size, c in zip(block_sizes, at_sizes, strict=True)},
    }


_STEP_QUANTILES = (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))


def forwards(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records of each forward, which stand together in a trace."""
    for _, group in itertools.groupby(records, key=lambda record: record["forward_idx"]):
        yield list(group)


def block_counts(record: Record) -> list[int]:
    """Selected tokens in each touched block."""
    size = record["block_size_tokens"]
    return list(Counter(position // size for position in record["selected_token_pos"]).values())


def num_blocks(record: Record, size: int) -> int:
    return len({position // size for position in record["selected_token_pos"]})


def described(counts: Counter[Any]) -> Record:
    """`{min, p50, p95, max, mean}`; the mean is an exact sum, rounded once."""
    values = sorted(counts)
    total = sum(counts.values())
    mean = math.fsum(value * counts[value] for value in values) / total if total else None
    return distribution(values, [counts[value] for value in values], mean)


def hot_blocks(records: Iterable[Record]) -> Record:
    """The 20 most touched prefix blocks of each request with a prefix hit, lower id first among equals."""
    touches: dict[str, Counter[int]] = {}
    for record in records:
        if record["prefix"]["prefix_cache_hit"]:
            counts = touches.setdefault(record["request_id"], Counter())
            counts.update(record["prefix"]["intersection_blocks"])
    return {
        request_id: [
            {"block_id": block, "touches": count}
            for block, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
        ]
        for request_id, counts in touches.items()
    }


def blocks_touched(sparse: Sequence[Record], counts: Counter[int], size: int, k: int) -> Record:
    """Touched blocks at one block size, beside what a uniform and a recency selector would touch."""
    measured = described(counts)
    contexts = [record["seq_len_current"] for record in sparse]
    return {
        "block_size_tokens": size,
        "mean": measured["mean"],
        "p50": measured["p50"],
        "p95": measured["p95"],
        "uniform_mean": _mean([uniform_blocks(n, k, size) for n in contexts]),
        "recency_mean": _mean([len({position // size for position in range(n - k, n)}) for n in contexts]),
        "context_mean": _mean([math.ceil(n / size) for n in contexts]),
    }


def uniform_blocks(seq_len: int, k: int, size: int) -> float:
    """Expected blocks that k of N positions touch: a block of b is missed C(N-b, k) / C(N, k) often."""
    subsets = math.comb(seq_len, k)
    blocks = [min(size, seq_len - start) for start in range(0, seq_len, size)]
    return float(
        sum(n * (1 - Fraction(math.comb(seq_len - b, k), subsets)) for b, n in Counter(blocks).items())
    )


def overlap(sparse: Iterable[Record], before: Any) -> Record:
    """Share of a selection that the one `before` it, by (request, step, layer), held too."""
    selections: dict[tuple[str, int, int], tuple[set[int], int]] = {}
    layers: set[int] = set()
    for record in sparse:
        key = (record["request_id"], record["step_idx"], record["layer_id"])
        selections[key] = (set(record["selected_token_pos"]), record["seq_len_current"])
        layers.add(record["layer_id"])
    shared: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    random: dict[tuple[str, int], float] = {}
    for key, (selected, seq_len) in selections.items():
        if before(key) in selections:
            shared[key[2]] += len(selected & selections[before(key)][0])
            tokens[key[2]] += len(selected)
            random[key[:2]] = len(selected) / seq_len
    total = sum(tokens.values())
    return {
        "pairs": len(random),
        "mean": sum(shared.values()) / total if total else None,
        "random_mean": _mean(list(random.values())),
        "per_layer": [shared[i] / tokens[i] if tokens[i] else None for i in sorted(layers)]
        if total
        else None,
    }


def fetch_totals(records: Iterable[Record], tier: str) -> Record:
    totals = dict.fromkeys(("hit_blocks", "bytes_read", "read_ops", "bytes_useful"), 0)
    for record in records:
        for name in totals:
            totals[name] += record["kv_fetch"][tier][name]
    return totals


def _json(counts: Counter[Any]) -> Record:
    values = sorted(counts)
    return {"values": values, "counts": [counts[value] for value in values]}


def _quantile(counts: Counter[float], percent: int) -> float | None:
    values = sorted(counts)
    return quantile_histogram(values, [counts[v] for v in values], percent) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1000
