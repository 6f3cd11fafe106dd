"""The serving bench runs end to end, small: its simulator loses nobody, its model answers alike."""

from __future__ import annotations

import json

from helpers.command_runs import bench


def test_the_bench_serves_a_day_and_a_model():
    small = ("--num-requests", "400", "--cache-blocks", "80", "--model-requests", "3", "--rounds", "1")
    answers = ("--prompt-tokens", "20", "--new-tokens", "4", "--batch-sizes", "1", "3", "--threads", "1")
    done = bench("serving.py", *small, *answers)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < record["simulator"]["span_s"] / 86_400 < 2
    assert set(record["simulator"]["results"]) == {"continuous", "fifo-batch"}
    for result in record["simulator"]["results"].values():
        assert result["simulated_s"] >= record["simulator"]["span_s"]
        assert result["tokens_per_s"] > result["requests_per_s"] > 0
    assert set(record["model"]["results"]) == {"one by one", "batch 1", "batch 3"}
    assert record["model"]["ratios"]["one by one"] == 1
    assert record["machine"]["cores"] >= 1


def test_a_count_of_nothing_is_one_line():
    done = bench("serving.py", "--num-requests", "0")
    assert (done.returncode, done.stderr) == (2, "error: --num-requests 0: use at least 1\n")
