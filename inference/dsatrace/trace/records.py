"""Turns one step's capture into its records: the fast path's one place of derivation.

`RecordDeriver` joins selection, blocks, prefix and tiers for a whole step at once.
`step_lines` lays the result out as `trace_steps.jsonl` lines, a record at a time: the
readable reference of `lines.py`, which the sinks use. Knows no thread, no file.

    step = deriver.derive(capture)         # StepRecords, arrays of B x L records
    data = step_lines(step)                # bytes, one line a record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.account import FetchAccount, StepReads, Tiers
from dsatrace.schema import Level
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.kernels import compile_kernels
from dsatrace.trace.needles import NeedleCounts, count_needles
from dsatrace.trace.statistics import Scratch, StepStatistics, fused_statistics, request_major


@dataclasses.dataclass(frozen=True)
class StepRecords:
    """One step, derived: R = B x L records, request-major."""

    capture: StepCapture
    stats: StepStatistics
    fetches: Mapping[str, FetchAccount]  # by tier name
    level: Level
    block_size: int  # tokens
    index_bytes_per_token: int  # a token and layer
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
        """(B,) bool: the request holds more positions than are selected."""
        return np.asarray(self.capture.seq_len) > self.top_k

    @property
    def has_indexer(self) -> np.ndarray:
        """(L,) bool: the layer chose by itself."""
        return ~np.isin(np.arange(self.num_layers), list(self.shared_layers))

    @property
    def num_scanned(self) -> np.ndarray:
        """(R,) int64: keys that the record's indexer read, one per visible position; 0 where it has none."""
        return np.outer(np.asarray(self.capture.seq_len, dtype=np.int64), self.has_indexer).ravel()


class RecordDeriver:
    """Derives steps with one configuration: block size, level, layout, tiers, layers without an indexer.

    With `reuse` a step's arrays are good until the next `derive`, and no step pays for memory.
    """

    def __init__(
        self,
        config: TraceConfig,
        layout: CacheLayout,
        tiers: Tiers,
        reuse: bool = False,
        shared_layers: Mapping[int, int] | None = None,
    ) -> None:
        """`shared_layers`: see `manifest.shared_layers`; None: there are none."""
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
    """Positions (N,) in the order they are recorded, with their scores where those are recorded."""
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


def step_lines(step: StepRecords) -> bytes:
    """Every record of the step as one JSON line each."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return b"".join(orjson.dumps(record, option=options) for record in step_records(step))


def step_records(step: StepRecords) -> Iterator[dict[str, Any]]:
    """The step's records in the schema's field order; arrays are numpy slices."""
    capture, stats = step.capture, step.stats
    with_positions, with_blocks = step.level == "full", step.level != "stats"
    token_ptr, block_ptr = stats.token_ptr.tolist(), stats.block_ptr.tolist()
    offset_min, offset_p50, offset_max = (
        column.tolist() for column in (stats.offset_min, stats.offset_p50, stats.offset_max)
    )
    tokens_p50, tokens_p95 = stats.tokens_p50.tolist(), stats.tokens_p95.tolist()
    fetches = _fetch_rows(step.fetches)
    seq_lens = np.asarray(capture.seq_len).tolist()
    num_scanned = step.num_scanned.tolist()

    for r in range(step.num_records):
        b, layer = divmod(r, step.num_layers)
        low, high = token_ptr[r], token_ptr[r + 1]
        first, end = block_ptr[r], block_ptr[r + 1]
        num_tokens, num_blocks = high - low, end - first
        blocks = stats.block_ids[first:end]
        yield {
            "event": "dsa_topk",
            "request_id": capture.request_ids[b],
            "layer_id": layer,
            "step_idx": int(capture.step_idx[b]),
            "seq_len_current": seq_lens[b],
            **({"selected_token_pos": step.positions[low:high]} if with_positions else {}),
            "unique_token_pos_count": num_tokens,
            "offset_min": offset_min[r],
            "offset_p50": offset_p50[r],
            "offset_max": offset_max[r],
            "block_size_tokens": step.block_size,
            **({"selected_block_ids": blocks} if with_blocks else {}),
            "unique_blocks": num_blocks,
            "tokens_per_touched_block": {
                "mean": num_tokens / num_blocks,
                "p50": tokens_p50[r],
                "p95": tokens_p95[r],
            },
            "kv_fetch": {name: rows[r] for name, rows in fetches.items()},
            "prefix": _prefix_field(
                capture.prefixes[b], blocks, int(stats.num_prefix_blocks[r]), with_blocks
            ),
            **_scores_field(step, r),
            **_clock_and_path(step, r),
            "indexer_scan": {
                "tokens": num_scanned[r],
                "bytes_read": num_scanned[r] * step.index_bytes_per_token,
            },
            **({"source_layer": step.shared_layers[layer]} if layer in step.shared_layers else {}),
            **_needle_field(step, r),
        }


def _prefix_field(
    prefix: RequestPrefix, blocks: np.ndarray, num_shared: int, with_blocks: bool
) -> dict[str, Any]:
    """Block ids ascend, so the touched prefix blocks are the first of them."""
    return {
        "prefix_cache_hit": prefix.hit,
        "prefix_cached_blocks": prefix.num_cached_blocks,
        "prefix_key": prefix.key,
        "intersection_ratio": num_shared / len(blocks),
        **({"intersection_blocks": blocks[:num_shared]} if with_blocks else {}),
    }


def _scores_field(step: StepRecords, r: int) -> dict[str, Any]:
    if step.scores is not None:
        return {"scores_topk": step.scores[step.stats.token_ptr[r] : step.stats.token_ptr[r + 1]]}
    b, layer = divmod(r, step.num_layers)
    low, mean, high = step.capture.score_stats[layer, b, :3]
    return {"scores_stats": {"min": low, "mean": mean, "max": high}}


def _clock_and_path(step: StepRecords, r: int) -> dict[str, Any]:
    capture = step.capture
    b, layer = divmod(r, step.num_layers)
    sparse = int(capture.seq_len[b]) > step.top_k
    return {
        "forward_idx": capture.forward_idx,
        "step_wall_us": capture.step_wall_us,
        "step_synced": capture.step_synced,
        "phase": capture.phase,
        "path": "sparse" if sparse else "dense",
        "kth_margin": capture.score_stats[layer, b, 3] if sparse else None,
    }


def _needle_field(step: StepRecords, r: int) -> dict[str, Any]:
    if step.needles is None or not step.needles.tokens[r]:
        return {}
    return {"needle": {"tokens": int(step.needles.tokens[r]), "selected": int(step.needles.selected[r])}}


def _fetch_rows(fetches: Mapping[str, FetchAccount]) -> dict[str, list[dict[str, Any]]]:
    """By tier name, each record's account in the schema's field order."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, account in fetches.items():
        columns = account.columns()
        num_records = len(account.hit_blocks)
        values = [
            column.tolist() if isinstance(column, np.ndarray) else [column] * num_records
            for column in columns.values()
        ]
        rows[name] = [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
    return rows
