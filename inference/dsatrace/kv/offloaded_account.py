"""What each tier served of a step whose selected latents lie in HBM and in the pools behind it.

A selected token is *served by* the tier that held it when it was selected, and a touched
block is hit in the furthest tier that any of its tokens came from. A tier is *requested*
for what no tier above it held, so hit + missed == requested in each, and the hits of all
tiers add up to the selection. Arrays in, arrays out; knows no store, no file and no record.

    tiers = OffloadedTiers(1152, "block", {"local_pool": "measured"})
    tiers.accounts(reads)["local_pool"].hit_tokens      # (R,)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from dsatrace.kv.fetches import StepFetches
from dsatrace.kv.tiers import FetchAccount, LatencyKind, StepReads, missing_in_last_block
from dsatrace.schema import TIER_NAMES


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
    """HBM and one or two pools behind it; a pool that `latency_kinds` does not name is not there."""

    def __init__(
        self,
        latent_bytes: int,  # a token and layer
        granularity: Literal["block", "row"],  # what moves as one
        latency_kinds: Mapping[str, LatencyKind],  # of each pool the run has
    ) -> None:
        self._latent_bytes = latent_bytes
        self._by_row = granularity == "row"
        self._kinds: dict[str, LatencyKind] = {"hbm": "none", **latency_kinds}

    def accounts(self, reads: StepReads) -> dict[str, FetchAccount]:
        """Raises `ValueError` for fetches that do not fit the selection, or name a tier that is not there."""
        fetches = reads.fetches
        if fetches is None:
            raise ValueError("the run's latents lie in tiers, and the capture does not say which served it")
        served_by = in_token_order(reads.positions, fetches.served_by)
        self._check(served_by)
        furthest = np.maximum.reduceat(served_by, _block_starts(reads))  # (T,)
        chain = _Chain(reads.token_ptr[1:] - reads.token_ptr[:-1], reads.num_blocks)
        accounts: dict[str, FetchAccount] = {}
        for tier, name in enumerate(TIER_NAMES):
            if name not in self._kinds:
                accounts[name] = _absent(reads.num_records)
                continue
            hit_tokens = np.add.reduceat(served_by == tier, reads.token_ptr[:-1], dtype=np.int64)
            asked = chain.asked(hit_tokens, reads.per_record(furthest == tier))
            if tier == 0:
                moved = self._read_in_hbm(reads, served_by == 0, furthest == 0, hit_tokens)
            else:
                moved = _fetched(fetches, tier)
            accounts[name] = OffloadedAccount(
                **moved,
                **asked,
                **{
                    counted: _of_records(getattr(fetches, counted), tier)
                    for counted in ("evicted_units", "bytes_written", "errors")
                },
                batch_size=reads.batch_size,
                latency_kind=self._kinds[name],
            )
        return accounts

    def _check(self, served_by: np.ndarray) -> None:
        """A broken capture must not become a record."""
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
        """What was read where it lay: whole blocks, or the tokens alone where rows move."""
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


class _Chain:
    """What each tier is asked for in turn: what those before it did not hold."""

    def __init__(self, num_tokens: np.ndarray, num_blocks: np.ndarray) -> None:
        self._tokens, self._blocks = num_tokens, num_blocks  # (R,) not found yet

    def asked(self, hit_tokens: np.ndarray, hit_blocks: np.ndarray) -> dict[str, np.ndarray]:
        tokens, blocks = self._tokens, self._blocks
        self._tokens, self._blocks = tokens - hit_tokens, blocks - hit_blocks
        return {
            "hit_blocks": hit_blocks,
            "requested_tokens": tokens,
            "hit_tokens": hit_tokens,
            "missed_tokens": self._tokens,
            "requested_blocks": blocks,
            "missed_blocks": self._blocks,
        }


def in_token_order(positions: np.ndarray, served_by: np.ndarray) -> np.ndarray:
    """The tier of every selected token, (N,) int8: records request-major, positions ascending.

    `positions (L, B, K)` and `served_by (L, B, K)` belong together, in any order; 3 stands for
    a token that no tier served.
    """
    if positions.shape != served_by.shape:
        raise ValueError(f"tiers of {served_by.shape} selected tokens, and positions of {positions.shape}")
    if served_by.min(initial=0) < -1 or served_by.max(initial=0) >= len(TIER_NAMES):
        raise ValueError(f"served by tier {served_by.min()} to {served_by.max()}; tiers are 0, 1 and 2")
    # Position and tier in one number, to be sorted as one; half as wide for any context there is.
    dtype: type[np.signedinteger] = np.int32 if positions.max(initial=0) < 2**29 else np.int64
    keys = positions.swapaxes(0, 1).astype(dtype).reshape(-1, positions.shape[2])  # (R, K)
    keys <<= 2
    keys |= (served_by & 3).swapaxes(0, 1).reshape(keys.shape)
    keys.sort(axis=1)  # padding is below 0 and comes first
    return (keys[keys >= 0] & 3).astype(np.int8)


def hit_runs(ids: np.ndarray, pointers: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Runs of adjacent ids among those of each record that are `hit`, (R,) int64: one read each."""
    num_records = len(pointers) - 1
    record = np.repeat(np.arange(num_records), np.diff(pointers))[hit]
    starts = np.ones(len(record), dtype=bool)
    starts[1:] = (np.diff(ids[hit]) != 1) | (np.diff(record) != 0)
    return np.bincount(record[starts], minlength=num_records)


def _block_starts(reads: StepReads) -> np.ndarray:
    """(T,) the first token of each touched block."""
    return np.cumsum(reads.tokens_selected) - reads.tokens_selected


def _fetched(fetches: StepFetches, tier: int) -> dict[str, np.ndarray]:
    """What a pool's store did for each record; all requests of a layer wait for its batch together."""
    num_requests = fetches.served_by.shape[1]
    moved = {
        counted: _of_records(getattr(fetches, counted), tier)
        for counted in ("bytes_read", "read_ops", "bytes_useful")
    }
    return {**moved, "latency_us": np.tile(fetches.latency_us[:, tier], num_requests)}


def _of_records(counted: np.ndarray, tier: int) -> np.ndarray:
    """(L, B, T) as captured -> (R,) of one tier."""
    return np.asarray(counted[:, :, tier].T.ravel(), dtype=np.int64)


def _absent(num_records: int) -> OffloadedAccount:
    """A tier that the run does not have."""
    zeros, no_time = np.zeros(num_records, dtype=np.int64), np.zeros(num_records)
    return OffloadedAccount(zeros, zeros, zeros, no_time, 0, zeros, "none", *[zeros] * 8)
