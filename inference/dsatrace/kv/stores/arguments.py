"""Whether a batch's arrays are what the contract of `Store` asks for.

rows = check_batch(unit_bytes, keys, buffer, rows)      # (N,) int64, or ValueError
"""

from __future__ import annotations

import numpy as np

ALIGNMENT = 8  # bytes; units are copied and summed as words


def check_keys(keys: np.ndarray) -> None:
    """Raises `ValueError` unless `keys` is a (N,) uint64 array without gaps."""
    if keys.dtype != np.uint64 or keys.ndim != 1 or not keys.flags.c_contiguous:
        raise ValueError(f"keys must be a contiguous (N,) uint64 array, not {keys.shape} {keys.dtype}")


def check_batch(unit_bytes: int, keys: np.ndarray, buffer: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """The rows of `buffer` that the units are, (N,) int64; raises `ValueError` as the contract says."""
    check_keys(keys)
    if buffer.dtype != np.uint8 or buffer.ndim != 2 or not buffer.flags.c_contiguous:
        raise ValueError(f"a buffer is C-contiguous (M, unit_bytes) uint8, not {buffer.shape} {buffer.dtype}")
    if buffer.shape[1] != unit_bytes:
        raise ValueError(f"the store's units are {unit_bytes} bytes; the buffer's rows are {buffer.shape[1]}")
    if buffer.__array_interface__["data"][0] % ALIGNMENT:
        raise ValueError(f"the buffer does not start at a multiple of {ALIGNMENT} bytes")
    if rows is None:
        if len(buffer) != len(keys):
            raise ValueError(f"{len(keys)} keys for {len(buffer)} rows; name the rows")
        return np.arange(len(keys), dtype=np.int64)
    if rows.shape != keys.shape or rows.dtype.kind not in "iu":
        raise ValueError(f"rows must be {len(keys)} integers, not {rows.shape} {rows.dtype}")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(buffer):
        raise ValueError(f"rows {rows.min()}..{rows.max()} lie outside the buffer's {len(buffer)}")
    return np.ascontiguousarray(rows, dtype=np.int64)


def are_distinct(numbers: np.ndarray) -> bool:
    ordered = np.sort(numbers)
    return not (ordered[1:] == ordered[:-1]).any()
