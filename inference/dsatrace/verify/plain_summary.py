"""The second implementation of `summary.json`, from a run's records, one by one.

Standard library only; shares nothing with the fast path but `schema.py`. Leaves out what the level's
records do not tell. Keeps the histograms, and each live request's last selection.

    totals = PlainSummary(top_k=2048, block_sizes=(16, 32, 64))
    for record in records: totals.add(record)
    summary = totals.to_json(requests)      # PlainRequests
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsatrace.schema import (
    FETCH_TOTALS,
    OFFLOADED_FETCH,
    SCHEMA_VERSION,
    TIER_NAMES,
    Level,
    distribution,
    quantile_histogram,
)
from dsatrace.verify.overlap import Overlaps, Recalls, num_selected
from dsatrace.verify.requests import PlainRequests, histogram
from dsatrace.verify.selections import ENGINES, Selections

Record = Mapping[str, Any]
_STEP_QUANTILES = (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))
_HISTOGRAMS = ("unique_blocks", "tokens_per_touched_block", "offsets")
_OF_POSITIONS = ("tokens_per_touched_block", "offsets")
_NUM_HOT = 20


def summarize(
    records: Iterable[Record],
    *,
    requests: Iterable[Record],
    top_k: int,
    block_sizes: Sequence[int],
    offloaded: bool = False,
) -> dict[str, Any]:
    """The record of summary.json of synthetic, full-level records and the lines of requests.jsonl."""
    lines, answers = PlainRequests(), {}
    for request in requests:
        lines.add(request)
        if "answer_tokens" in request:
            answers[request["request_id"]] = request["answer_tokens"]
    totals = PlainSummary(top_k=top_k, block_sizes=block_sizes, offloaded=offloaded, answers=answers)
    for record in records:
        totals.add(record)
    return totals.to_json(lines)


class PlainSummary:
    """Takes records in the order of the file: layer by layer, request by request, forward by forward."""

    def __init__(
        self,
        *,
        top_k: int,
        block_sizes: Sequence[int],
        level: Level = "full",
        offloaded: bool = False,
        kind: Selections = ENGINES,
        answers: Mapping[str, int] | None = None,
    ) -> None:
        """`offloaded`: the manifest has `tiers`; `kind`: what the ids are; `answers`: the tokens of each
        answer that its request may have gone on past."""
        self._kind = kind
        self.sparse_active = 0  # sparse records whose set is not just the newest ids
        self.level = level
        self.num_records = 0
        self.num_tokens = 0
        self._offsets: list[int] = []  # the smallest and the largest
        self._counts = Counter[str]()
        self._forward_idx: int | None = None
        self._histograms: dict[str, Counter[Any]] = {
            name: Counter()
            for name in (*_HISTOGRAMS, "prefix_intersection_ratio", "step_us")
            if level == "full" or name not in _OF_POSITIONS
        }
        fetched = FETCH_TOTALS + (OFFLOADED_FETCH if offloaded else ())
        self._fetch = {tier: dict.fromkeys(fetched, 0) for tier in TIER_NAMES}
        self._scan_bytes = 0
        self._hot: dict[str, Counter[int]] = {}  # live requests with a prefix hit
        self._hottest: dict[str, list[dict[str, int]]] = {}  # those that ended
        self._blocks = [_BlocksTouched(size, top_k, kind) for size in block_sizes]
        self._overlaps = Overlaps(with_tokens=level == "full", kind=kind)
        self._answers = answers or {}
        self._recalls, self._recalls_past = Recalls(), Recalls()
        self._pools_recalls = False

    def add(self, record: Record) -> None:
        located = self._kind.is_located
        self.num_records += 1
        if located:
            self.num_tokens += record["unique_token_pos_count"]
            offsets = (*self._offsets, record["offset_min"], record["offset_max"])
            self._offsets = [min(offsets), max(offsets)]
        if record["forward_idx"] != self._forward_idx:
            self._forward_idx = record["forward_idx"]
            is_step = record["phase"] != "prefill"
            self._counts["decode" if is_step else "prefill"] += 1
            if is_step and record["step_wall_us"] is not None:
                self._histograms["step_us"][round(record["step_wall_us"])] += 1
        if located:
            self._histograms["unique_blocks"][record["unique_blocks"]] += 1
            if self.level == "full":
                self.add_positions(record)
        self._add_reads(record)
        if record["prefix"] is not None:
            self._histograms["prefix_intersection_ratio"][record["prefix"]["intersection_ratio"]] += 1
            if record["prefix"]["prefix_cache_hit"] and self.level != "stats":
                counts = self._hot.setdefault(record["request_id"], Counter())
                counts.update(record["prefix"]["intersection_blocks"])
        if record["path"] == "sparse":
            self._add_sparse(record)

    def _add_reads(self, record: Record) -> None:
        if record["kv_fetch"] is not None:
            for tier, totals in self._fetch.items():
                for name in totals:
                    totals[name] += record["kv_fetch"][tier][name]
        if record["indexer_scan"] is not None:
            self._scan_bytes += record["indexer_scan"]["bytes_read"]

    def _add_sparse(self, record: Record) -> None:
        self._counts["sparse"] += 1
        if self._kind.is_located:
            self.sparse_active += not self._is_newest(record)
            for at_size in self._blocks:
                at_size.add(record, self.num_blocks(record, at_size.size))
        self._overlaps.add(record)
        if record["phase"] != "prefill" and "needle" in record:
            is_past = record["step_idx"] >= self._answers.get(record["request_id"], math.inf)
            (self._recalls_past if is_past else self._recalls).add(record)

    def _is_newest(self, record: Record) -> bool:
        """Whether the set is the newest ids and no others, up to a last block that is not whole."""
        if self._kind.unit_tokens == 1:  # the newest k positions reach back exactly k - 1
            return bool(record["offset_max"] == record["unique_token_pos_count"] - 1)
        ids = sorted(record["selected_ids"])
        newest_whole = record["seq_len_current"] // self._kind.unit_tokens - 1
        return ids == list(range(ids[0], ids[-1] + 1)) and ids[-1] >= newest_whole

    def add_positions(self, record: Record) -> None:
        """The distributions that a record's positions give."""
        positions = self._positions_of(record)
        query, size = record["seq_len_current"] - 1, record["block_size_tokens"]
        self._histograms["offsets"].update([query - position for position in positions])
        in_block = Counter([position // size for position in positions])
        self._histograms["tokens_per_touched_block"].update(in_block.values())

    def num_blocks(self, record: Record, size: int) -> int | None:
        """Blocks of any size that a record touches; None where its level does not tell."""
        if self.level == "full":
            return len({position // size for position in self._positions_of(record)})
        own_size = record["block_size_tokens"]
        if "selected_block_ids" in record and size % own_size == 0:
            return len({block // (size // own_size) for block in record["selected_block_ids"]})
        num_blocks: int = record["unique_blocks"]
        return num_blocks if size == own_size else None

    def _positions_of(self, record: Record) -> list[int]:
        """The record's token positions."""
        if self._kind.ids_field == "selected_token_pos":
            return list(record["selected_token_pos"])
        return self._kind.tokens(record["selected_ids"], record["seq_len_current"])

    def merge(self, later: PlainSummary) -> None:
        """Adds the records of whole forwards that follow these."""
        self.num_records += later.num_records
        self.num_tokens += later.num_tokens
        self.sparse_active += later.sparse_active
        offsets = self._offsets + later._offsets
        self._offsets = [min(offsets), max(offsets)] if offsets else []
        self._counts.update(later._counts)
        for name, counts in later._histograms.items():
            self._histograms[name].update(counts)
        for tier, totals in later._fetch.items():
            for name, count in totals.items():
                self._fetch[tier][name] += count
        self._scan_bytes += later._scan_bytes
        for request_id, touches in later._hot.items():
            self._hot.setdefault(request_id, Counter()).update(touches)
        for mine, its in zip(self._blocks, later._blocks, strict=True):
            mine.merge(its)
        self._overlaps.merge(later._overlaps)
        self._recalls.merge(later._recalls)
        self._recalls_past.merge(later._recalls_past)

    def end_request(self, request_id: str) -> None:
        """Call after the request's last record: only its hot blocks are kept."""
        self._overlaps.forget(request_id)
        counts = self._hot.pop(request_id, None)
        if counts is not None:
            self._hottest[request_id] = _hottest(counts)

    def pool_recalls(self) -> None:
        """Counts what lies past the answers with the rest, as older runs did."""
        self._recalls.merge(self._recalls_past)
        self._pools_recalls = True

    def to_json(
        self,
        requests: PlainRequests,
        *,
        state: str = "complete",
        selections: str = "synthetic",
        dropped_steps: int = 0,
    ) -> dict[str, Any]:
        """The fields of summary.json that the files tell; at level full all but `tracing_cost`, `workload`
        and `tiers`."""
        tells = {field.name for field in self._kind.fields if field.type != "null"}
        latents = (
            sum(totals["bytes_read"] for totals in self._fetch.values()) if "kv_fetch" in tells else None
        )
        scanned = self._scan_bytes if "indexer_scan" in tells else None
        summary: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "state": state,
            "selections": selections,
            "counts": {
                "steps": self._counts["decode"],
                "prefills": self._counts["prefill"],
                "records": self.num_records,
                "sparse_records": self._counts["sparse"],
                "requests": requests.num_requests,
            },
            "dropped_steps": dropped_steps,
            **{name: described(counts) for name, counts in self._histograms.items() if name != "step_us"},
            "prefix_hot_blocks": self._hottest | {name: _hottest(c) for name, c in self._hot.items()},
            "step_ms": _step_ms(self._histograms["step_us"]),
            "blocks_touched": [at_size.to_json() for at_size in self._blocks],
            **self._overlaps.to_json(),
            "needle_recall": self._recalls.to_json(),
            "kv_fetch": None if latents is None else {tier: dict(x) for tier, x in self._fetch.items()},
            "bytes_read": {
                "without_indexer_scan": latents,
                "indexer_scan": scanned,
                "with_indexer_scan": None if latents is None or scanned is None else latents + scanned,
            },
            **requests.to_json(),
            "tiers": None,
            "workload": None,
            "tracing_cost": None,
            "histograms": {name: histogram(counts) for name, counts in self._histograms.items()}
            | {f"unique_blocks_at_{x.size}": histogram(x.touched) for x in self._blocks if x.is_known}
            | requests.histograms(),
        }
        if not self._kind.is_engines:
            summary["sparse_active"] = self.sparse_active if self._kind.is_located else None
        if "past_answer" in summary and not self._pools_recalls:
            summary["needle_recall_past"] = self._recalls_past.to_json()
        if self.level != "full":
            summary["offsets"] = dict(zip(("min", "max"), self._offsets, strict=False))
        if self.level == "stats":
            del summary["prefix_hot_blocks"]
        return summary


class _BlocksTouched:
    """Touched blocks of sparse records at one block size, beside a uniform and a recency selector."""

    def __init__(self, size: int, top_k: int, kind: Selections) -> None:
        self.size = size
        self._kind = kind
        self.is_known = True  # the level's records tell how many there are
        self.touched = Counter[int]()
        self._top_k = top_k
        self._contexts = Counter[tuple[int, int]]()  # positions visible, ids selected -> records

    def add(self, record: Record, num_blocks: int | None) -> None:
        num_ids = self._top_k if self._kind.is_engines else num_selected(record)
        self._contexts[record["seq_len_current"], num_ids] += 1
        if num_blocks is None:
            self.is_known = False
        else:
            self.touched[num_blocks] += 1

    def merge(self, other: _BlocksTouched) -> None:
        self.is_known &= other.is_known
        self.touched.update(other.touched)
        self._contexts.update(other._contexts)

    def to_json(self) -> dict[str, Any]:
        size, measured = self.size, described(self.touched)
        names = ("mean", "p50", "p95") if self.is_known else ()
        return {
            "block_size_tokens": size,
            **{name: measured[name] for name in names},
            "uniform_mean": self._mean({(n, k): self._uniform(n, k) for n, k in self._contexts}),
            "recency_mean": self._mean({(n, k): self._recency(n, k) for n, k in self._contexts}),
            "context_mean": self._mean({(n, k): math.ceil(n / size) for n, k in self._contexts}),
        }

    def _uniform(self, seq_len: int, k: int) -> float:
        if self._kind.unit_tokens == 1:
            return uniform_blocks(seq_len, k, self.size)
        num_ids = self._kind.num_visible(seq_len)
        ids_in = Counter[int]()  # block -> ids that lie in it, at least with one token
        for one in range(num_ids):
            ids_in.update({token // self.size for token in self._kind.tokens([one], seq_len)})
        missed = {c: math.comb(num_ids - c, k) / math.comb(num_ids, k) for c in set(ids_in.values())}
        return math.fsum(1 - missed[c] for c in ids_in.values())

    def _recency(self, seq_len: int, k: int) -> int:
        if self._kind.unit_tokens == 1:
            return len(range((seq_len - k) // self.size * self.size, seq_len, self.size))
        num_ids = self._kind.num_visible(seq_len)
        newest = self._kind.tokens(list(range(num_ids - k, num_ids)), seq_len)
        return len({token // self.size for token in newest})

    def _mean(self, blocks: Mapping[tuple[int, int], float]) -> float | None:
        """Mean over the records, from the blocks at each context length."""
        total = sum(self._contexts.values())
        return math.fsum(blocks[x] * count for x, count in self._contexts.items()) / total if total else None


def described(counts: Counter[Any]) -> dict[str, Any]:
    """`{min, p50, p95, max, mean}`; the mean is an exact sum, rounded once."""
    values = sorted(counts)
    total = sum(counts.values())
    mean = math.fsum(value * counts[value] for value in values) / total if total else None
    return distribution(values, [counts[value] for value in values], mean)


def uniform_blocks(seq_len: int, k: int, size: int) -> float:
    """Expected blocks that k of N positions touch; a block of b is missed with C(N-b, k) / C(N, k)."""
    full, rest = divmod(seq_len, size)
    # That is (N-k)! (N-b)! / (N! (N-k-b)!), and Python divides integers of any size exactly.
    expected = 1 - math.perm(seq_len - k, rest) / math.perm(seq_len, rest)
    if full:
        expected += full * (1 - math.perm(seq_len - k, size) / math.perm(seq_len, size))
    return expected


def _hottest(counts: Counter[int]) -> list[dict[str, int]]:
    """The most touched blocks, lower id first among equals."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NUM_HOT]
    return [{"block_id": block, "touches": count} for block, count in ranked]


def _step_ms(counts: Counter[int]) -> dict[str, float | None]:
    if not counts:
        return {name: None for name, _ in _STEP_QUANTILES}
    step_us = histogram(counts)
    return {name: quantile_histogram(**step_us, percent=percent) / 1000 for name, percent in _STEP_QUANTILES}
