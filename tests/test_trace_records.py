"""The fast path and the plain path write the same record, in every field, at every level."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.tiers.account import default_tiers
from dsatrace.schema import LEVELS, problems
from dsatrace.trace.records import RecordDeriver, StepLines
from helpers.trace_samples import LAYOUT, WAYS, config_for, plain_records, sample_capture, sample_needles


def fast_records(capture: Any, config: Any) -> list[dict[str, Any]]:
    step = RecordDeriver(config, LAYOUT, default_tiers(LAYOUT)).derive(capture)
    return [json.loads(line) for line in bytes(StepLines().encode(step)).splitlines()]


def as_float32(value: Any) -> Any:
    """Scores are float32, written with just the digits that name them."""
    if isinstance(value, dict):
        return {key: as_float32(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_float32(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


SCORES = ("scores_stats", "scores_topk", "kth_margin")


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    return {name: as_float32(value) if name in SCORES else value for name, value in record.items()}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_lens=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    num_layers=st.integers(1, 3),
    k=st.integers(1, 40),
    block_size=st.integers(1, 50),
    clustered=st.booleans(),
    cached=st.integers(0, 6),
    how=st.sampled_from(WAYS),
)
def test_fast_equals_plain(
    seed: int,
    seq_lens: list[int],
    num_layers: int,
    k: int,
    block_size: int,
    clustered: bool,
    cached: int,
    how: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    cached_blocks = [min(cached, n // block_size) for n in seq_lens]
    capture = sample_capture(
        rng,
        seq_lens,
        num_layers,
        k,
        clustered=clustered,
        cached_blocks=cached_blocks,
        batch_size=9,
        needles=sample_needles(rng, seq_lens),
    )
    config = config_for(block_size=block_size, **how)
    fast, plain = fast_records(capture, config), plain_records(capture, config)
    assert [list(record) for record in fast] == [list(record) for record in plain]
    assert [comparable(r) for r in fast] == [comparable(json.loads(json.dumps(r))) for r in plain]
    assert [problems(record, config.level) for record in fast] == [[]] * len(fast)


def test_a_record_by_hand() -> None:
    """Positions 3, 4, 5, 17, 39 of 40 at block size 16, two shared blocks: counted with a pencil."""
    capture = sample_capture(np.random.default_rng(0), [40], num_layers=1, k=5, cached_blocks=[2])
    capture.positions[0, 0] = [39, 4, 17, 3, 5]
    (record,) = fast_records(capture, config_for())
    assert record["selected_token_pos"] == [3, 4, 5, 17, 39]
    assert (record["offset_min"], record["offset_p50"], record["offset_max"]) == (0, 34, 36)
    assert record["selected_block_ids"] == [0, 1, 2]
    assert record["tokens_per_touched_block"] == {"mean": 5 / 3, "p50": 1, "p95": 3}
    assert record["prefix"]["intersection_blocks"] == [0, 1]
    assert record["prefix"]["intersection_ratio"] == 2 / 3
    hbm = record["kv_fetch"]["hbm"]
    assert (hbm["hit_blocks"], hbm["read_ops"], hbm["batch_size"]) == (3, 1, 1)
    assert (hbm["bytes_read"], hbm["bytes_useful"]) == (40 * 1152, 5 * 1152)  # the last block holds 8 tokens
    assert record["kv_fetch"]["local_pool"]["hit_blocks"] == 0
    assert record["indexer_scan"] == {"tokens": 40, "bytes_read": 40 * 132}
    assert record["path"] == "sparse"


def test_levels_drop_what_they_say() -> None:
    capture = sample_capture(np.random.default_rng(0), [40], cached_blocks=[1])
    keys = {level: set(fast_records(capture, config_for(level=level))[0]) for level in LEVELS}
    assert keys["full"] - keys["blocks"] == {"selected_token_pos"}
    assert keys["blocks"] - keys["stats"] == {"selected_block_ids"}
    stats = fast_records(capture, config_for(level="stats"))[0]
    assert "intersection_blocks" not in stats["prefix"]
    assert "intersection_ratio" in stats["prefix"]


def test_kth_margin_is_null_on_the_dense_path() -> None:
    capture = sample_capture(np.random.default_rng(0), [8, 9], num_layers=1, k=8)
    dense, sparse = fast_records(capture, config_for())
    assert (dense["path"], dense["kth_margin"]) == ("dense", None)
    assert sparse["path"] == "sparse"
    assert np.float32(sparse["kth_margin"]) == capture.score_stats[0, 1, 3]


@pytest.mark.parametrize(
    ("positions", "said"), [([0, 0], "selected twice"), ([3, 10], "future"), ([4, -1], "min")]
)
def test_a_broken_capture_never_becomes_a_record(positions: list[int], said: str) -> None:
    capture = sample_capture(np.random.default_rng(0), [10, 10], num_layers=2, k=2)
    capture.positions[1, 0] = positions
    with pytest.raises(ValueError, match=f"request 0 of the step, layer 1: .*{said}"):
        fast_records(capture, config_for())


def test_order_by_score_needs_scores() -> None:
    capture = sample_capture(np.random.default_rng(0), [10], scores=None)
    with pytest.raises(ValueError, match="the capture has none"):
        fast_records(capture, config_for(keep_order=True))
