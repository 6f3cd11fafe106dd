"""A whole step's statistics in numpy: the readable reference of `trace.statistics.fused_statistics`.

stats = step_statistics(positions, seq_len, cached_blocks, block_size=16)
"""

from __future__ import annotations

import numpy as np

from dsatrace.trace.statistics import StepStatistics, request_major


def step_statistics(
    positions: np.ndarray,  # (L, B, K) int, -1 where there is none
    seq_len: np.ndarray,  # (B,) positions visible to the query
    cached_blocks: np.ndarray,  # (B,) blocks of the shared prefix
    block_size: int,  # tokens
) -> StepStatistics:
    """Raises `ValueError` for a selection that no model makes: one that does not hold min(K, seq_len)
    positions, repeats one, or lies in the future."""
    num_layers = positions.shape[0]
    visible = np.repeat(np.asarray(seq_len, dtype=np.int64), num_layers)  # (R,)
    ordered = np.sort(request_major(positions).astype(np.int32, copy=False), axis=1)  # (R, K), -1 first
    chosen = ordered >= 0
    tokens = ordered[chosen]
    token_ptr = _pointers(chosen.sum(axis=1))
    _check(tokens, token_ptr, visible, positions.shape[2], num_layers)

    first, end = token_ptr[:-1], token_ptr[1:]
    query = visible - 1
    # Ascending positions are descending offsets, so the rank counts from the record's end.
    median = end - 1 - _nearest_rank(end - first, 50)

    token_blocks = tokens // block_size
    is_start = _changes(token_blocks, first)
    starts = np.flatnonzero(is_start)
    block_ids = token_blocks[starts]
    block_ptr = _pointers(np.add.reduceat(is_start, first, dtype=np.int64))
    tokens_in_block = np.diff(starts, append=len(tokens))
    p50, p95 = _quantiles(tokens_in_block, block_ptr, (50, 95))
    in_prefix = block_ids < np.repeat(np.repeat(cached_blocks, num_layers), np.diff(block_ptr))
    return StepStatistics(
        tokens=tokens,
        ids=tokens,
        id_ptr=token_ptr,
        token_ptr=token_ptr,
        offset_min=query - tokens[end - 1],
        offset_p50=query - tokens[median],
        offset_max=query - tokens[first],
        block_ids=block_ids,
        block_ptr=block_ptr,
        tokens_in_block=tokens_in_block,
        tokens_p50=p50,
        tokens_p95=p95,
        num_prefix_blocks=np.add.reduceat(in_prefix, block_ptr[:-1], dtype=np.int64),
    )


def _pointers(counts: np.ndarray) -> np.ndarray:
    pointers = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=pointers[1:])
    return pointers


def _changes(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it, and at each record's first."""
    changes = np.empty(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    changes[first] = True
    return changes


def _nearest_rank(counts: np.ndarray, percent: int) -> np.ndarray:
    """`schema.nearest_rank` of every count."""
    return np.maximum(1, -(-counts * percent // 100)) - 1


def _quantiles(values: np.ndarray, pointers: np.ndarray, percents: tuple[int, ...]) -> list[np.ndarray]:
    """Nearest-rank quantiles of each record's (small, non-negative) values, by counting: each (R,)."""
    counts = np.diff(pointers)
    width = int(values.max()) + 1
    record = np.repeat(np.arange(len(counts)), counts)
    histogram = np.bincount(record * width + values, minlength=len(counts) * width)
    cumulative = histogram.reshape(len(counts), width).cumsum(axis=1)
    return [(cumulative > _nearest_rank(counts, percent)[:, None]).argmax(axis=1) for percent in percents]


def _check(tokens: np.ndarray, token_ptr: np.ndarray, visible: np.ndarray, k: int, num_layers: int) -> None:
    """A broken capture must not become a record."""
    first, end = token_ptr[:-1], token_ptr[1:]
    if (bad := end - first != np.minimum(visible, k)).any():
        raise ValueError(f"{_where(bad, num_layers)}: the selection does not hold min(k, seq_len) positions")
    if (bad := tokens[end - 1] >= visible).any():
        raise ValueError(f"{_where(bad, num_layers)}: a selected position lies in the future")
    repeated = ~_changes(tokens, first)
    if repeated.any():
        bad = np.add.reduceat(repeated, first) > 0
        raise ValueError(f"{_where(bad, num_layers)}: a position was selected twice")


def _where(bad: np.ndarray, num_layers: int) -> str:
    request, layer = divmod(int(bad.argmax()), num_layers)
    return f"request {request} of the step, layer {layer}"
