"""What each memory tier served in one step: blocks, bytes, operations, microseconds.

A tier accounts for a whole step at once, all records together (CSR arrays). Knows no
tensor and no file. The tracer asks every tier the same question and never which kind
it is, so a tier that really moves data joins by implementing `Tier`.

    tiers = default_tiers(CacheLayout("demo", 1152, 132))
    account = tiers["hbm"].account(reads)      # FetchAccount, one entry a record
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import numpy as np

from dsatrace.kv.layout import CacheLayout

LatencyKind = Literal["none", "measured", "modelled"]


@dataclasses.dataclass(frozen=True)
class StepReads:
    """The blocks one step touches, for R records (request x layer) that touch T blocks in all.

    Record r touches `block_ids[block_ptr[r]:block_ptr[r + 1]]`: logical ids, ascending,
    at least one, with `tokens_selected` selected tokens in each.
    """

    request_ids: tuple[str, ...]  # (R,)
    layer_ids: np.ndarray  # (R,) int
    step_idx: np.ndarray  # (R,) int
    seq_len: np.ndarray  # (R,) int, tokens the request holds
    block_size: int  # tokens
    batch_size: int  # requests in the step
    block_ids: np.ndarray  # (T,) int
    block_ptr: np.ndarray  # (R + 1,) int64
    tokens_selected: np.ndarray  # (T,) int

    @property
    def num_records(self) -> int:
        return len(self.block_ptr) - 1

    @property
    def num_blocks(self) -> np.ndarray:
        """Touched blocks of each record, (R,) int64."""
        return np.diff(self.block_ptr)

    def per_record(self, values: np.ndarray) -> np.ndarray:
        """Sums (T,) values over each record's blocks: (R,) int64."""
        return np.add.reduceat(values, self.block_ptr[:-1], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class FetchAccount:
    """One tier's share of a step; every array is (R,)."""

    hit_blocks: np.ndarray  # int64, touched blocks this tier served
    bytes_read: np.ndarray  # int64
    bytes_useful: np.ndarray  # int64, of those the selected tokens' own
    read_ops: np.ndarray  # int64
    latency_us: np.ndarray  # float64
    batch_size: int  # requests served together; 0 where nothing is served
    latency_kind: LatencyKind


class Tier(Protocol):
    """A place KV blocks are read from.

    `account` says what this tier served of `reads`, and nothing about the other tiers;
    tiers that share the blocks out among themselves (a buffer and its backing store)
    hold that knowledge in common. Called once a traced step from the writer thread, in
    step order, with every recorded request and layer. Must not change `reads`.
    """

    def account(self, reads: StepReads) -> FetchAccount: ...


class ResidentTier:
    """Every block is here, as in HBM that holds the whole cache: all is read where it lies."""

    def __init__(self, layout: CacheLayout) -> None:
        self._latent_bytes = layout.latent_bytes_per_token

    def account(self, reads: StepReads) -> FetchAccount:
        return FetchAccount(
            hit_blocks=reads.num_blocks,
            bytes_read=tokens_held(reads) * self._latent_bytes,
            bytes_useful=reads.per_record(reads.tokens_selected) * self._latent_bytes,
            read_ops=read_runs(reads),
            latency_us=np.zeros(reads.num_records),
            batch_size=reads.batch_size,
            latency_kind="none",
        )


class NullTier:
    """A tier that holds nothing and serves nothing."""

    def account(self, reads: StepReads) -> FetchAccount:
        zeros = np.zeros(reads.num_records, dtype=np.int64)
        return FetchAccount(zeros, zeros, zeros, zeros, np.zeros(reads.num_records), 0, "none")


def tokens_held(reads: StepReads) -> np.ndarray:
    """Tokens in each record's touched blocks, (R,) int64: the request's last block counts its valid ones."""
    last_block = (reads.seq_len - 1) // reads.block_size
    missing = (last_block + 1) * reads.block_size - reads.seq_len
    touches_last = reads.block_ids[reads.block_ptr[1:] - 1] == last_block
    return reads.num_blocks * reads.block_size - np.where(touches_last, missing, 0)


def read_runs(reads: StepReads) -> np.ndarray:
    """Runs of adjacent block ids in each record, (R,) int64: one read each."""
    starts = np.ones(len(reads.block_ids), dtype=bool)
    starts[1:] = np.diff(reads.block_ids) != 1
    starts[reads.block_ptr[:-1]] = True
    return reads.per_record(starts)


def default_tiers(layout: CacheLayout) -> dict[str, Tier]:
    """HBM holds everything; the pools hold nothing."""
    return {"hbm": ResidentTier(layout), "local_pool": NullTier(), "remote_pool": NullTier()}
