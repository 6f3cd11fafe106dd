"""What each tier of the KV hierarchy served of one step, as records account for it.

The tiers are HBM, a local pool and a remote pool. `StepReads` is what a step selects, `FetchAccount`
one tier's share of it. `Tiers` is the interface that the tracer calls; `ResidentTiers` is for runs
that hold everything in HBM, `OffloadedTiers` for runs whose latents also lie in pools. Knows no store,
no tensor of the model and no file.

    tiers = default_tiers(CacheLayout("demo", 1152, 132))
    account = tiers.accounts(reads)["hbm"]      # FetchAccount, one entry a record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.tiers.fetches import HBM, StepFetches
from dsatrace.schema import TIER_NAMES, LatencyKind


@dataclasses.dataclass(frozen=True)
class StepReads:
    """What one step selects, for R records (request x layer, request-major): N tokens in T touched blocks.

    Record r touches the blocks `block_ids[block_ptr[r]:block_ptr[r + 1]]`: at least one, logical ids,
    ascending.
    """

    seq_len: np.ndarray  # (R,) int, tokens the request holds
    block_size: int  # tokens
    batch_size: int  # requests in the step
    block_ids: np.ndarray  # (T,) int
    block_ptr: np.ndarray  # (R + 1,) int64
    tokens_selected: np.ndarray  # (T,) int, selected tokens in each touched block
    tokens: np.ndarray  # (N,) int32, selected positions, ascending within a record
    token_ptr: np.ndarray  # (R + 1,) int64
    positions: np.ndarray  # (L, B, K) int32, the same as captured: score order, padded by -1
    fetches: StepFetches | None = None  # which tier held them; None: HBM

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
    """One tier's share of a step; every array is (R,). The fields are a record's, in its order."""

    hit_blocks: np.ndarray  # int64, touched blocks this tier served
    bytes_read: np.ndarray  # int64
    read_ops: np.ndarray  # int64
    latency_us: np.ndarray  # float64
    batch_size: int  # requests served together; 0 if none is served
    bytes_useful: np.ndarray  # int64, bytes read that belong to selected tokens
    latency_kind: LatencyKind

    def columns(self) -> dict[str, Any]:
        """Every field by name, in the record's order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Tiers(Protocol):
    """All places that KV blocks are read from: what one tier serves, the next is not asked for.

    Called once per traced step by the writer thread, in step order, with every recorded request and
    layer. Must not change `reads`. Raises `ValueError` for reads that cannot belong to its run.
    """

    def accounts(self, reads: StepReads) -> Mapping[str, FetchAccount]:
        """By name, in the order of `schema.TIER_NAMES`."""
        ...


def default_tiers(layout: CacheLayout) -> Tiers:
    """HBM holds everything; the pools hold nothing."""
    return ResidentTiers(layout)


class ResidentTiers:
    """HBM holds the whole cache; the pools hold nothing."""

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
    """Tokens in each record's touched blocks, (R,) int64; a request's last block may be partly filled."""
    held: np.ndarray = reads.num_blocks * reads.block_size - missing_in_last_block(reads)
    return held


def missing_in_last_block(reads: StepReads) -> np.ndarray:
    """Empty slots in each record's last touched block, (R,) int64: 0 unless it is the request's last."""
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


@dataclasses.dataclass(frozen=True)
class OffloadedAccount(FetchAccount):
    """One tier's share of a step where there are several; every array is (R,) int64."""

    requested_tokens: np.ndarray
    hit_tokens: np.ndarray
    missed_tokens: np.ndarray
    requested_blocks: np.ndarray
    missed_blocks: np.ndarray
    evicted_units: np.ndarray
    bytes_written: np.ndarray
    errors: np.ndarray


class OffloadedTiers:
    """HBM and one or two pools behind it; a pool that `latency_kinds` does not name does not exist."""

    def __init__(
        self,
        latent_bytes: int,  # per token and layer
        granularity: Literal["block", "row"],  # unit of transfer
        latency_kinds: Mapping[str, LatencyKind],  # of each pool of the run
    ) -> None:
        self._latent_bytes = latent_bytes
        self._by_row = granularity == "row"
        self._kinds: dict[str, LatencyKind] = {"hbm": "none", **latency_kinds}

    def accounts(self, reads: StepReads) -> dict[str, FetchAccount]:
        """Raises `ValueError` for fetches that do not fit the selection, or name a tier the run lacks."""
        fetches = reads.fetches
        if fetches is None:
            raise ValueError("the run's latents lie in tiers, and the capture does not say which served it")
        served_by = in_token_order(reads.positions, fetches.served_by)  # (N,)
        self._check(served_by)
        block_starts = np.cumsum(reads.tokens_selected) - reads.tokens_selected  # (T,)
        furthest = np.maximum.reduceat(served_by, block_starts)  # (T,)
        tokens, blocks = np.diff(reads.token_ptr), reads.num_blocks  # (R,) not served yet
        accounts: dict[str, FetchAccount] = {}
        for tier, name in enumerate(TIER_NAMES):
            if name not in self._kinds:
                accounts[name] = _absent(reads.num_records)
                continue
            token_hit, block_hit = served_by == tier, furthest == tier
            hit_tokens = np.add.reduceat(token_hit, reads.token_ptr[:-1], dtype=np.int64)
            hit_blocks = reads.per_record(block_hit)
            if tier == HBM:
                moved = self._read_in_hbm(reads, token_hit, block_hit, hit_tokens)
            else:
                moved = _of_records(fetches, tier, ("bytes_read", "read_ops", "bytes_useful"))
                # All requests of a layer wait for its batch together.
                moved["latency_us"] = np.tile(fetches.latency_us[:, tier], fetches.served_by.shape[1])
            accounts[name] = OffloadedAccount(
                **moved,
                **_of_records(fetches, tier, ("evicted_units", "bytes_written", "errors")),
                hit_blocks=hit_blocks,
                requested_tokens=tokens,
                hit_tokens=hit_tokens,
                missed_tokens=tokens - hit_tokens,
                requested_blocks=blocks,
                missed_blocks=blocks - hit_blocks,
                batch_size=reads.batch_size,
                latency_kind=self._kinds[name],
            )
            tokens, blocks = tokens - hit_tokens, blocks - hit_blocks
        return accounts

    def _check(self, served_by: np.ndarray) -> None:
        """Refuses a capture that names a tier that does not exist."""
        for tier, name in enumerate((*TIER_NAMES, "none")):
            if name not in self._kinds and (served_by == tier).any():
                raise ValueError(
                    f"a selected token was served by {name}, and the run has {', '.join(self._kinds)}"
                )

    def _read_in_hbm(
        self,
        reads: StepReads,
        token_hit: np.ndarray,  # (N,) bool
        block_hit: np.ndarray,  # (T,) bool
        hit_tokens: np.ndarray,  # (R,)
    ) -> dict[str, np.ndarray]:
        """HBM reads: whole blocks, or single tokens if the unit of transfer is a row."""
        if self._by_row:
            held, ops = hit_tokens, hit_runs(reads.tokens, reads.token_ptr, token_hit)
        else:
            last_hit = block_hit[reads.block_ptr[1:] - 1]
            held = reads.per_record(block_hit) * reads.block_size
            held -= np.where(last_hit, missing_in_last_block(reads), 0)
            ops = hit_runs(reads.block_ids, reads.block_ptr, block_hit)
        return {
            "bytes_read": held * self._latent_bytes,
            "read_ops": ops,
            "latency_us": np.zeros(reads.num_records),
            "bytes_useful": hit_tokens * self._latent_bytes,
        }


def in_token_order(positions: np.ndarray, served_by: np.ndarray) -> np.ndarray:
    """The tier of every selected token, (N,) int8: records request-major, positions ascending.

    `positions` and `served_by` are (L, B, K), in any order. 3 stands for a token that no tier served.
    """
    if positions.shape != served_by.shape:
        raise ValueError(f"tiers of {served_by.shape} selected tokens, and positions of {positions.shape}")
    if served_by.min(initial=0) < -1 or served_by.max(initial=0) >= len(TIER_NAMES):
        raise ValueError(f"served by tier {served_by.min()} to {served_by.max()}; tiers are 0, 1 and 2")
    # Position and tier in one number, to sort both together; int32 suffices for any real context.
    dtype: type[np.signedinteger] = np.int32 if positions.max(initial=0) < 2**29 else np.int64
    keys = positions.swapaxes(0, 1).astype(dtype).reshape(-1, positions.shape[2])  # (R, K)
    keys <<= 2
    keys |= (served_by & 3).swapaxes(0, 1).reshape(keys.shape)
    keys.sort(axis=1)  # padding is negative and comes first
    return (keys[keys >= 0] & 3).astype(np.int8)


def hit_runs(ids: np.ndarray, pointers: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Runs of adjacent ids among the `hit` ids of each record, (R,) int64: one read each."""
    num_records = len(pointers) - 1
    record = np.repeat(np.arange(num_records), np.diff(pointers))[hit]
    starts = np.ones(len(record), dtype=bool)
    starts[1:] = (np.diff(ids[hit]) != 1) | (np.diff(record) != 0)
    return np.bincount(record[starts], minlength=num_records)


def _of_records(fetches: StepFetches, tier: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """One tier's columns of these names: (L, B, T) as captured -> (R,)."""
    return {name: getattr(fetches, name)[:, :, tier].T.ravel().astype(np.int64, copy=False) for name in names}


def _absent(num_records: int) -> OffloadedAccount:
    """For a tier that the run does not have."""
    zeros, no_time = np.zeros(num_records, dtype=np.int64), np.zeros(num_records)
    return OffloadedAccount(zeros, zeros, zeros, no_time, 0, zeros, "none", *[zeros] * 8)
