"""The writer's inner loops, compiled by numba: they run without the GIL, beside the model.

Knows no record, no field name and no file. Call `compile_kernels` before the run: it takes seconds
the first time on a machine, and milliseconds later, from numba's cache. After it a call with other
types is an error, so nothing is compiled while a step is written.

    compile_kernels()
    ok = derive_step(ordered, visible, cached_blocks, 16, tokens, token_ptr, ...)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dsatrace.jit import cached_njit

LITERAL, INT, TEXT, RUN = range(4)
"""What an instruction of `write_lines` writes: fixed bytes, a number, a record's text, a list of numbers."""

QUADS = np.frombuffer(bytearray().join(b"%04d" % n for n in range(10000)), dtype="<u4")
"""The four digits of each number below 10000, the first in the lowest byte."""

SLACK = 8
"""Bytes past its text that `write_lines` may overwrite."""

# numba mixes neither signed with unsigned nor 32 with 64 bits without a cost, hence the types.
_ONE, _BYTE, _COMMA, _FOUR_BYTES = np.uint64(1), np.uint64(255), np.uint64(ord(",")), np.uint64(32)
_TEN_THOUSAND, _NO_BLOCK = np.uint32(10_000), np.uint32(2**32 - 1)

_KERNELS: list[tuple[Any, str]] = []


def _kernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compiled for this one signature, by `compile_kernels`."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = cached_njit(nogil=True)(function)
        _KERNELS.append((dispatcher, signature))
        return dispatcher

    return decorate


@functools.cache
def compile_kernels() -> None:
    """Compiles every kernel, or loads it from numba's cache; later calls do nothing."""
    for dispatcher, signature in _KERNELS:
        dispatcher.compile(signature)
        dispatcher.disable_compile()


@cached_njit(nogil=True)
def _nearest_rank(histogram, count, percent):  # type: ignore[no-untyped-def]
    """The quantile of `count` values, of which `histogram[v]` are v."""
    left = max(1, (count * percent + 99) // 100)
    value = 0
    while left > histogram[value]:
        left -= histogram[value]
        value += 1
    return value


@_kernel(
    "boolean(int32[:, ::1], int64[::1], int64[::1], int64[::1], int64, int32[::1], int64[::1],"
    " int64[:, ::1], int32[::1], int64[::1], int64[::1], int64[:, ::1])"
)
def derive_step(  # type: ignore[no-untyped-def]
    ordered,  # (R, K) positions, ascending; -1, where there is none, comes first
    counts,  # (R,) positions that must be there
    visible,  # (R,) positions the query sees
    cached_blocks,  # (R,) blocks of the shared prefix
    block_size,
    tokens,  # out (N,)
    token_ptr,  # out (R + 1,)
    offsets,  # out (3, R): min, p50, max
    block_ids,  # out (N,), the first U are used
    block_ptr,  # out (R + 1,)
    tokens_in_block,  # out (N,), the first U are used
    blocks,  # out (3, R): p50 and p95 of the tokens in a block; blocks of the prefix
):
    """One pass over a sorted step: checks, tokens, offsets, blocks and their quantiles.

    Returns False for a selection that no model makes; the outputs are then undefined.
    """
    num_records, k = ordered.shape
    histogram = np.zeros(k + 1, dtype=np.int64)  # of the tokens in a block
    divisor = np.uint32(block_size)
    at, num_blocks = 0, 0
    token_ptr[0] = block_ptr[0] = 0
    for r in range(num_records):
        count = counts[r]
        selected = ordered[r, k - count :]
        if (
            count < 1
            or selected[0] < 0
            or selected[-1] >= visible[r]
            or (count < k and ordered[r, k - count - 1] >= 0)
        ):
            return False
        query = visible[r] - 1
        # Ascending positions are descending offsets, so the rank counts from the end.
        offsets[0, r] = query - selected[-1]
        offsets[1, r] = query - selected[count - max(1, (count * 50 + 99) // 100)]
        offsets[2, r] = query - selected[0]

        # Where a block begins is unpredictable, so no branch asks: a new block moves the place written to.
        first_block, before, block_before = num_blocks, np.int64(-1), _NO_BLOCK
        num_blocks -= 1
        for i in range(count):
            token = selected[i]
            if token == before:
                return False
            tokens[at + i] = before = token
            block = np.uint32(token) // divisor
            num_blocks += block != block_before
            block_before = block
            block_ids[num_blocks] = block
            tokens_in_block[num_blocks] = i + 1  # for now: where the block ends
        num_blocks += 1
        start = 0
        for u in range(first_block, num_blocks):
            end = tokens_in_block[u]
            tokens_in_block[u] = end - start
            histogram[end - start] += 1
            start = end
            blocks[2, r] += block_ids[u] < cached_blocks[r]
        at += count
        token_ptr[r + 1], block_ptr[r + 1] = at, num_blocks
        blocks[0, r] = _nearest_rank(histogram, num_blocks - first_block, 50)
        blocks[1, r] = _nearest_rank(histogram, num_blocks - first_block, 95)
        for u in range(first_block, num_blocks):
            histogram[tokens_in_block[u]] = 0
    return True


@_kernel("void(int32[::1], int64[::1], int64[::1], int64[::1])")
def count_offsets(tokens, token_ptr, query, counts):  # type: ignore[no-untyped-def]
    """Adds the offset of every token of record r, `query[r] - token`, to the histogram `counts`."""
    for r in range(len(query)):
        for i in range(token_ptr[r], token_ptr[r + 1]):
            counts[query[r] - tokens[i]] += 1


@_kernel("void(int32[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])")
def count_held(tokens, token_ptr, wanted, first, end, held):  # type: ignore[no-untyped-def]
    """Adds to `held[r]` how many of `wanted[first[r]:end[r]]` are among record r's tokens.

    Both ascend, so each bisection begins where the one before it ended.
    """
    for r in range(len(held)):
        low = token_ptr[r]
        for i in range(first[r], end[r]):
            high = token_ptr[r + 1]
            while low < high:
                middle = (low + high) // 2
                if tokens[middle] < wanted[i]:
                    low = middle + 1
                else:
                    high = middle
            held[r] += low < token_ptr[r + 1] and tokens[low] == wanted[i]


@_kernel(
    "void(int32[::1], int64[::1], int32[::1], int64[::1], int64[::1], uint64[::1], int64[::1], int64[::1])"
)
def count_shared(  # type: ignore[no-untyped-def]
    ids,  # the ids of L sets
    ptr,  # (L + 1,)
    before,  # the same one step earlier
    before_ptr,  # (L + 1,), or (1,) where there was none
    set_before,  # (L,) the set in the layer before, -1 where none is compared
    seen,  # a bitmap of all ids, empty before and after
    with_before,  # out (L,)
    with_layer,  # out (L,)
):
    """Counts how many of each set's ids it held a step earlier, and how many the layer before holds."""
    for s in range(len(set_before)):
        own = ids[ptr[s] : ptr[s + 1]]
        if len(before_ptr) == 1 and set_before[s] < 0:
            continue
        for id_ in own:
            seen[id_ >> 6] |= np.uint64(1) << np.uint64(id_ & 63)
        if len(before_ptr) > 1:
            with_before[s] = _count_marked(before[before_ptr[s] : before_ptr[s + 1]], seen)
        if set_before[s] >= 0:
            other = set_before[s]
            with_layer[s] = _count_marked(ids[ptr[other] : ptr[other + 1]], seen)
        for id_ in own:
            seen[id_ >> 6] = 0


@cached_njit(nogil=True)
def _count_marked(ids, seen):  # type: ignore[no-untyped-def]
    count = np.uint64(0)
    for id_ in ids:
        count += (seen[id_ >> 6] >> np.uint64(id_ & 63)) & np.uint64(1)
    return np.int64(count)


@cached_njit(nogil=True, inline="always")
def _put(out, at, source, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        out[at + i - start] = source[i]
    return at + stop - start


@cached_njit(nogil=True)
def _put_int(out, at, value, quads):  # type: ignore[no-untyped-def]
    """Writes a number in decimal; returns where it ends."""
    if value < 0:
        out[at] = ord("-")
        return _put_natural(out, at + 1, -value, quads)
    return _put_natural(out, at, value, quads)


@cached_njit(nogil=True)
def _put_natural(out, at, value, quads):  # type: ignore[no-untyped-def]
    scale = 1
    while value // scale >= 10000:
        scale *= 10000
    head = value // scale
    skipped = _skipped_bits(head)
    _put_word(out, np.uint64(at), np.uint64(quads[head]) >> skipped)
    at += 4 - np.int64(skipped >> np.uint64(3))
    while scale > 1:
        scale //= 10000
        _put_word(out, np.uint64(at), np.uint64(quads[value // scale % 10000]))
        at += 4
    return at


@cached_njit(nogil=True, inline="always")
def _put_word(out, at, word):  # type: ignore[no-untyped-def]
    """Stores eight bytes, the lowest first; written this way, they compile to one instruction."""
    out[at] = word & _BYTE
    for i in range(1, 8):
        out[at + np.uint64(i)] = (word >> np.uint64(8 * i)) & _BYTE


@cached_njit(nogil=True, inline="always")
def _skipped_bits(value):  # type: ignore[no-untyped-def]
    """Bits of the leading zeros among the four digits of a number below 10000."""
    return np.uint64(24 - 8 * (value >= 10) - 8 * (value >= 100) - 8 * (value >= 1000))


@cached_njit(nogil=True)
def _put_run(out, start_at, values, start, stop, quads):  # type: ignore[no-untyped-def]
    """Writes `[1,2,3]` for numbers >= 0. This is the bulk of a trace, so a number takes one store.

    Eight bytes hold a number below 10 million and its comma; `at` moves on by those used. Unsigned
    indices save the test for negative ones.
    """
    at = np.uint64(start_at)
    out[at] = ord("[")
    at += _ONE
    for i in range(np.uint64(start), np.uint64(stop)):
        value = np.uint32(values[i])
        head = value // _TEN_THOUSAND
        low = np.uint64(quads[value - head * _TEN_THOUSAND])
        if head == 0:
            skipped = _skipped_bits(value)
            word, bits = low >> skipped, _FOUR_BYTES - skipped
        elif head < 1000:
            skipped = _skipped_bits(head)
            bits = _FOUR_BYTES - skipped
            word, bits = (np.uint64(quads[head]) >> skipped) | (low << bits), bits + _FOUR_BYTES
        else:
            at = np.uint64(_put_natural(out, np.int64(at), np.int64(value), quads))
            word, bits = np.uint64(0), np.uint64(0)
        _put_word(out, at, word | (_COMMA << bits))
        at += (bits >> np.uint64(3)) + _ONE
    if stop > start:
        at -= _ONE
    out[at] = ord("]")
    return np.int64(at + _ONE)


@_kernel(
    "int64(int32[:, ::1], uint8[::1], int64[::1], int64[:, ::1], uint8[::1], int64[:, :, ::1],"
    " int32[::1], int64[:, :, ::1], int64, uint32[::1], uint8[::1])"
)
def write_lines(  # type: ignore[no-untyped-def]
    program,  # (P, 2): what to write, and which of them
    literals,  # bytes
    literal_ptr,  # (literals + 1,)
    ints,  # (columns, R)
    texts,  # bytes
    text_spans,  # (columns, 2, R): start and stop in `texts`
    values,  # int32, all >= 0
    run_spans,  # (columns, 2, R): start and stop in `values`
    num_records,
    quads,  # QUADS
    out,
):
    """Runs the program once per record, into `out`; returns the number of bytes written."""
    at = 0
    for r in range(num_records):
        for step in range(len(program)):
            kind, which = program[step, 0], program[step, 1]
            if kind == LITERAL:
                at = _put(out, at, literals, literal_ptr[which], literal_ptr[which + 1])
            elif kind == INT:
                at = _put_int(out, at, ints[which, r], quads)
            elif kind == TEXT:
                at = _put(out, at, texts, text_spans[which, 0, r], text_spans[which, 1, r])
            else:
                at = _put_run(out, at, values, run_spans[which, 0, r], run_spans[which, 1, r], quads)
    return at
