"""What a whole run did, from exact integer histograms: the contents of `summary.json`.

Fed step by step, readable at any time; two summaries merge by addition. Measured touched blocks are
compared with those of a uniform and a recency selector, from closed formulas. Knows no file and no
thread.

    summary = Summary(compared_block_sizes=(16, 32, 64))
    summary.add_step(step)            # StepRecords
    summary.to_json(state="running")  # the fields of schema.SUMMARY_FIELDS
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dsatrace.schema import FETCH_TOTALS, OFFLOADED_FETCH, SCHEMA_VERSION, TIER_NAMES
from dsatrace.trace.histogram import ExactSum, Histogram, ValueCounts
from dsatrace.trace.kernels import compile_kernels, count_offsets
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.overlap import Recall, RecallTotals, SelectionOverlap, recalls
from dsatrace.trace.records import StepRecords
from dsatrace.trace.request_totals import RequestTotals
from dsatrace.trace.statistics import count_blocks, of_request
from dsatrace.trace.unfinished import Shares

NUM_HOT_BLOCKS = 20
SectionName = Literal["tiers", "workload"]
Sections = dict[SectionName, Mapping[str, Any] | None]
"""Sections that are supplied, not counted: "tiers" by the engine, "workload" by the data set."""

_COUNTS = ("steps", "prefills", "records", "sparse_records", "requests")


@dataclasses.dataclass
class TracingCost:
    """What tracing took, in microseconds, and what it lost. The writer's thread adds to the last two."""

    traced_steps: int = 0
    dropped_steps: int = 0  # not handed over: the queue was full, or the writer had failed
    handover_us: float = 0.0
    blocked_us: float = 0.0
    sync_us: float = 0.0
    busy_us: float = 0.0
    lost_steps: int = 0  # handed over and not written, because the writer failed

    def to_json(self) -> dict[str, Any]:
        def mean(total: float) -> float | None:
            return total / self.traced_steps if self.traced_steps else None

        without = self.handover_us + self.blocked_us
        return {
            "traced_steps": self.traced_steps,
            "handover_us_mean": mean(self.handover_us),
            "blocked_us_mean": mean(self.blocked_us),
            "sync_us_mean": mean(self.sync_us),
            "without_sync_us_mean": mean(without),
            "with_sync_us_mean": mean(without + self.sync_us),
            "writer_busy_ms": self.busy_us / 1000,
        }


class BlocksAtSize:
    """Touched blocks of sparse records at one block size, and what two other selectors would touch."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.touched = Histogram()
        self.recency = Histogram()
        self.context = Histogram()
        self.uniform_sum = ExactSum()

    def add(self, step: StepRecords) -> None:
        stats, records = step.stats, step.sparse
        if self.block_size % step.block_size:
            touched = count_blocks(stats.tokens, stats.token_ptr, self.block_size)
        else:  # a multiple of the records' block size: blocks are far fewer than tokens
            touched = count_blocks(stats.block_ids, stats.block_ptr, self.block_size // step.block_size)
        self.touched.add(touched[records])
        seq_len = np.asarray(step.capture.seq_len, dtype=np.int64)
        if not step.kind.is_exact:
            self._add_selectors(step.kind, np.repeat(seq_len, step.num_sets)[records], stats.num_ids[records])
            return
        k, seq_len = step.kind.max_width, seq_len[records[:: step.num_sets]]
        per_layer = np.repeat(seq_len, step.num_sets)
        self.recency.add(recency_blocks(per_layer, k, self.block_size))
        self.context.add(context_blocks(per_layer, self.block_size))
        self.uniform_sum.add(float(uniform_blocks(seq_len, k, self.block_size).sum()) * step.num_sets)

    def _add_selectors(self, kind: SelectionKind, seq_len: np.ndarray, num_ids: np.ndarray) -> None:
        """Of records that select `num_ids` ids of several tokens, or not as many as they could."""
        pairs, counts = np.unique(np.stack([seq_len, num_ids]), axis=1, return_counts=True)
        for (visible, k), count in zip(pairs.T.tolist(), counts, strict=True):
            uniform, recency = unit_blocks(kind, visible, k, self.block_size)
            self.recency.add_counted(np.array([recency]), count)
            self.context.add_counted(context_blocks(np.array([visible]), self.block_size), count)
            self.uniform_sum.add(uniform * int(count))

    def merge(self, other: BlocksAtSize) -> None:
        self.touched.merge(other.touched)
        self.recency.merge(other.recency)
        self.context.merge(other.context)
        self.uniform_sum.merge(other.uniform_sum)

    def to_json(self) -> dict[str, Any]:
        total = self.context.total
        return {
            "block_size_tokens": self.block_size,
            "mean": self.touched.mean,
            "p50": self.touched.quantile(50),
            "p95": self.touched.quantile(95),
            "uniform_mean": self.uniform_sum.total / total if total else None,
            "recency_mean": self.recency.mean,
            "context_mean": self.context.mean,
        }


class Summary:
    """Counts and histograms of a run, or of a part of one."""

    def __init__(
        self,
        compared_block_sizes: tuple[int, ...],
        selections: str = "model",
        serving: Mapping[str, Any] | None = None,
        *,
        offloaded: bool = False,
        kind: SelectionKind | None = None,
        goes_on: bool = False,
    ) -> None:
        """`serving` is the manifest's; `offloaded`: the manifest has `tiers`; `kind`: of another door than
        the engine's; `goes_on`: the manifest has `answer_end`, so requests may go on past their answers."""
        compile_kernels()
        self.selections = selections
        self.sections: Sections = {"tiers": None, "workload": None}
        self.cost: TracingCost | None = None  # None: nothing was traced live
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.dropped_steps = 0
        self.dense = {name: Histogram() for name in ("unique_blocks", "tokens_per_touched_block", "offsets")}
        self.ratios = ValueCounts()
        self.step_us = ValueCounts()
        self.blocks_at = [BlocksAtSize(size) for size in compared_block_sizes]
        self.overlap = SelectionOverlap()
        self.recall, self.recall_past = RecallTotals(), RecallTotals()  # up to the answers' ends, and past
        # Of unfinished requests, by step; None: no answer ends before its request.
        self._recalled: dict[str, list[tuple[int, Recall]]] | None = {} if goes_on else None
        self.requests = RequestTotals(serving)
        fetched = FETCH_TOTALS + (OFFLOADED_FETCH if offloaded else ())
        self.kind = kind
        self.fetch = {name: dict.fromkeys(fetched, 0) for name in TIER_NAMES if self._tells("kv_fetch")}
        self.sparse_active = 0  # sparse records whose set is not just the newest ids
        self.scan_bytes = 0
        self.shares: Shares | None = None  # of unfinished requests, where a resume could not count them again
        self.prefix_cache_cold_starts = 0
        self._running: dict[str, np.ndarray] = {}  # request id -> touches of each prefix block
        self._hot: dict[str, list[dict[str, int]]] = {}  # finished requests

    def add_step(self, step: StepRecords) -> None:
        capture, stats = step.capture, step.stats
        decode = capture.phase != "prefill"
        self.counts["steps" if decode else "prefills"] += not capture.goes_on
        self.counts["records"] += step.num_records
        if decode and capture.step_wall_us is not None and not capture.goes_on:
            self.step_us.add([round(capture.step_wall_us)])  # whole us: few distinct values
        if step.kind.holds("offset_max"):
            self.dense["unique_blocks"].add(stats.num_blocks)
            self.dense["tokens_per_touched_block"].add(stats.tokens_in_block)
            query = np.repeat(np.asarray(capture.seq_len, dtype=np.int64) - 1, step.num_sets)
            offsets = self.dense["offsets"].counts_below(int(query.max()) + 1)
            count_offsets(stats.tokens, stats.token_ptr, query, offsets)
        if step.kind.holds("prefix"):
            self.ratios.add((stats.num_prefix_blocks / stats.num_blocks).tolist())
        for name, account in step.fetches.items():
            totals = self.fetch[name]
            for total in totals:
                totals[total] += int(getattr(account, total).sum())
        self.scan_bytes += int(step.scan_bytes.sum())
        if self.shares is not None:
            for b, request_id in enumerate(capture.request_ids):
                self.shares.of(request_id).add(step, b)
        self._add_prefix_blocks(step)
        self._add_sparse(step)

    def finish_request(self, request: Mapping[str, Any]) -> None:
        """Counts a line of requests.jsonl, keeps its request's hot blocks and forgets its selections."""
        self.counts["requests"] += 1
        self.requests.add(request)
        request_id = request["request_id"]
        self._end_recall(request)
        self.overlap.forget(request_id)
        if self.shares is not None:
            self.shares.end(request)
        touches = self._running.pop(request_id, None)
        if touches is not None:
            self._hot[request_id] = _hottest(touches)

    def merge(self, other: Summary) -> None:
        """Adds another part, or another run, with the same block sizes."""
        for name in _COUNTS:
            self.counts[name] += other.counts[name]
        self.dropped_steps += other.dropped_steps
        for name, histogram in self.dense.items():
            histogram.merge(other.dense[name])
        self.ratios.merge(other.ratios)
        self.step_us.merge(other.step_us)
        for mine, theirs in zip(self.blocks_at, other.blocks_at, strict=True):
            mine.merge(theirs)
        self.overlap.step.merge(other.overlap.step)
        self.overlap.layer.merge(other.overlap.layer)
        self.recall.merge(other.recall)
        self.recall_past.merge(other.recall_past)
        self.requests.merge(other.requests)
        if self.sections["workload"] != other.sections["workload"]:
            self.sections["workload"] = None
        self.sections["tiers"] = None  # describes one run as a whole
        for name, totals in self.fetch.items():
            for total in totals:
                totals[total] += other.fetch[name][total]
        self.scan_bytes += other.scan_bytes
        self.sparse_active += other.sparse_active
        self.shares = None  # nobody resumes several runs
        self.prefix_cache_cold_starts += other.prefix_cache_cold_starts
        for request_id, touches in other._running.items():
            self._touch(request_id, touches)
        self._hot.update(other._hot)

    def to_json(self, state: str) -> dict[str, Any]:
        """The record of summary.json, in the schema's field order."""
        latents = sum(totals["bytes_read"] for totals in self.fetch.values()) if self.fetch else None
        scanned = self.scan_bytes if self._tells("indexer_scan") else None
        hot = self._hot | {request_id: _hottest(touches) for request_id, touches in self._running.items()}
        distributions = {name: histogram.distribution() for name, histogram in self.dense.items()}
        of_requests, request_histograms = self.requests.to_json()
        cold_starts = self.prefix_cache_cold_starts
        return {
            "schema_version": SCHEMA_VERSION,
            "state": state,
            "selections": self.selections,
            "counts": dict(self.counts),
            "dropped_steps": self.dropped_steps,
            **distributions,
            "prefix_intersection_ratio": self.ratios.distribution(),
            "prefix_hot_blocks": hot,
            "step_ms": {f"p{percent}": _ms(self.step_us.quantile(percent)) for percent in (50, 95, 99)}
            | {"max": _ms(self.step_us.quantile(100))},
            "blocks_touched": [at_size.to_json() for at_size in self.blocks_at],
            "step_overlap": self.overlap.step.to_json(),
            "layer_overlap": self.overlap.layer.to_json(),
            "needle_recall": self.recall.to_json(),
            **({"needle_recall_past": self.recall_past.to_json()} if "past_answer" in of_requests else {}),
            "kv_fetch": {name: dict(totals) for name, totals in self.fetch.items()} or None,
            "bytes_read": {
                "without_indexer_scan": latents,
                "indexer_scan": scanned,
                "with_indexer_scan": None if latents is None or scanned is None else latents + scanned,
            },
            **({"sparse_active": self.known_sparse_active} if self.kind is not None else {}),
            **of_requests,
            **({"prefix_cache_cold_starts": cold_starts} if cold_starts else {}),
            "tiers": self.sections["tiers"],
            "workload": self.sections["workload"],
            "tracing_cost": self.cost.to_json() if self.cost else None,
            "histograms": {
                **{name: histogram.to_json() for name, histogram in self.dense.items()},
                "prefix_intersection_ratio": self.ratios.to_json(),
                "step_us": self.step_us.to_json(),
                **{f"unique_blocks_at_{at.block_size}": at.touched.to_json() for at in self.blocks_at},
                **request_histograms,
            },
            **({"unfinished": self.shares.to_json()} if self.shares is not None else {}),
        }

    def add_recalls(
        self, found: Sequence[Recall | None], request_ids: Sequence[str], step_idx: Sequence[int]
    ) -> None:
        """Counts records as of the answer, until `finish_request` tells where it ended."""
        for recall, request_id, step in zip(found, request_ids, step_idx, strict=True):
            if recall is not None:
                self.recall.add(recall)
                if self._recalled is not None:
                    self._recalled.setdefault(request_id, []).append((step, recall))

    def _end_recall(self, request: Mapping[str, Any]) -> None:
        """Counts apart what the request selected past its answer."""
        found = self._recalled.pop(request["request_id"], ()) if self._recalled else ()
        for step, recall in found:
            if step >= request.get("answer_tokens", math.inf):
                self.recall.add(recall, -1)
                self.recall_past.add(recall)

    @property
    def known_sparse_active(self) -> int | None:
        """`sparse_active`, where ids tell."""
        return self.sparse_active if self._tells("offset_max") else None

    def _tells(self, name: str) -> bool:
        return self.kind is None or self.kind.holds(name)

    def _add_prefix_blocks(self, step: StepRecords) -> None:
        stats, num_sets = step.stats, step.num_sets
        if not step.kind.holds("prefix"):
            return
        prefixes = zip(step.capture.request_ids, step.capture.prefixes, strict=True)
        for b, (request_id, prefix) in enumerate(prefixes):
            if prefix.hit:
                touched, _ = of_request(stats.block_ids, stats.block_ptr, b, num_sets)
                touched = touched[touched < prefix.num_cached_blocks]
                self._touch(request_id, np.bincount(touched, minlength=prefix.num_cached_blocks))

    def _touch(self, request_id: str, touches: np.ndarray) -> None:
        before = self._running.get(request_id)
        self._running[request_id] = touches if before is None else before + touches

    def _add_sparse(self, step: StepRecords) -> None:
        sparse, stats, kind = step.sparse, step.stats, step.kind
        if not sparse.any():
            return
        seq_len = np.asarray(step.capture.seq_len, dtype=np.int64)
        self.counts["sparse_records"] += int(sparse.sum())
        if kind.holds("offset_max"):
            self.sparse_active += int((sparse & ~_is_newest(step)).sum())
            for at_size in self.blocks_at:
                at_size.add(step)
        if step.needles is not None and step.capture.phase != "prefill":
            contexts = np.repeat(seq_len, step.num_sets)
            found = recalls(step.needles, step.layer, contexts, stats.num_tokens, sparse)
            whose = (step.capture.request_ids, step.capture.step_idx)
            self.add_recalls(found, *(np.repeat(x, step.num_sets).tolist() for x in whose))
        request_ids, step_idx, visible = step.capture.request_ids, step.capture.step_idx, step.visible
        by_request = sparse.reshape(-1, step.num_sets)
        for b in np.flatnonzero(by_request.any(axis=1)).tolist():
            ids, ptr = of_request(stats.ids, stats.id_ptr, b, step.num_sets)
            own = None
            if self.shares is not None:
                share = self.shares.of(request_ids[b])
                own = share.step, share.layer
            of_step = int(step_idx[b]), int(visible[b])
            self.overlap.add(request_ids[b], *of_step, ids, ptr, by_request[b], kind, own)


def _is_newest(step: StepRecords) -> np.ndarray:
    """(R,) bool: the set is the newest ids and no others, up to a last block that is not whole."""
    stats = step.stats
    first, last = stats.ids[stats.id_ptr[:-1]], stats.ids[stats.id_ptr[1:] - 1]
    newest_whole = np.asarray(step.capture.seq_len, dtype=np.int64) // step.kind.unit_tokens - 1
    newest: np.ndarray = last >= np.repeat(newest_whole, step.num_sets)
    newest &= last - first + 1 == stats.num_ids
    return newest


def _hottest(touches: np.ndarray) -> list[dict[str, int]]:
    """The most touched blocks, lower id first among equals."""
    order = np.lexsort((np.arange(len(touches)), -touches))[:NUM_HOT_BLOCKS]
    return [{"block_id": int(block), "touches": int(touches[block])} for block in order if touches[block]]


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1000


def context_blocks(seq_len: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks of the whole context."""
    return -(-seq_len // block_size)


def recency_blocks(seq_len: np.ndarray, k: np.ndarray | int, block_size: int) -> np.ndarray:
    """Blocks that the last k tokens lie in."""
    blocks: np.ndarray = (seq_len - 1) // block_size - (seq_len - k) // block_size + 1
    return blocks


def uniform_blocks(seq_len: np.ndarray, k: np.ndarray | int, block_size: int) -> np.ndarray:
    """Expected blocks touched by k tokens drawn without replacement from `seq_len`, exactly.

    A block of b tokens is missed with probability C(N - b, k) / C(N, k) (hypergeometric); b is
    smaller in a last block that is not full.
    """
    seq_len = np.asarray(seq_len, dtype=np.int64)
    full, rest = seq_len // block_size, seq_len % block_size
    i = np.arange(block_size)
    # P(miss b tokens) = product over i < b of (N - k - i) / (N - i), zero once it is negative.
    factors = np.clip(seq_len[:, None] - np.asarray(k).reshape(-1, 1) - i, 0, None) / np.maximum(
        seq_len[:, None] - i, 1
    )
    missed = factors.cumprod(axis=1)  # (B, block_size)
    last = np.where(rest > 0, 1 - missed[np.arange(len(seq_len)), rest - 1], 0.0)
    blocks: np.ndarray = full * (1 - missed[:, -1]) + last
    return blocks


def unit_blocks(kind: SelectionKind, seq_len: int, k: int, block_size: int) -> tuple[float, int]:
    """Touched blocks of `k` ids that may cover several tokens each: expected of a uniform selector, exactly,
    and of the newest `k`.

    A block is missed if all c ids are that lie in it: with probability C(n - c, k) / C(n, k), of n ids.
    """
    n, size = int(kind.visible(np.array([seq_len]))[0]), kind.unit_tokens
    end = min(n * size, seq_len)
    starts = np.arange(0, end, block_size)
    first, last = starts // size, np.minimum((starts + block_size - 1) // size, n - 1)
    i = np.arange((last - first).max() + 1)
    missed = np.cumprod(np.clip(n - k - i, 0, None) / np.maximum(n - i, 1))
    newest = (end - 1) // block_size - (n - k) * size // block_size + 1
    return float((1 - missed[last - first]).sum()), newest
