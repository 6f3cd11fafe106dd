"""A trace of requests as a block cache sees it: lengths, and an exact id for each full block.

Equal ids mean equal prefixes, without a hash that could collide: an id stands for (the id before it,
the block's tokens), and tokens are compared. Ragged rows are flat arrays with offsets (CSR), so that
a replay of millions of blocks touches no Python object. Knows no cache. Live requests get their keys
one at a time from `kv.prefix.KeyChain` instead.

    trace = BlockTrace.from_tokens([[1, 2, 3, 4, 5], [1, 2, 9]], block_size=2)
    trace.keys_of(0), trace.keys_of(1)            # [0, 1], [0]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsatrace.jit import cached_njit

TokenLists = Sequence[Sequence[int]] | Sequence[np.ndarray]


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class BlockTrace:
    """R requests in order of arrival, B full blocks in all, K different ones.

    A request's keys cover its prompt and then its output. There may be fewer keys than full blocks
    (a trace of ids has none for outputs); blocks without a key are never found. Conversation and
    workload of each request go along, for whoever groups requests; a pool does not look at them.
    """

    block_size: int  # tokens
    prompt_tokens: np.ndarray  # (R,) int64, at least 1
    output_tokens: np.ndarray  # (R,) int64
    keys: np.ndarray  # (B,) int32, in [0, K)
    key_ptr: np.ndarray  # (R + 1,) int64
    parents: np.ndarray  # (K,) int32, the key before each key; -1 - root for a first block
    time_s: np.ndarray  # (R,) float64, ascending
    conversation: np.ndarray = dataclasses.field(default_factory=_none)  # (R,) int32, -1: unknown
    workload: np.ndarray = dataclasses.field(default_factory=_none)  # (R,) int32, index of workload_names
    workload_names: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} must be at least 1")
        for name, unknown in (("conversation", -1), ("workload", 0)):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.full(self.num_requests, unknown, np.int32))
        columns = (self.prompt_tokens, self.output_tokens, self.time_s, self.conversation, self.workload)
        shapes = {len(self.key_ptr) - 1, *map(len, columns)}
        if len(shapes) != 1:
            raise ValueError(f"the columns of a trace have different lengths: {sorted(shapes)}")
        checks = (
            (self.prompt_tokens < 1, "has no prompt token"),
            (self.output_tokens < 0, "has a negative number of output tokens"),
            (np.diff(self.time_s, prepend=-np.inf) < 0, "arrives before the request above it"),
            (np.diff(self.key_ptr) > self.total_tokens // self.block_size, "has more ids than full blocks"),
        )
        for bad, what in checks:
            if bad.any():
                raise ValueError(f"request {int(np.argmax(bad))} of the trace {what}")

    @property
    def num_requests(self) -> int:
        return len(self.prompt_tokens)

    @property
    def num_keys(self) -> int:
        return len(self.parents)

    @property
    def total_tokens(self) -> np.ndarray:
        """Prompt and output together, (R,) int64."""
        tokens: np.ndarray = self.prompt_tokens + self.output_tokens
        return tokens

    @property
    def num_blocks_at_most(self) -> int:
        """Blocks that hold all requests with nothing shared: a cache that never evicts."""
        return int((-(-self.total_tokens // self.block_size)).sum())

    @property
    def prompt_blocks(self) -> np.ndarray:
        """(R,) int64, full blocks of each prompt."""
        return self.prompt_tokens // self.block_size

    @property
    def needed_blocks(self) -> np.ndarray:
        """(R,) int64, blocks that each prompt takes, its last partial one included."""
        return -(-self.prompt_tokens // self.block_size)

    def keys_of(self, request: int) -> list[int]:
        keys: list[int] = self.keys[self.key_ptr[request] : self.key_ptr[request + 1]].tolist()
        return keys

    @classmethod
    def from_tokens(
        cls,
        prompts: TokenLists,
        outputs: TokenLists | None = None,
        *,
        block_size: int,
        time_s: Sequence[float] | None = None,
        extra: Sequence[Sequence[str]] | None = None,
    ) -> BlockTrace:
        """From token ids. Requests with different `extra` keys (salt, adapter) share nothing."""
        if block_size < 1:
            raise ValueError(f"block_size {block_size} must be at least 1")
        prompt_tokens = _lengths(prompts)
        output_tokens = np.zeros_like(prompt_tokens) if outputs is None else _lengths(outputs)
        if len(output_tokens) != len(prompt_tokens):
            raise ValueError(f"{len(prompt_tokens)} prompts but {len(output_tokens)} outputs")
        parts = [prompts] if outputs is None else [prompts, outputs]
        arrays = [_int32(row) for rows in zip(*parts, strict=True) for row in rows]
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        roots = np.zeros(len(prompt_tokens), np.int32)
        if extra is not None:
            seen: dict[tuple[str, ...], int] = {(): 0}
            roots[:] = [seen.setdefault(tuple(names), len(seen)) for names in extra]
        token_ptr = offsets_of(prompt_tokens + output_tokens)
        keys, key_ptr, parents = exact_block_ids(tokens, token_ptr, roots, block_size)
        times = _times(time_s, len(prompt_tokens))
        return cls(block_size, prompt_tokens, output_tokens, keys, key_ptr, parents, times)

    @classmethod
    def from_block_ids(
        cls,
        block_ids: Sequence[Sequence[int]],
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        *,
        block_size: int,
        time_s: Sequence[float] | None = None,
        output_ids: Sequence[Sequence[int]] | None = None,
        tokens_per_id: int | None = None,
    ) -> BlockTrace:
        """From ids that stand for a block and its whole prefix already, as in public traces.

        The id of a prompt's partial last block is dropped: it is never shared. `output_ids` are
        those of the blocks that outputs complete, if they are known. `block_size` may be a multiple
        of the tokens of an id: a larger block is named by its last id. Raises `ValueError` for an
        id that follows two different ids.
        """
        per_id = tokens_per_id or block_size
        factor, rest = divmod(block_size, per_id)
        if rest or factor < 1:
            raise ValueError(f"blocks of {block_size} tokens are no multiple of ids of {per_id}")
        prompts = np.asarray(prompt_tokens, dtype=np.int64)
        num_full = np.minimum(_lengths(block_ids), prompts // per_id).tolist()
        rows = zip(block_ids, num_full, output_ids or [()] * len(prompts), strict=True)
        chains = [
            np.concatenate((np.asarray(ids[:n], np.int64), np.asarray(more, np.int64)))[factor - 1 :: factor]
            for ids, n, more in rows
        ]
        counts, flat = _lengths(chains), np.concatenate([np.zeros(0, np.int64), *chains])
        names, keys = np.unique(flat, return_inverse=True)
        keys, key_ptr = keys.astype(np.int32), offsets_of(counts)
        parents, wrong = parents_of(keys, key_ptr, len(names))
        if wrong is not None:
            request, key = wrong
            raise ValueError(
                f"request {request} of the trace: block id {names[key]} follows another block than "
                "before, so it does not name its prefix"
            )
        outputs = np.asarray(output_tokens, dtype=np.int64)
        times = _times(time_s, len(prompts))
        return cls(block_size, prompts, outputs, keys, key_ptr, parents, times)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of R ragged rows begins in a flat array, and where the last one ends: (R + 1,) int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def parents_of(
    ids: np.ndarray, offsets: np.ndarray, num_ids: int
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The id that each id follows within its row, (num_ids,) int32, -1 for an id that begins a row.

    Also the first (row, id) that follows another id than at the id's first appearance, or None.
    """
    before = np.empty_like(ids)
    before[1:] = ids[:-1]
    before[offsets[:-1][np.diff(offsets) > 0]] = -1
    parents = np.full(num_ids, -1, np.int32)
    parents[ids[::-1]] = before[::-1]  # of equal indices the last assignment stays: the first appearance
    wrong = np.flatnonzero(parents[ids] != before)
    if not len(wrong):
        return parents, None
    row = int(np.searchsorted(offsets, wrong[0], "right")) - 1
    return parents, (row, int(ids[wrong[0]]))


def exact_block_ids(
    tokens: np.ndarray, token_ptr: np.ndarray, roots: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of all full blocks, in order of first appearance: keys (B,), key_ptr (R + 1,), parents (K,).

    `tokens` (T,) int holds the requests one after the other, request r from `token_ptr[r]`;
    requests with different `roots` (R,) share no id.
    """
    key_ptr = offsets_of(np.diff(token_ptr) // block_size)
    num_blocks = int(key_ptr[-1])
    if num_blocks >= 2**31:
        raise ValueError(f"{num_blocks} blocks are more than 31 bits can number; use a larger block size")
    keys = np.empty(num_blocks, np.int32)
    parents = np.empty(num_blocks, np.int32)
    first_token = np.empty(num_blocks, np.int64)
    size = 1 << max(4, (2 * num_blocks - 1).bit_length())
    slots = np.full(size, -1, np.int64)
    num_keys = _intern(tokens, token_ptr, roots, block_size, key_ptr, keys, parents, first_token, slots)
    return keys, key_ptr, parents[:num_keys].copy()


@cached_njit(nogil=True)
def _intern(tokens, token_ptr, roots, block_size, key_ptr, keys, parents, first_token, slots):  # type: ignore[no-untyped-def]
    """Numbers the blocks by an open hash table from (parent, tokens) to id; a slot is a 32-bit
    fingerprint and the id. Returns how many ids there are."""
    mask = np.uint64(len(slots) - 1)
    num_keys = 0
    for r in range(len(roots)):
        parent = np.int64(-1 - roots[r])
        start = token_ptr[r]
        for b in range(key_ptr[r], key_ptr[r + 1]):
            mixed = np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15)
            for i in range(start, start + block_size):
                mixed = (mixed ^ np.uint64(tokens[i])) * np.uint64(0xD6E8FEB86659FD93)
                mixed ^= mixed >> np.uint64(32)
            fingerprint = np.int64(mixed >> np.uint64(33))
            at = mixed & mask
            while True:
                slot = slots[at]
                if slot < 0:
                    slots[at] = (fingerprint << 32) | num_keys
                    parents[num_keys], first_token[num_keys] = parent, start
                    key = num_keys
                    num_keys += 1
                    break
                key = slot & 0xFFFFFFFF
                if slot >> 32 == fingerprint and parents[key] == parent:
                    other = first_token[key]
                    same = True
                    for i in range(block_size):
                        if tokens[start + i] != tokens[other + i]:
                            same = False
                            break
                    if same:
                        break
                at = (at + np.uint64(1)) & mask
            keys[b] = key
            parent = np.int64(key)
            start += block_size
    return num_keys


def _int32(row: Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(row, np.ndarray):
        return row.astype(np.int32, copy=False)
    return np.fromiter(row, np.int32, len(row))  # half again as fast as asarray


def _lengths(rows: Sequence[Sequence[int]] | Sequence[np.ndarray]) -> np.ndarray:
    return np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))


def _times(time_s: Sequence[float] | None, num_requests: int) -> np.ndarray:
    """Seconds, or 0, 1, 2, ... where a trace has no times."""
    return np.asarray(np.arange(num_requests) if time_s is None else time_s, dtype=np.float64)
