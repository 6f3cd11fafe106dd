"""A step's records as dicts, one at a time: the readable reference of `trace.records.StepLines`.

data = step_lines(step)                # bytes, one line a record
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orjson

from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.account import FetchAccount
from dsatrace.trace.records import StepRecords


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
        b, layer = divmod(r, step.num_sets)
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
            **(
                {"source_layer": source}
                if (source := step.kind.layers[layer].source_layer) is not None
                else {}
            ),
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
    b, layer = divmod(r, step.num_sets)
    low, mean, high = step.capture.score_stats[layer, b, :3]
    return {"scores_stats": {"min": low, "mean": mean, "max": high}}


def _clock_and_path(step: StepRecords, r: int) -> dict[str, Any]:
    capture = step.capture
    b, layer = divmod(r, step.num_sets)
    sparse = int(capture.seq_len[b]) > step.kind.max_width
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
