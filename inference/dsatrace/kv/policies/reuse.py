"""How each workload reuses its blocks, which the workload-aware policies base their choice on.

A use of a block counts for the workload that makes it; it is reused if another use of the block, by
any workload, follows. Knows no cache.

    profile = reuse_profile(stream.head(0.2))
    profile.probability            # (W,), share of each workload's uses that are reused
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.kv.policies.stream import AccessStream

SHORTEST_MEAN_S = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class ReuseProfile:
    """Per workload; the probability is smoothed by one reused and one unused use, so within (0, 1)."""

    probability: np.ndarray  # (W,) float64
    mean_s: np.ndarray  # (W,) float64, mean time to the reuse, above 0; without a reuse, all workloads' mean


def reuse_profile(stream: AccessStream) -> ReuseProfile:
    """Measured over all of `stream`; uses near its end look less reused than they are."""
    uses, reused, seconds = _count(
        stream.blocks, stream.starts, stream.times, stream.workloads, stream.num_blocks, stream.num_workloads
    )
    overall = seconds.sum() / max(reused.sum(), 1)
    mean = np.where(reused > 0, seconds / np.maximum(reused, 1), overall)
    return ReuseProfile((reused + 1) / (uses + 2), np.maximum(mean, SHORTEST_MEAN_S))


def admitted_workloads(profile: ReuseProfile, min_relative_reuse: float) -> list[float]:
    """1 for a workload whose blocks are reused at least `min_relative_reuse` times as often as
    those of the most reused workload, else 0."""
    least = min_relative_reuse * profile.probability.max()
    admitted: list[float] = (profile.probability >= least).astype(float).tolist()
    return admitted


@cached_njit(nogil=True)
def _count(
    blocks: np.ndarray,
    starts: np.ndarray,
    times: np.ndarray,
    workloads: np.ndarray,
    num_blocks: int,
    num_workloads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    last_user = np.full(num_blocks, -1, np.int32)  # the request
    uses = np.zeros(num_workloads, np.int64)
    reused = np.zeros(num_workloads, np.int64)
    seconds = np.zeros(num_workloads)
    for request in range(len(starts) - 1):
        for at in range(starts[request], starts[request + 1]):
            before = last_user[blocks[at]]
            if before >= 0:
                reused[workloads[before]] += 1
                seconds[workloads[before]] += times[request] - times[before]
            uses[workloads[request]] += 1
            last_user[blocks[at]] = request
    return uses, reused, seconds
