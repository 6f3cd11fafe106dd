"""Blocks that a uniform and a recency selector would touch: what a measured number stands beside.

Closed formulas over (context, k, block size); knows no trace. A locality claim means
something only against these two.

    uniform_blocks(np.array([32768]), 2048, 16)     # about 1321 of 2048 blocks
    recency_blocks(np.array([32768]), 2048, 16)     # 128
"""

from __future__ import annotations

import numpy as np


def context_blocks(seq_len: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks of the whole context."""
    return -(-seq_len // block_size)


def recency_blocks(seq_len: np.ndarray, k: np.ndarray | int, block_size: int) -> np.ndarray:
    """Blocks that the last k tokens lie in."""
    return (seq_len - 1) // block_size - (seq_len - k) // block_size + 1


def uniform_blocks(seq_len: np.ndarray, k: np.ndarray | int, block_size: int) -> np.ndarray:
    """Expected blocks touched by k tokens drawn without replacement from `seq_len`, exactly.

    A block of b tokens is missed with probability C(N - b, k) / C(N, k) (hypergeometric);
    the last block counts its valid tokens.
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
    return full * (1 - missed[:, -1]) + last
