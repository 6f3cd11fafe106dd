"""Copies units and computes their checksums: two compiled loops that run without the GIL.

A unit is read as words of 8 bytes, or of 4 or 1 if it is not a multiple of 8. Each word is mixed by an
invertible function of its place, and the results are added to a number that depends on the key. So a
change within one word is always seen, and any other change except about one in 2**64: also swapped
words, another key's unit, and zeros from a hole in a file. It guards against accidents, not against an
adversary. A copy with its checksum costs a few to twenty percent more than the copy alone.

    sums = np.empty(len(keys), np.uint64)
    copy_units(pool, slots, out, rows, keys, sums)     # out[rows] = pool[slots]
    sum_units(out, rows, keys, again)                  # again == sums
"""

from __future__ import annotations

import numpy as np

from dsatrace.jit import cached_njit

# numba turns uint64 mixed with int64 into float64, hence the types.
_ODD, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4E)
_KEY_ODD, _START = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)
_SHIFT = np.uint64(29)
_WORD_TYPES = ("uint64", "uint32", "uint8")


def sum_units(buffer: np.ndarray, rows: np.ndarray, keys: np.ndarray, sums: np.ndarray) -> None:
    """`sums[i]` = the checksum of `buffer[rows[i]]`, (M, unit_bytes) uint8, under `keys[i]`."""
    _sum_words(buffer.view(_word(buffer.shape[1])), rows, keys, sums)


def copy_units(
    source: np.ndarray,
    source_rows: np.ndarray,
    target: np.ndarray,
    target_rows: np.ndarray,
    keys: np.ndarray,
    sums: np.ndarray,
) -> None:
    """`target[target_rows[i]] = source[source_rows[i]]`, its checksum into `sums[i]`.

    Units are as long as the shorter rows; the rest of the longer rows is padding.
    """
    word = _word(min(source.shape[1], target.shape[1]))
    _copy_words(source.view(word), source_rows, target.view(word), target_rows, keys, sums)


def _word(unit_bytes: int) -> type[np.unsignedinteger]:
    return np.uint64 if unit_bytes % 8 == 0 else np.uint32 if unit_bytes % 4 == 0 else np.uint8


@cached_njit(nogil=True, inline="always")
def _mix(word, j):  # type: ignore[no-untyped-def]
    """Word j's part of the sum; the factor is odd at every place."""
    wide = np.uint64(word)
    return (wide ^ (wide >> _SHIFT)) * (_ODD + np.uint64(j) * _STEP)


@cached_njit(
    [f"void({word}[:,::1], int64[::1], uint64[::1], uint64[::1])" for word in _WORD_TYPES],
    nogil=True,
)
def _sum_words(buffer, rows, keys, sums):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        unit = buffer[rows[i]]
        total = _START ^ (keys[i] * _KEY_ODD)
        for j in range(len(unit)):
            total += _mix(unit[j], j)
        sums[i] = total


@cached_njit(
    [
        f"void({word}[:,::1], int64[::1], {word}[:,::1], int64[::1], uint64[::1], uint64[::1])"
        for word in _WORD_TYPES
    ],
    nogil=True,
)
def _copy_words(source, source_rows, target, target_rows, keys, sums):  # type: ignore[no-untyped-def]
    for i in range(len(source_rows)):
        old, new = source[source_rows[i]], target[target_rows[i]]
        total = _START ^ (keys[i] * _KEY_ODD)
        for j in range(min(len(old), len(new))):
            new[j] = old[j]
            total += _mix(old[j], j)
        sums[i] = total
