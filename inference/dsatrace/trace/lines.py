"""A step's records as the lines of `trace_steps.jsonl`, all at once.

The same bytes as `records.step_lines`, which is the readable reference; here the record
is laid out once a step, in columns. Knows no file and derives nothing.

    lines = StepLines()
    file.write(lines.encode(step))       # StepRecords
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsatrace.trace.json_lines import Choice, Layout, LineEncoder, Optional, Runs
from dsatrace.trace.records import StepRecords


class StepLines:
    """Encodes step after step into one buffer."""

    def __init__(self) -> None:
        self._encoder = LineEncoder()

    def encode(self, step: StepRecords) -> memoryview:
        """One line a record; good until the next call."""
        return self._encoder.encode(record_layout(step), step.num_records)


def record_layout(step: StepRecords) -> Layout:
    """The step's records in the schema's field order, a column where they differ."""
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
        "kv_fetch": _fetches(step),
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
    """A value for each selected token."""
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
    """Few pairs of counts are distinct."""
    if step.needles is None:
        return {}
    tokens, selected = step.needles.tokens, step.needles.selected
    pairs, which = np.unique(np.stack([tokens, selected], axis=1), axis=0, return_inverse=True)
    values = [{"tokens": of, "selected": found} if of else None for of, found in pairs.tolist()]
    return {"needle": Optional(values, which.reshape(-1))}


def _fetches(step: StepRecords) -> dict[str, Any]:
    return {name: account.columns() for name, account in step.fetches.items()}
