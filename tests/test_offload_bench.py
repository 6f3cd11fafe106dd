"""The offload bench runs end to end, small: same logits in every setup, bytes where something is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_runs import bench


def test_the_bench_tells_what_a_share_costs(tmp_path: Path):
    record_file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    small = ("--context", "640", "--steps", "8", "--units", "row", "64", "--shares", "100", "50")
    how = ("--policies", "lru", "arc", "--prefetch", "none", "previous-layer", "--store", "sim:pcie5-x16+ram")
    done = bench("offload.py", *small, *how, "--json", str(record_file), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "needs 100%" in done.stdout  # every block of 64 is touched by some step
    record = json.loads(record_file.read_text())
    lines = {tuple(line["case"].values()): line for line in record["lines"]}
    fits = {case: line["measured"] for case, line in lines.items() if line["measured"]}
    rows = [("row", policy, kind, 50) for policy in ("lru", "arc") for kind in ("none", "previous-layer")]
    assert set(lines) - set(fits) == {("64", *how) for _, *how in rows}
    assert set(fits) == {*rows, ("row", "lru", "none", 100), ("64", "lru", "none", 100)}
    for case, measured in fits.items():
        assert measured["tokens_per_s"] > 0
        assert measured["ratio_quartiles"][0] <= measured["ratio"] <= measured["ratio_quartiles"][1]
        fetches = case[-1] < 100
        assert (measured["hit_rate"] < 1) == (measured["store_ms"] > 0) == fetches
        of_selected = measured["read_bytes"] / record["selected_bytes"]
        assert measured["read_over_selected"] == pytest.approx(of_selected)
        assert (measured["recall"] is not None) == (case[2] == "previous-layer")
    assert record["latency_kind"] == "modelled"
    assert record["machine"]["threads"] == 1
    assert picture.stat().st_size > 10_000


def test_a_share_of_nothing_is_one_line():
    done = bench("offload.py", "--shares", "0")
    assert (done.returncode, done.stderr) == (2, "error: --shares 0: they are percent, from 1 to 100\n")
