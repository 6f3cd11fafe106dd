"""The tiers bench runs end to end, small, and says what it left out."""

from __future__ import annotations

import json

from helpers.command_runs import bench


def test_the_bench_measures_every_batch():
    small = ("--only", "ram", "file", "valkey-unix", "--turns", "1", "--bytes-per-token", "576")
    done = bench("tiers.py", *small)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    measured = {"ram", "file", "valkey-unix"} - set(record["absent"])
    assert {"ram", "file"} <= measured
    batches = ("1 blocks", "8 blocks", "64 blocks", "128 blocks", "2048 rows")
    assert [(r["store"], r["batch"]) for r in record["results"]] == [
        (store, batch) for store in ("ram", "file", "valkey-unix") if store in measured for batch in batches
    ]
    assert all(r["ours_us"] > 0 and r["raw_us"] > 0 for r in record["results"])
