"""Derives one step's records from its capture, a whole step at once, and writes them as JSON lines.

Knows no thread and no file.

    step = deriver.derive(capture)         # StepRecords, arrays of B x L records
    data = StepLines().encode(step)        # one line per record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.tiers.account import FetchAccount, StepReads, Tiers
from dsatrace.schema import Level
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.json_lines import Choice, Layout, LineEncoder, Optional, Runs
from dsatrace.trace.kernels import compile_kernels
from dsatrace.trace.overlap import NeedleCounts, count_needles
from dsatrace.trace.statistics import Scratch, StepStatistics, fused_statistics, request_major


@dataclasses.dataclass(frozen=True)
class StepRecords:
    """One step, derived: R = B x L records, request-major."""

    capture: StepCapture
    stats: StepStatistics
    fetches: Mapping[str, FetchAccount]  # by tier name
    level: Level
    block_size: int  # tokens
    index_bytes_per_token: int  # per token and layer
    positions: np.ndarray  # (N,) int32, as recorded: ascending, or in canonical score order
    scores: np.ndarray | None  # (N,) float32, scores[i] belongs to positions[i]; None unless recorded
    needles: NeedleCounts | None = None  # None: no request's answer is known
    shared_layers: Mapping[int, int] = dataclasses.field(default_factory=dict)  # see `manifest.shared_layers`

    @property
    def num_layers(self) -> int:
        return self.capture.positions.shape[0]

    @property
    def top_k(self) -> int:
        return self.capture.positions.shape[2]

    @property
    def num_records(self) -> int:
        return len(self.stats.token_ptr) - 1

    @property
    def sparse(self) -> np.ndarray:
        """(B,) bool: the request has more positions than are selected."""
        return np.asarray(self.capture.seq_len) > self.top_k

    @property
    def has_indexer(self) -> np.ndarray:
        """(L,) bool: the layer has an indexer."""
        return ~np.isin(np.arange(self.num_layers), list(self.shared_layers))

    @property
    def num_scanned(self) -> np.ndarray:
        """(R,) int64: keys that the layer's indexer read, one per visible position; 0 without an indexer."""
        return np.outer(np.asarray(self.capture.seq_len, dtype=np.int64), self.has_indexer).ravel()


class RecordDeriver:
    """Derives a run's steps. With `reuse` a step's arrays are valid until the next `derive`, and no step
    allocates them anew."""

    def __init__(
        self,
        config: TraceConfig,
        layout: CacheLayout,
        tiers: Tiers,
        reuse: bool = False,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        """`shared_layers`: see `manifest.shared_layers`."""
        compile_kernels()  # now, not during the first step
        self._scratch = Scratch() if reuse else None
        self._config = config
        self._layout = layout
        self._tiers = tiers
        self._shared_layers = shared_layers or {}

    def derive(self, capture: StepCapture) -> StepRecords:
        """Raises `ValueError` for a capture that no model can have produced."""
        config = self._config
        if not np.isfinite(capture.score_stats[..., :3]).all():
            raise ValueError(f"forward {capture.forward_idx}: the indexer's scores are not finite numbers")
        cached = np.array([prefix.num_cached_blocks for prefix in capture.prefixes], dtype=np.int64)
        stats = fused_statistics(capture.positions, capture.seq_len, cached, config.block_size, self._scratch)
        positions, scores = _as_recorded(capture, stats, config)
        return StepRecords(
            capture=capture,
            stats=stats,
            fetches=self._accounts(capture, stats),
            level=config.level,
            block_size=config.block_size,
            index_bytes_per_token=self._layout.index_bytes_per_token,
            positions=positions,
            scores=scores,
            needles=count_needles(capture.needles, stats, capture.positions.shape[0]),
            shared_layers=self._shared_layers,
        )

    def _accounts(self, capture: StepCapture, stats: StepStatistics) -> Mapping[str, FetchAccount]:
        reads = StepReads(
            seq_len=np.repeat(np.asarray(capture.seq_len, dtype=np.int64), capture.positions.shape[0]),
            block_size=self._config.block_size,
            batch_size=capture.batch_size,
            block_ids=stats.block_ids,
            block_ptr=stats.block_ptr,
            tokens_selected=stats.tokens_in_block,
            tokens=stats.tokens,
            token_ptr=stats.token_ptr,
            positions=capture.positions,
            fetches=capture.fetches,
        )
        try:
            return self._tiers.accounts(reads)
        except ValueError as error:
            raise ValueError(f"forward {capture.forward_idx}: {error}") from error


def _as_recorded(
    capture: StepCapture, stats: StepStatistics, config: TraceConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions (N,) in their recorded order, and their scores where those are recorded."""
    if not config.needs_scores:
        return stats.tokens, None
    if capture.scores is None:
        raise ValueError(
            "the trace needs scores (--trace-store-scores, --trace-keep-order) and the capture has none"
        )
    positions, scores = request_major(capture.positions), request_major(capture.scores)  # (R, K)
    chosen = positions >= 0
    # The last key sorts first: padding to the end, then score descending, then position ascending.
    keys = (positions, -scores, ~chosen) if config.keep_order else (positions, ~chosen)
    order = np.lexsort(keys, axis=-1)
    chosen = np.take_along_axis(chosen, order, axis=1)
    ordered = np.take_along_axis(positions, order, axis=1)[chosen].astype(np.int32, copy=False)
    if not config.store_scores:
        return ordered, None
    return ordered, np.take_along_axis(scores, order, axis=1)[chosen].astype(np.float32, copy=False)


class StepLines:
    """Writes steps as lines of `trace_steps.jsonl`, into one buffer."""

    def __init__(self) -> None:
        self._encoder = LineEncoder()

    def encode(self, step: StepRecords) -> memoryview:
        """One line per record; valid until the next call."""
        return self._encoder.encode(record_layout(step), step.num_records)


def record_layout(step: StepRecords) -> Layout:
    """The step's records in the schema's field order: a column where records differ, else a plain value."""
    capture, stats = step.capture, step.stats
    request, layer = np.divmod(np.arange(step.num_records), step.num_layers)  # (R,) each
    seq_len = np.asarray(capture.seq_len, dtype=np.int64)[request]
    with_positions, with_blocks = step.level == "full", step.level != "stats"
    num_tokens, num_blocks, num_scanned = stats.num_tokens, stats.num_blocks, step.num_scanned
    first_block, end_block = stats.block_ptr[:-1], stats.block_ptr[1:]
    return {
        "event": "dsa_topk",
        "request_id": Choice(capture.request_ids, request),
        "layer_id": layer,
        "step_idx": np.asarray(capture.step_idx)[request],
        "seq_len_current": seq_len,
        **({"selected_token_pos": _of_tokens(step, step.positions)} if with_positions else {}),
        "unique_token_pos_count": num_tokens,
        "offset_min": stats.offset_min,
        "offset_p50": stats.offset_p50,
        "offset_max": stats.offset_max,
        "block_size_tokens": step.block_size,
        **({"selected_block_ids": Runs(stats.block_ids, first_block, end_block)} if with_blocks else {}),
        "unique_blocks": num_blocks,
        "tokens_per_touched_block": {
            "mean": num_tokens / num_blocks,
            "p50": stats.tokens_p50,
            "p95": stats.tokens_p95,
        },
        "kv_fetch": {name: account.columns() for name, account in step.fetches.items()},
        "prefix": _prefix(step, request, with_blocks),
        **_scores(step, request, layer),
        "forward_idx": capture.forward_idx,
        "step_wall_us": capture.step_wall_us,
        "step_synced": capture.step_synced,
        "phase": capture.phase,
        "path": Choice(("dense", "sparse"), step.sparse[request].astype(np.int64)),
        "kth_margin": np.where(
            step.sparse[request], capture.score_stats[layer, request, 3], np.float32("nan")
        ),
        "indexer_scan": {"tokens": num_scanned, "bytes_read": num_scanned * step.index_bytes_per_token},
        **_source(step, layer),
        **_needle(step),
    }


def _of_tokens(step: StepRecords, values: np.ndarray) -> Runs:
    """One value per selected token."""
    return Runs(values, step.stats.token_ptr[:-1], step.stats.token_ptr[1:])


def _prefix(step: StepRecords, request: np.ndarray, with_blocks: bool) -> dict[str, Any]:
    """Block ids ascend, so the touched prefix blocks are the first of them."""
    stats, prefixes = step.stats, step.capture.prefixes
    first, num_shared = stats.block_ptr[:-1], stats.num_prefix_blocks
    return {
        "prefix_cache_hit": Choice([prefix.hit for prefix in prefixes], request),
        "prefix_cached_blocks": np.array([prefix.num_cached_blocks for prefix in prefixes])[request],
        "prefix_key": Choice([prefix.key for prefix in prefixes], request),
        "intersection_ratio": num_shared / stats.num_blocks,
        **({"intersection_blocks": Runs(stats.block_ids, first, first + num_shared)} if with_blocks else {}),
    }


def _scores(step: StepRecords, request: np.ndarray, layer: np.ndarray) -> dict[str, Any]:
    if step.scores is not None:
        return {"scores_topk": _of_tokens(step, step.scores)}
    low, mean, high = step.capture.score_stats[layer, request, :3].T
    return {"scores_stats": {"min": low, "mean": mean, "max": high}}


def _source(step: StepRecords, layer: np.ndarray) -> dict[str, Any]:
    if not step.shared_layers:
        return {}
    return {"source_layer": Optional([step.shared_layers.get(i) for i in range(step.num_layers)], layer)}


def _needle(step: StepRecords) -> dict[str, Any]:
    if step.needles is None:
        return {}
    tokens, selected = step.needles.tokens, step.needles.selected  # few pairs are distinct
    pairs, which = np.unique(np.stack([tokens, selected], axis=1), axis=0, return_inverse=True)
    values = [{"tokens": of, "selected": found} if of else None for of, found in pairs.tolist()]
    return {"needle": Optional(values, which.reshape(-1))}
