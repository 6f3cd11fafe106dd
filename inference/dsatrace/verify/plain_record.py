"""The second implementation: one record from plain lists, as the documentation says it.

Standard library only and written for reading; shares nothing with the fast path but `schema.py`, so
that each can catch the other's mistakes.

    record = step_record(selection, block_size=16, latent_bytes=1152, index_bytes=132)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from dsatrace.schema import TIER_NAMES, Level, at_level, quantile_sorted
from dsatrace.verify.selections import ENGINES, Selections


@dataclasses.dataclass(frozen=True)
class PlainSelection:
    """One request's selection in one layer of one step."""

    request_id: str
    layer_id: int
    step_idx: int
    seq_len: int
    top_k: int
    positions: Sequence[int]  # or other ids, see `kind`; in any order, without padding
    scores: Sequence[float] | None  # scores[i] belongs to positions[i]
    score_stats: Sequence[float]  # min, mean, max, k-th margin
    num_cached_blocks: int
    prefix_key: str
    batch_size: int
    phase: str
    forward_idx: int
    step_wall_us: float
    step_synced: bool
    needle_positions: Sequence[int] = ()  # of the prompt; empty where they are not known
    fetches: PlainFetches | None = None  # None: everything is in HBM
    source_layer: int | None = None  # the layer whose selection this is; None: its own
    kv_head: int | None = None  # which of the layer's sets it is; None: it has one
    num_heads: int = 1  # sets of the layer
    kind: Selections = ENGINES  # what the ids are


def step_record(
    selection: PlainSelection,
    *,
    block_size: int,
    latent_bytes: int,  # per token and layer
    index_bytes: int,  # per token and layer
    level: Level = "full",
    store_scores: bool = False,
    keep_order: bool = False,
) -> dict[str, Any]:
    """The record, with every field of the level in the schema's order."""
    kind, ids = selection.kind, selection.positions
    tokens = kind.tokens(list(ids), selection.seq_len)
    num_visible = kind.num_visible(selection.seq_len)
    sparse = num_visible > selection.top_k
    num_scanned = num_visible if selection.source_layer is None else 0
    margin = finite(selection.score_stats[3])
    record: dict[str, Any] = {
        "event": "dsa_topk",
        "request_id": selection.request_id,
        "layer_id": selection.layer_id,
        "step_idx": selection.step_idx,
        "seq_len_current": selection.seq_len,
        "selected_token_pos": recorded_positions(selection, keep_order),
        "unique_token_pos_count": len(tokens if kind.is_located else set(ids)),
        "block_size_tokens": block_size,
        **(tokens_fields(selection, tokens, block_size, latent_bytes) if kind.is_located else {}),
        **scores_field(selection, level, store_scores, keep_order),
        "forward_idx": selection.forward_idx,
        "step_wall_us": selection.step_wall_us,
        "step_synced": selection.step_synced,
        "phase": selection.phase,
        "path": "sparse" if sparse else "dense",
        "kth_margin": margin if sparse else None,
        "indexer_scan": {
            "tokens": num_scanned,
            "bytes_read": num_scanned * index_bytes // selection.num_heads,
        },
        **({} if selection.source_layer is None else {"source_layer": selection.source_layer}),
        **({} if selection.kv_head is None else {"kv_head": selection.kv_head}),
        "selected_ids": recorded_positions(selection, keep_order),
        "num_selected_ids": len(set(ids)),
        **needle_field(tokens, selection.needle_positions),
    }
    if "other ids" not in kind.tells:
        del record["selected_ids"], record["num_selected_ids"]
    told = {
        field.name: None if field.type == "null" else record[field.name]
        for field in kind.fields
        if field.type == "null" or field.name in record
    }
    return at_level(told, level)


def tokens_fields(
    selection: PlainSelection, tokens: Sequence[int], block_size: int, latent_bytes: int
) -> dict[str, Any]:
    """What ascending tokens tell."""
    offsets = sorted(selection.seq_len - 1 - token for token in tokens)
    blocks = sorted({token // block_size for token in tokens})
    in_block = dict.fromkeys(blocks, 0)
    for token in tokens:
        in_block[token // block_size] += 1
    counts = sorted(in_block.values())
    prefix_blocks = [block for block in blocks if block < selection.num_cached_blocks]
    return {
        "offset_min": offsets[0],
        "offset_p50": quantile_sorted(offsets, 50),
        "offset_max": offsets[-1],
        "selected_block_ids": blocks,
        "unique_blocks": len(blocks),
        "tokens_per_touched_block": {
            "mean": len(tokens) / len(blocks),
            "p50": quantile_sorted(counts, 50),
            "p95": quantile_sorted(counts, 95),
        },
        "kv_fetch": kv_fetch(selection, len(tokens), blocks, block_size, latent_bytes),
        "prefix": {
            "prefix_cache_hit": selection.num_cached_blocks > 0,
            "prefix_cached_blocks": selection.num_cached_blocks,
            "prefix_key": selection.prefix_key,
            "intersection_ratio": len(prefix_blocks) / len(blocks),
            "intersection_blocks": prefix_blocks,
        },
    }


def recorded_positions(selection: PlainSelection, keep_order: bool) -> list[int]:
    """Ascending, or by score descending and then position ascending."""
    if not keep_order:
        return sorted(selection.positions)
    if selection.scores is None:
        raise ValueError("positions cannot be put in score order without scores")
    pairs = zip(selection.scores, selection.positions, strict=True)
    return [position for _, position in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]


def scores_field(
    selection: PlainSelection, level: Level, store_scores: bool, keep_order: bool
) -> dict[str, Any]:
    """`scores_topk` in the order of the positions, or `scores_stats`."""
    if store_scores and level == "full":
        if selection.scores is None:
            raise ValueError("there are no scores to store")
        score_of = dict(zip(selection.positions, selection.scores, strict=True))
        return {"scores_topk": [finite(score_of[p]) for p in recorded_positions(selection, keep_order)]}
    low, mean, high = (finite(value) for value in selection.score_stats[:3])
    return {"scores_stats": {"min": low, "mean": mean, "max": high}}


def needle_field(positions: Sequence[int], needle_positions: Sequence[int]) -> dict[str, Any]:
    """How much of the answer is selected; {} where the answer is not known."""
    if not needle_positions:
        return {}
    held = set(needle_positions).intersection(positions)
    return {"needle": {"tokens": len(needle_positions), "selected": len(held)}}


def kv_fetch(
    selection: PlainSelection, num_tokens: int, blocks: list[int], block_size: int, latent_bytes: int
) -> dict[str, Any]:
    """What each tier served; HBM holds everything unless the selection has `fetches`."""
    if selection.fetches is not None:
        return tiered_fetch(
            selection.positions,
            selection.fetches,
            seq_len=selection.seq_len,
            block_size=block_size,
            latent_bytes=latent_bytes,
            batch_size=selection.batch_size,
        )
    held = sum(min(block_size, selection.seq_len - block * block_size) for block in blocks)
    touched = set(blocks)
    return fetch_from_hbm(
        hit_blocks=len(blocks),
        bytes_read=held * latent_bytes,
        read_ops=sum(block - 1 not in touched for block in blocks),
        batch_size=selection.batch_size,
        bytes_useful=num_tokens * latent_bytes,
    )


def fetch_from_hbm(**counted: int) -> dict[str, Any]:
    """The account of each tier when HBM serves what was `counted`, and the pools nothing."""
    return {name: NOTHING | counted if name == "hbm" else NOTHING for name in TIER_NAMES}


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


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
"""Further fields of that account where there are several tiers."""


@dataclasses.dataclass(frozen=True)
class PlainFetches:
    """Which tier held each of a record's positions, and what was moved for it."""

    served_by: Sequence[int]  # served_by[i] is the tier that held positions[i]
    moved: Mapping[str, Mapping[str, Any]]  # by tier, what its store counted: bytes_read, errors, ...
    latency_kinds: Mapping[str, str]  # by pool that the run has
    granularity: Literal["block", "row"] = "block"


def tiered_fetch(
    positions: Sequence[int],
    found: PlainFetches,
    *,
    seq_len: int,
    block_size: int,
    latent_bytes: int,  # per token and layer
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """Every tier's account, token by token, with every field in the schema's order."""
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
    """By tier, what was requested of it, hit and missed; a tier that the hits do not name does not exist.

    HBM is asked for all that was hit anywhere, each further tier for what the one before it missed.
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
