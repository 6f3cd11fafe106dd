"""What each tier of the KV hierarchy served of one step, seen from outside.

Records account for three tiers: HBM, a local pool and a remote pool. Here is what an
account is, and the one of a run that holds everything in HBM; that of a run whose latents
lie elsewhere too is `offloaded_account.py`. The tracer asks either the same question.

    tiers = default_tiers(CacheLayout("demo", 1152, 132))
    account = tiers.accounts(reads)["hbm"]      # FetchAccount, one entry a record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from dsatrace.kv.fetches import StepFetches
from dsatrace.kv.layout import CacheLayout

LatencyKind = Literal["none", "measured", "modelled"]


@dataclasses.dataclass(frozen=True)
class StepReads:
    """What one step selects, for R records (request x layer, request-major): N tokens in T touched blocks.

    Record r touches `block_ids[block_ptr[r]:block_ptr[r + 1]]`: logical ids, ascending,
    at least one, with `tokens_selected` selected tokens in each.
    """

    seq_len: np.ndarray  # (R,) int, tokens the request holds
    block_size: int  # tokens
    batch_size: int  # requests in the step
    block_ids: np.ndarray  # (T,) int
    block_ptr: np.ndarray  # (R + 1,) int64
    tokens_selected: np.ndarray  # (T,) int
    tokens: np.ndarray  # (N,) int32, selected positions, ascending within a record
    token_ptr: np.ndarray  # (R + 1,) int64
    positions: np.ndarray  # (L, B, K) int32, the same as captured: score order, -1 where there is none
    fetches: StepFetches | None = None  # where they were found; None: in HBM

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
    """One tier's share of a step; every array is (R,). The fields are those of a record, in its order."""

    hit_blocks: np.ndarray  # int64, touched blocks this tier served
    bytes_read: np.ndarray  # int64
    read_ops: np.ndarray  # int64
    latency_us: np.ndarray  # float64
    batch_size: int  # requests served together; 0 where nothing is served
    bytes_useful: np.ndarray  # int64, of the bytes read the selected tokens' own
    latency_kind: LatencyKind

    def columns(self) -> dict[str, Any]:
        """Every field by name, in the record's order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Tiers(Protocol):
    """The places KV blocks are read from, all together: what one serves, the next is not asked for.

    Called once a traced step from the writer thread, in step order, with every recorded
    request and layer. Must not change `reads`; `ValueError` for reads that cannot be of its run.
    """

    def accounts(self, reads: StepReads) -> Mapping[str, FetchAccount]:
        """By the names and in the order of `schema.TIER_NAMES`."""
        ...


class ResidentTiers:
    """HBM holds the whole cache: every block is read where it lies, and the pools hold nothing."""

    def __init__(self, layout: CacheLayout) -> None:
        self._latent_bytes = layout.latent_bytes_per_token

    def accounts(self, reads: StepReads) -> dict[str, FetchAccount]:
        if reads.fetches is not None:
            raise ValueError("the capture says which tier served it, and the run has no tiers: RunInfo.tiers")
        zeros, no_time = np.zeros(reads.num_records, dtype=np.int64), np.zeros(reads.num_records)
        nothing = FetchAccount(zeros, zeros, zeros, no_time, 0, zeros, "none")
        hbm = FetchAccount(
            hit_blocks=reads.num_blocks,
            bytes_read=tokens_held(reads) * self._latent_bytes,
            read_ops=read_runs(reads),
            latency_us=no_time,
            batch_size=reads.batch_size,
            bytes_useful=reads.per_record(reads.tokens_selected) * self._latent_bytes,
            latency_kind="none",
        )
        return {"hbm": hbm, "local_pool": nothing, "remote_pool": nothing}


def tokens_held(reads: StepReads) -> np.ndarray:
    """Tokens in each record's touched blocks, (R,) int64: the request's last block counts its valid ones."""
    return reads.num_blocks * reads.block_size - missing_in_last_block(reads)


def missing_in_last_block(reads: StepReads) -> np.ndarray:
    """Tokens that the record's last touched block does not hold, (R,) int64: 0 but for the request's last."""
    last_block = (reads.seq_len - 1) // reads.block_size
    missing = (last_block + 1) * reads.block_size - reads.seq_len
    touches_last = reads.block_ids[reads.block_ptr[1:] - 1] == last_block
    return np.where(touches_last, missing, 0)


def read_runs(reads: StepReads) -> np.ndarray:
    """Runs of adjacent block ids in each record, (R,) int64: one read each."""
    starts = np.ones(len(reads.block_ids), dtype=bool)
    starts[1:] = np.diff(reads.block_ids) != 1
    starts[reads.block_ptr[:-1]] = True
    return reads.per_record(starts)


def default_tiers(layout: CacheLayout) -> Tiers:
    """HBM holds everything; the pools hold nothing."""
    return ResidentTiers(layout)
