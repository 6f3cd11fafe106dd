"""The second implementation of a record's `kv_fetch` where latents lie in several tiers, token by token.

Standard library only, written for reading, and sharing nothing with the fast path but
`schema.py`.

    found = PlainFetches(served_by=[0, 1, 0], moved={"local_pool": {...}}, latency_kinds={...})
    kv_fetch([7, 40, 8], found, seq_len=50, block_size=16, latent_bytes=1152, batch_size=1)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dsatrace.schema import TIER_NAMES

NOTHING: dict[str, Any] = {
    "hit_blocks": 0,
    "bytes_read": 0,
    "read_ops": 0,
    "latency_us": 0.0,
    "batch_size": 0,
    "bytes_useful": 0,
    "latency_kind": "none",
}
"""The account of a tier that serves nothing, in the record's order."""
NOTHING_MOVED = {"evicted_units": 0, "bytes_written": 0, "errors": 0}
"""And what else it says where there are several tiers."""


@dataclasses.dataclass(frozen=True)
class PlainFetches:
    """Where one record's positions were found, and what was moved for it."""

    served_by: Sequence[int]  # served_by[i] is the tier that held positions[i]
    moved: Mapping[str, Mapping[str, Any]]  # by tier, what its store did: bytes_read, errors, ...
    latency_kinds: Mapping[str, str]  # of each pool that the run has
    granularity: Literal["block", "row"] = "block"


def kv_fetch(
    positions: Sequence[int],
    found: PlainFetches,
    *,
    seq_len: int,
    block_size: int,
    latent_bytes: int,  # a token and layer
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Every tier's account, with every field in the schema's order."""
    furthest: dict[int, int] = {}  # touched block -> tier
    for position, tier in zip(positions, found.served_by, strict=True):
        block = position // block_size
        furthest[block] = max(furthest.get(block, 0), tier)
    present = ("hbm", *found.latency_kinds)
    hit_tokens = {name: found.served_by.count(TIER_NAMES.index(name)) for name in present}
    hit_blocks = {name: list(furthest.values()).count(TIER_NAMES.index(name)) for name in present}
    asked = chain(hit_tokens, hit_blocks)

    near = sorted(block for block, tier in furthest.items() if tier == 0)
    rows = sorted(position for position, tier in zip(positions, found.served_by, strict=True) if tier == 0)
    by_row = found.granularity == "row"
    held = len(rows) if by_row else sum(min(block_size, seq_len - block * block_size) for block in near)
    hbm = {
        "bytes_read": held * latent_bytes,
        "read_ops": num_runs(rows if by_row else near),
        "bytes_useful": len(rows) * latent_bytes,
        "latency_us": 0.0,
    }
    accounts: dict[str, dict[str, Any]] = {}
    for name in TIER_NAMES:
        accounts[name] = NOTHING | asked[name] | NOTHING_MOVED
        if name in present:
            accounts[name] |= found.moved.get(name, {})
            accounts[name] |= {"batch_size": batch_size, "hit_blocks": hit_blocks[name]}
    accounts["hbm"] |= hbm
    for name, kind in found.latency_kinds.items():
        accounts[name]["latency_kind"] = kind
    return accounts


def chain(hit_tokens: Mapping[str, int], hit_blocks: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """By tier, what was requested of it, hit and missed; a tier that the hits do not name is not there.

    All that was hit anywhere was requested of HBM, and what a tier missed of the next.
    """
    tokens, blocks = sum(hit_tokens.values()), sum(hit_blocks.values())
    asked: dict[str, dict[str, int]] = {}
    for name in TIER_NAMES:
        here = name in hit_tokens
        tokens_hit, blocks_hit = hit_tokens.get(name, 0), hit_blocks.get(name, 0)
        asked[name] = {
            "requested_tokens": tokens if here else 0,
            "hit_tokens": tokens_hit,
            "missed_tokens": tokens - tokens_hit if here else 0,
            "requested_blocks": blocks if here else 0,
            "missed_blocks": blocks - blocks_hit if here else 0,
        }
        tokens, blocks = tokens - tokens_hit, blocks - blocks_hit
    return asked


def num_runs(ascending: Iterable[int]) -> int:
    """Runs of adjacent numbers."""
    return sum(right != left + 1 for left, right in itertools.pairwise((-2, *ascending)))
