"""The schema's tables cover every field of a real record, and its rules hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.schema import (
    LEVELS,
    STEP_FIELDS,
    TIER_NAMES,
    at_level,
    decode,
    encode,
    field_paths,
    nearest_rank,
    problems,
    quantile_histogram,
    quantile_sorted,
    records_markdown,
)
from helpers.trace_samples import config_for, plain_records, sample_capture


def record() -> dict[str, Any]:
    return plain_records(sample_capture(np.random.default_rng(0), [30]), config_for())[0]


def paths(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        path = prefix + ("<tier>" if key in TIER_NAMES else key)
        if key not in TIER_NAMES:
            yield path
        if isinstance(inner, dict):
            yield from paths(inner, f"{path}.")


def test_the_docs_table_has_every_field_of_a_record() -> None:
    table = records_markdown()
    stored = plain_records(sample_capture(np.random.default_rng(0), [30]), config_for(store_scores=True))[0]
    for path in {*paths(record()), *paths(stored)}:
        assert f"| `{path}` |" in table, path
    for row in table.splitlines():
        assert not row.startswith("|") or row.endswith("|")


def test_encode_decode_round_trip_and_refuse_nan() -> None:
    assert decode(encode(record())) == record()
    assert list(decode(encode(record()))) == list(record())
    with pytest.raises(ValueError, match="JSON compliant"):
        encode({"x": float("nan")})
    with pytest.raises(ValueError, match="not list"):
        decode("[1]")


def test_problems_are_named() -> None:
    assert problems(record() | {"unknown_key": 1}) == []
    broken = record()
    del broken["unique_blocks"]
    broken["offset_min"] = "1"
    broken["kv_fetch"]["hbm"]["read_ops"] = 1.5
    found = problems(broken)
    assert found == [
        "offset_min: '1' is not int",
        "unique_blocks: missing",
        "kv_fetch.hbm.read_ops: 1.5 is not int",
    ]
    assert problems(dict(reversed(record().items()))) == ["record: fields out of order"]
    assert any("exactly one" in text for text in problems(record() | {"scores_topk": [1.0]}))


def test_levels_only_ever_drop() -> None:
    kept = [set(paths(at_level(record(), level))) for level in LEVELS]
    assert kept[0] > kept[1] > kept[2]
    assert dict(field_paths(STEP_FIELDS))["prefix.intersection_blocks"].levels == ("full", "blocks")
    assert {field.name for field in STEP_FIELDS if field.levels == ("full",)} == {
        "selected_token_pos",
        "scores_topk",
        "selected_ids",
    }
    with pytest.raises(ValueError, match="trace level 'all'"):
        at_level(record(), "all")  # type: ignore[arg-type]


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2), (51, 3), (75, 3), (76, 4), (100, 4)])
def test_nearest_rank(percent: int, expected: int) -> None:
    assert quantile_sorted([1, 2, 3, 4], percent) == expected
    assert quantile_histogram([1, 2, 3, 4], [1, 1, 1, 1], percent) == expected


def test_nearest_rank_does_not_round_in_floating_point() -> None:
    assert nearest_rank(20, 95) == 18  # 0.95 * 20 is a little more than 19
    with pytest.raises(ValueError, match="no 50th percentile of 0 values"):
        nearest_rank(0, 50)


def test_a_line_is_one_line() -> None:
    assert "\n" not in encode(record() | {"request_id": "a\nb"})
    assert json.loads(encode({"request_id": "é\u2028"})) == {"request_id": "é\u2028"}


def test_the_docs_table_prints_from_the_command_line() -> None:
    inference = Path(__file__).resolve().parents[1] / "inference"
    command = [sys.executable, "-S", "-m", "dsatrace.schema"]
    done = subprocess.run(command, cwd=inference, capture_output=True, text=True, check=True)
    assert done.stdout == records_markdown()
