"""Checks one record against its own positions, or below level full against what is possible.

Standard library and the plain implementation only. Knows one record; `order.py` compares records.

    rules = Rules.of(manifest)
    check_record(record, rules, needles={})        # raises Mismatch naming the field
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsatrace.schema import STEP_FIELDS, Level, field_paths, nearest_rank, problems
from dsatrace.verify.check_tiers import Selected, check_fetches, offloaded_field
from dsatrace.verify.mismatch import Mismatch, compare, require, require_range
from dsatrace.verify.plain_record import PlainSelection, fetch_from_hbm, needle_field, step_record
from dsatrace.verify.rules import Rules, require_schema
from dsatrace.verify.selections import Set

_FLOAT32_ROUNDING = 1e-5
"""Relative to the largest score: the mean of a selection is summed in float32."""

Record = Mapping[str, Any]


def check_record(record: Record, rules: Rules, needles: Mapping[str, Sequence[int]]) -> None:
    """Raises `Mismatch` at the record's first wrong field. `needles` are the positions of each request's
    answer, for the requests that are known."""
    kind = rules.selections
    require_schema(problems(record, rules.level, kind.fields))
    check_given(record, rules)
    seq_len = record["seq_len_current"]
    if not kind.is_engines:
        _check_other(record, rules, needles.get(record["request_id"]))
        return
    if rules.level == "full":
        positions: Sequence[int] | None = record["selected_token_pos"]
        _check_positions(record["selected_token_pos"], seq_len, rules)
    else:  # the dense path selects every position
        positions = range(seq_len) if seq_len <= rules.top_k else None
    _check_needle(record, positions, rules, needles.get(record["request_id"]))
    if positions is None:
        _check_without_positions(record, rules)
    else:
        compare(record, _derived(record, positions, rules))
    if rules.tiers is not None:
        check_fetches(record, _selected(record, positions, rules), rules.tiers)


def _check_other(record: Record, rules: Rules, known: Sequence[int] | None) -> None:
    """A record of another door than the engine's, whose ids may be of any kind."""
    kind, seq_len, name = rules.selections, record["seq_len_current"], rules.selections.ids_field
    of_layer = [one for one in kind.sets if one.layer == record["layer_id"]]
    heads = {one.head: one for one in of_layer}
    require(bool(heads), "layer_id", record["layer_id"], "a layer that selects nothing")
    head = record.get("kv_head")
    require(head in heads, "kv_head", head, f"the layer's sets are {', '.join(map(str, heads))}")
    ids: list[int] = record[name]
    limit = 2**31 - 1 if kind.is_slot else kind.num_visible(seq_len)
    require(
        1 <= len(ids) <= heads[head].top_k, name, ids, f"{len(ids)} ids, derived 1 to {heads[head].top_k}"
    )
    require(min(ids) >= 0, name, min(ids), "below 0")
    require(max(ids) < limit, name, max(ids), f"derived 0 to {limit - 1}")
    require(len(set(ids)) == len(ids), name, ids, "an id stands twice")
    tokens = kind.tokens(ids, seq_len)
    if kind.is_located:
        _check_needle(record, tokens, rules, known)
    absent = {
        field.name for field in STEP_FIELDS if field.is_absent and not kind.tells.issuperset(field.needs)
    }
    for stray in absent.intersection(record):
        raise Mismatch(stray, f"stored {record[stray]!r}, and the run's selections do not tell it")
    compare(record, _derived(record, ids, rules, heads[head]))


def check_given(record: Record, rules: Rules) -> None:
    """What positions do not tell: scores, times, and what must hold before anything is derived."""
    require(rules.has_model, "event", record["event"], "a record, but no model ran")
    for path, parent, name in _dropped_fields(rules.level):
        require(name not in (record[parent] if parent else record), path, "a value", "the level drops it")
    for name in ("layer_id", "forward_idx", "step_wall_us"):
        require(record[name] is None or record[name] >= 0, name, record[name], "below 0")
    step_idx = record["step_idx"]
    require(rules.whole_prompt or step_idx >= -1, "step_idx", step_idx, "below -1")
    if record["kv_fetch"] is not None:
        if rules.tiers is None and (stray := offloaded_field(record)):
            raise Mismatch(stray, "stands there, and the manifest has no tiers")
        batch_size = record["kv_fetch"]["hbm"]["batch_size"]
        require(batch_size >= 1, "kv_fetch.hbm.batch_size", batch_size, "below 1")
    seq_len = record["seq_len_current"]
    require(seq_len >= 1 and seq_len > step_idx, "seq_len_current", seq_len, "too few positions")
    if record["prefix"] is not None:
        cached = record["prefix"]["prefix_cached_blocks"]
        most = seq_len - min(step_idx + 1, 0)  # inside the prompt, the whole prompt
        require_range("prefix.prefix_cached_blocks", cached, 0, most // rules.block_size)
    compare(record.get("source_layer"), rules.source_layers.get(record["layer_id"]), "source_layer")
    _check_scores(record, rules)


@functools.cache
def _dropped_fields(level: Level) -> list[tuple[str, str, str]]:
    """(path, parent, name) of every field that a record of the level must not have."""
    paths = [path for path, field in field_paths(STEP_FIELDS) if level not in field.levels]
    return [(path, path.rpartition(".")[0], path.rpartition(".")[2]) for path in paths]


def _check_positions(positions: list[int], seq_len: int, rules: Rules) -> None:
    """What must be true before anything is derived from the positions."""
    name = "selected_token_pos"
    count = min(rules.top_k, seq_len)
    require(len(positions) == count, name, positions, f"{len(positions)} positions, derived {count}")
    low, high = min(positions), max(positions)
    require(low >= 0, name, low, "below 0")
    require(high < seq_len, name, high, f"after the query's position {seq_len - 1}")
    require(len(set(positions)) == count, name, positions, "a position stands twice")


def _derived(
    record: Record, positions: Sequence[int], rules: Rules, its_set: Set | None = None
) -> dict[str, Any]:
    """`its_set`: of another door than the engine's."""
    scores = record.get("scores_topk")
    prefix, fetched = record["prefix"] or {}, record["kv_fetch"] or {}
    stats = record.get("scores_stats") or dict.fromkeys(("min", "mean", "max"), 0.0)
    margin = record["kth_margin"]
    selection = PlainSelection(
        request_id=record["request_id"],
        layer_id=record["layer_id"],
        step_idx=record["step_idx"],
        seq_len=record["seq_len_current"],
        top_k=its_set.top_k if its_set else rules.top_k,
        positions=positions,
        scores=scores,
        score_stats=(stats["min"], stats["mean"], stats["max"], math.nan if margin is None else margin),
        num_cached_blocks=prefix.get("prefix_cached_blocks", 0),
        prefix_key=prefix.get("prefix_key", ""),
        batch_size=fetched["hbm"]["batch_size"] if fetched else 0,
        phase=record["phase"],
        forward_idx=record["forward_idx"],
        step_wall_us=record["step_wall_us"],
        step_synced=record["step_synced"],
        source_layer=rules.source_layers.get(record["layer_id"]),
        kv_head=its_set.head if its_set else None,
        num_heads=its_set.num_heads if its_set else 1,
        kind=rules.selections,
    )
    derived = step_record(
        selection,
        block_size=rules.block_size,
        latent_bytes=rules.latent_bytes // (its_set.num_heads if its_set else 1),
        index_bytes=rules.index_bytes,
        level=rules.level,
        store_scores=rules.store_scores,
        keep_order=rules.keep_order and scores is not None,
    )
    if rules.keep_order and scores is None:
        del derived[rules.selections.ids_field]  # their order cannot be derived without scores
    if rules.tiers is not None:
        del derived["kv_fetch"]  # positions do not tell which tier served them
    return derived


def _selected(record: Record, positions: Sequence[int] | None, rules: Rules) -> Selected:
    """What the tiers' accounts are compared with, once the record's other fields are checked."""
    seq_len, size = record["seq_len_current"], rules.block_size
    last = (seq_len - 1 - record["offset_min"]) // size
    blocks = record.get("selected_block_ids")
    if blocks is None and positions is not None:
        blocks = sorted({position // size for position in positions})
    return Selected(
        num_tokens=record["unique_token_pos_count"],
        num_blocks=record["unique_blocks"],
        block_size=size,
        latent_bytes=rules.latent_bytes,
        missing=max((last + 1) * size - seq_len, 0),
        positions=positions,
        blocks=blocks,
    )


def _check_scores(record: Record, rules: Rules) -> None:
    """Scores come from the model, so only what they must be like is checked."""
    kind = rules.selections
    if "scores" not in kind.tells:
        return
    scores, stats, margin = record.get("scores_topk"), record.get("scores_stats"), record["kth_margin"]
    stored = "scores_topk" if rules.store_scores else "scores_stats"
    require(stored in record, stored, None, "missing, as the manifest says whether scores are stored")
    if scores is not None:
        count = min(rules.top_k, record["seq_len_current"])
        if not kind.is_engines:
            count = len(record[kind.ids_field])
        require(len(scores) == count, "scores_topk", scores, f"{len(scores)} scores, derived {count}")
        require(None not in scores, "scores_topk", scores, "a score that is no number")
    if stats is not None:
        slack = _FLOAT32_ROUNDING * max(abs(stats["min"]), abs(stats["max"]))
        require(stats["min"] <= stats["max"], "scores_stats.min", stats["min"], f"above {stats['max']}")
        require_range("scores_stats.mean", stats["mean"], stats["min"] - slack, stats["max"] + slack)
    if not kind.is_engines:  # whether it is null on the dense path, `_derived` knows
        require(margin is None or margin >= 0, "kth_margin", margin, "below 0")
    elif record["seq_len_current"] <= rules.top_k:
        compare(margin, None, "kth_margin")
    else:
        require(margin is not None and margin >= 0, "kth_margin", margin, "not a number from 0")


def _check_needle(
    record: Record, positions: Sequence[int] | None, rules: Rules, known: Sequence[int] | None
) -> None:
    """Exact where the answer's and the selected positions are known, else within what is possible."""
    stored = record.get("needle")
    if known is not None:
        rule = f"its request has {len(known)} needle positions"
        require((stored is not None) == bool(known), "needle", stored, rule)
    if stored is None:
        return
    tokens, selected = stored["tokens"], stored["selected"]
    if known is None:
        require_range("needle.tokens", tokens, 1, record["seq_len_current"])
    else:
        compare(tokens, len(known), "needle.tokens")
    if known is not None and positions is not None:
        compare(record, needle_field(positions, known))
    else:
        is_dense = record["seq_len_current"] <= rules.top_k
        low = tokens if is_dense else 0
        require_range("needle.selected", selected, low, min(tokens, rules.top_k))


def _check_without_positions(record: Record, rules: Rules) -> None:
    """A sparse record below level full: its sums exactly, the rest within what is possible."""
    seq_len, size, k = record["seq_len_current"], rules.block_size, rules.top_k
    low, median, high = (record[f"offset_{name}"] for name in ("min", "p50", "max"))
    rank = nearest_rank(k, 50)
    require_range("offset_max", high, k - 1, seq_len - 1)
    require_range("offset_min", low, 0, high - k + 1)
    require_range("offset_p50", median, low + rank, high - (k - 1 - rank))
    first, last = (seq_len - 1 - high) // size, (seq_len - 1 - low) // size
    blocks = record.get("selected_block_ids")
    if blocks is not None:
        _check_block_ids(blocks, first, last)
    num_blocks = record["unique_blocks"] if blocks is None else len(blocks)
    span = last - first + 1
    require_range("unique_blocks", num_blocks, max(-(-k // size), min(span, 2)), min(k, span))
    _check_tokens_per_block(record["tokens_per_touched_block"], num_blocks, rules)
    if rules.tiers is None:
        _check_resident(record, blocks, num_blocks, first, last, rules)
    num_scanned = 0 if record["layer_id"] in rules.source_layers else seq_len
    compare(
        record,
        {
            "event": "dsa_topk",
            "unique_token_pos_count": k,
            "block_size_tokens": size,
            "unique_blocks": num_blocks,
            "tokens_per_touched_block": {"mean": k / num_blocks},
            "prefix": _prefix(record["prefix"], blocks, num_blocks, first, last),
            "path": "sparse",
            "indexer_scan": {"tokens": num_scanned, "bytes_read": num_scanned * rules.index_bytes},
        },
    )


def _check_resident(
    record: Record, blocks: list[int] | None, num_blocks: int, first: int, last: int, rules: Rules
) -> None:
    """All blocks are read in HBM, the request's last one as far as it is filled."""
    seq_len, size, span = record["seq_len_current"], rules.block_size, last - first + 1
    read_ops = record["kv_fetch"]["hbm"]["read_ops"]
    if blocks is None:
        most = min(num_blocks, span - num_blocks + 1)
        require_range("kv_fetch.hbm.read_ops", read_ops, 1 if num_blocks == span else 2, most)
    else:
        read_ops = 1 + sum(right != left + 1 for left, right in itertools.pairwise(blocks))
    # Only the request's last block may be partly filled.
    missing = (last + 1) * size - seq_len if last == (seq_len - 1) // size else 0
    derived = fetch_from_hbm(
        hit_blocks=num_blocks,
        bytes_read=(num_blocks * size - missing) * rules.latent_bytes,
        read_ops=read_ops,
        batch_size=record["kv_fetch"]["hbm"]["batch_size"],
        bytes_useful=rules.top_k * rules.latent_bytes,
    )
    compare(record["kv_fetch"], derived, "kv_fetch")


def _check_block_ids(blocks: list[int], first: int, last: int) -> None:
    name = "selected_block_ids"
    require(len(blocks) > 0, name, blocks, "no block")
    for i, (left, right) in enumerate(itertools.pairwise(blocks)):
        require(left < right, f"{name}[{i + 1}]", right, f"not above the one before it, {left}")
    compare(blocks[0], first, f"{name}[0]")
    compare(blocks[-1], last, f"{name}[{len(blocks) - 1}]")


def _check_tokens_per_block(stored: Record, num_blocks: int, rules: Rules) -> None:
    """With these quantiles `num_blocks` blocks of 1 to `block_size` tokens can hold exactly k."""
    p50, p95, k, size = stored["p50"], stored["p95"], rules.top_k, rules.block_size
    at50, at95 = nearest_rank(num_blocks, 50), nearest_rank(num_blocks, 95)
    require_range("tokens_per_touched_block.p50", p50, 1, size)
    require_range("tokens_per_touched_block.p95", p95, p50, size)
    fewest = at50 + (at95 - at50) * p50 + (num_blocks - at95) * p95
    most = (at50 + 1) * p50 + (at95 - at50) * p95 + (num_blocks - 1 - at95) * size
    rule = f"with p50 {p50} the blocks hold {fewest} to {most} tokens, not {k}"
    require(fewest <= k <= most, "tokens_per_touched_block.p95", p95, rule)


def _prefix(
    stored: Record, blocks: list[int] | None, num_blocks: int, first: int, last: int
) -> dict[str, Any]:
    """Touched blocks below `prefix_cached_blocks` are in the prefix."""
    cached = stored["prefix_cached_blocks"]
    hit = {"prefix_cache_hit": cached > 0}
    if blocks is not None:
        shared = [block for block in blocks if block < cached]
        return hit | {"intersection_ratio": len(shared) / num_blocks, "intersection_blocks": shared}
    num_shared = round(stored["intersection_ratio"] * num_blocks)
    # Blocks from `cached` on are not shared; the first and the last touched block are known.
    fewest = num_blocks if last < cached else max(int(first < cached), num_blocks - (last + 1 - cached))
    most = num_blocks - int(last >= cached) if first < cached else 0
    field, ratio = "prefix.intersection_ratio", stored["intersection_ratio"]
    require_range(field, ratio, fewest / num_blocks, min(most, max(cached - first, 0)) / num_blocks)
    return hit | {"intersection_ratio": num_shared / num_blocks}
