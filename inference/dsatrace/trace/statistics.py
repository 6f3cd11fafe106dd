"""Derives the statistics of a whole step's selections in one compiled pass.

Knows no file, no tier and no score. Records are request-major: record r is request r // L, set r % L,
of L sets per request (see `kind`). Ids that say where tokens lie become those tokens first; of ids that
do not, only `ids` means something, and what stands beside it is not written.

    stats = fused_statistics(positions, seq_len, cached_blocks, block_size=16)
    stats.block_ids[stats.block_ptr[0]:stats.block_ptr[1]]     # blocks of the first record
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsatrace.trace.kernels import derive_step
from dsatrace.trace.kind import SelectionKind, engine_kind


@dataclasses.dataclass(frozen=True)
class StepStatistics:
    """Statistics of R = B x L records that select N tokens in U touched blocks, in CSR form."""

    tokens: np.ndarray  # (N,) int32, selected positions, ascending within a record
    token_ptr: np.ndarray  # (R + 1,) int64
    offset_min: np.ndarray  # (R,) int64; offset = query position - selected position
    offset_p50: np.ndarray  # (R,) int64
    offset_max: np.ndarray  # (R,) int64
    block_ids: np.ndarray  # (U,) int32, ascending within a record
    block_ptr: np.ndarray  # (R + 1,) int64
    tokens_in_block: np.ndarray  # (U,) int64, selected tokens of each touched block
    tokens_p50: np.ndarray  # (R,) int64, over the record's touched blocks
    tokens_p95: np.ndarray  # (R,) int64
    num_prefix_blocks: np.ndarray  # (R,) int64, those of the shared prefix: the record's first ones
    ids: np.ndarray  # (M,) int32, selected ids, ascending within a record; `tokens` where they are those
    id_ptr: np.ndarray  # (R + 1,) int64

    @property
    def num_tokens(self) -> np.ndarray:
        return np.diff(self.token_ptr)  # (R,)

    @property
    def num_ids(self) -> np.ndarray:
        return np.diff(self.id_ptr)  # (R,)

    @property
    def num_blocks(self) -> np.ndarray:
        return np.diff(self.block_ptr)  # (R,)


def request_major(per_layer: np.ndarray) -> np.ndarray:
    """(L, B, ...) as captured -> (B * L, ...) as recorded."""
    num_layers, num_requests = per_layer.shape[:2]
    return per_layer.swapaxes(0, 1).reshape(num_requests * num_layers, *per_layer.shape[2:])


class Scratch:
    """Memory for the large arrays of a step, used again for the next one.

    Fresh memory of this size comes from the system page by page, which at batch 4 takes 2.5 times as
    long as the statistics.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int, dtype: type) -> np.ndarray:
        """An uninitialised `(size,)` array; the one taken before under this name is overwritten."""
        array = self._arrays.get(name)
        if array is None or len(array) < size:
            array = self._arrays[name] = np.empty(size, dtype=dtype)
        return array[:size]


def fused_statistics(
    positions: np.ndarray,  # (L, B, K) int32 ids, -1 where there is none
    seq_len: np.ndarray,  # (B,) positions visible to the query
    cached_blocks: np.ndarray,  # (B,) blocks of the shared prefix
    block_size: int,  # tokens
    scratch: Scratch | None = None,
    kind: SelectionKind | None = None,
) -> StepStatistics:
    """The statistics, in one pass without the GIL; call `compile_kernels` before the run.

    Without `kind` the ids are the engine's. With `scratch` the result is valid until the next call with
    it. Raises `ValueError` for a selection that repeats an id, reaches into the future, or does not hold
    as many as it must: of the engine min(K, seq_len), of another door 1 to top-k.
    """
    scratch = scratch or Scratch()
    num_layers, num_requests, k = positions.shape
    kind = kind or engine_kind(num_layers, k)
    visible = np.repeat(np.asarray(seq_len, dtype=np.int64), num_layers)  # (R,)
    cached = np.repeat(np.asarray(cached_blocks, dtype=np.int64), num_layers)
    # numpy sorts with SIMD and without the GIL: faster than a bitmap of the context.
    ordered = scratch.take("ordered", positions.size, np.int32).reshape(-1, k)  # (R, K), -1 first
    ordered.reshape(num_requests, num_layers, k)[:] = positions.swapaxes(0, 1)
    ordered.sort(axis=1)
    ids, limits = ordered, visible
    if kind.is_exact:
        counts = np.minimum(visible, k)
    else:
        limits = kind.limits(visible)
        if fault := _fault(ids, limits, kind):
            raise ValueError(fault)
        ordered, visible = _tokens_of(ids, visible, kind)
        counts = np.count_nonzero(ordered >= 0, axis=1)
    num_records, num_tokens = len(visible), int(counts.sum())
    tokens = scratch.take("tokens", num_tokens, np.int32)
    block_ids = scratch.take("block_ids", num_tokens, np.int32)
    tokens_in_block = scratch.take("tokens_in_block", num_tokens, np.int64)
    token_ptr, block_ptr = np.empty((2, num_records + 1), dtype=np.int64)
    offsets, blocks = np.zeros((2, 3, num_records), dtype=np.int64)
    whole = derive_step(
        ordered,
        counts,
        visible,
        cached,
        min(block_size, 2**31 - 1),  # no position lies higher
        tokens,
        token_ptr,
        offsets,
        block_ids,
        block_ptr,
        tokens_in_block,
        blocks,
    )
    if not whole:
        raise ValueError(_fault(ids, limits, kind))
    num_blocks = int(block_ptr[-1])
    own_ids = kind.unit_tokens > 1
    id_ptr = np.cumsum([0, *np.count_nonzero(ids >= 0, axis=1)]) if own_ids else token_ptr
    return StepStatistics(
        tokens=tokens,
        token_ptr=token_ptr,
        offset_min=offsets[0],
        offset_p50=offsets[1],
        offset_max=offsets[2],
        block_ids=block_ids[:num_blocks],
        block_ptr=block_ptr,
        tokens_in_block=tokens_in_block[:num_blocks],
        tokens_p50=blocks[0],
        tokens_p95=blocks[1],
        num_prefix_blocks=blocks[2],
        ids=ids[ids >= 0] if own_ids else tokens,
        id_ptr=id_ptr,
    )


def count_blocks(tokens: np.ndarray, token_ptr: np.ndarray, block_size: int) -> np.ndarray:
    """Touched blocks of each record at any block size, (R,) int64."""
    blocks, first = tokens // block_size, token_ptr[:-1]
    is_new = np.empty(len(blocks), dtype=bool)
    np.not_equal(blocks[1:], blocks[:-1], out=is_new[1:])
    is_new[first] = True
    return np.add.reduceat(is_new, first, dtype=np.int64)


def of_request(
    values: np.ndarray, pointers: np.ndarray, b: int, num_sets: int
) -> tuple[np.ndarray, np.ndarray]:
    """One request's part of a CSR array, all sets: its values, and pointers (L + 1,) into them."""
    own = pointers[b * num_sets : (b + 1) * num_sets + 1]
    return values[own[0] : own[-1]], own - own[0]


def _tokens_of(ids: np.ndarray, visible: np.ndarray, kind: SelectionKind) -> tuple[np.ndarray, np.ndarray]:
    """Ascending tokens (R, N) that ascending ids (R, K) cover, and what lies above all of them, (R,).

    Ids that do not say where their tokens lie are taken as they are.
    """
    if "positions" not in kind.tells:
        return ids, np.full(len(ids), 2**31 - 1)
    if kind.unit_tokens == 1:
        return ids, visible
    tokens = ids[:, :, None] * kind.unit_tokens + np.arange(kind.unit_tokens, dtype=np.int32)
    tokens[(ids < 0)[:, :, None] | (tokens >= visible[:, None, None])] = -1  # a last block is not full
    tokens = tokens.reshape(len(ids), -1)
    tokens.sort(axis=1)
    return tokens, visible


def _fault(ordered: np.ndarray, limits: np.ndarray, kind: SelectionKind) -> str:
    """Which record's selection is broken, and how; "" where none is. `ordered` (R, K) ascends, every id
    must lie below `limits` (R,)."""
    chosen = ordered >= 0  # (R, K)
    num_chosen, num_sets = chosen.sum(axis=1), len(kind.set_layers)
    if kind.is_exact:
        faults = {
            "the selection does not hold min(k, seq_len) positions": (
                num_chosen != np.minimum(limits, ordered.shape[1])
            )
        }
    else:
        most = np.tile(kind.top_k, len(ordered) // num_sets)
        faults = {
            "nothing is selected; leave the row out": num_chosen == 0,
            "more ids than its top-k": num_chosen > most,
        }
    selected = "position" if kind.holds("selected_token_pos") else "id"
    article = "a" if selected == "position" else "an"
    future = f"a selected {selected} lies in the future"
    faults |= {
        future if kind.num_ids is None else "an id beyond num_ids": ordered[:, -1] >= limits,
        f"{article} {selected} was selected twice": (chosen[:, 1:] & (ordered[:, 1:] == ordered[:, :-1])).any(
            axis=1
        ),
    }
    for fault, bad in faults.items():
        if bad.any():
            request, s = divmod(int(bad.argmax()), num_sets)
            head = "" if kind.set_heads[s] is None else f", KV head {kind.set_heads[s]}"
            return f"request {request} of the step, layer {kind.set_layers[s]}{head}: {fault}"
    return ""
