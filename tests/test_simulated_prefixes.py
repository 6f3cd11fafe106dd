"""The engine's scheduler with the token simulator finds what the replay of the pool says, hit by hit."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.live import LiveRequest
from dsatrace.engine.simulator import NO_TOKEN, Turn, simulate_prefixes
from dsatrace.errors import UserError
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, ReplayResult, replay
from helpers.power import examples
from helpers.real_data import oracle_file, real_file

TOKENS = st.lists(st.integers(0, 1), max_size=14)
ROWS = st.lists(st.tuples(TOKENS.map(lambda tokens: [0, *tokens]), TOKENS), max_size=14)


def simulate(turns: Iterable[Turn], **how: Any) -> list[LiveRequest]:
    return sorted(simulate_prefixes(turns, **how), key=lambda live: int(live.request_id))


def found(served: list[LiveRequest]) -> list[int | None]:
    return [live.prefix_hit_tokens for live in served]


def replayed(result: ReplayResult) -> list[int | None]:
    return [
        hits if served else None
        for hits, served in zip(result.hit_tokens.tolist(), result.served.tolist(), strict=True)
    ]


@settings(max_examples=examples(150), deadline=None)
@given(
    rows=ROWS,
    block_size=st.integers(1, 4),
    num_blocks=st.integers(1, 16),
    chunk=st.integers(1, 6),
    prefix_caching=st.sampled_from([True, True, True, False]),
)
def test_one_at_a_time_equals_the_replay_of_the_pool(
    rows: list[tuple[list[int], list[int]]],
    block_size: int,
    num_blocks: int,
    chunk: int,
    prefix_caching: bool,
) -> None:
    trace = BlockTrace.from_tokens([p for p, _ in rows], [o for _, o in rows], block_size=block_size)
    config = ReplayConfig(
        num_blocks, chunk_tokens=chunk, schedule="continuous", prefix_caching=prefix_caching
    )
    hits = simulate(
        [(0.0, *row) for row in rows],
        block_size=block_size,
        num_blocks=num_blocks,
        prefill_chunk=chunk,
        prefix_caching=prefix_caching,
    )
    assert found(hits) == replayed(replay(trace, config))


@settings(max_examples=examples(50), deadline=None)
@given(rows=ROWS, block_size=st.integers(1, 4), num_blocks=st.integers(30, 60), chunk=st.integers(1, 6))
def test_one_token_more_equals_the_replay_in_order(
    rows: list[tuple[list[int], list[int]]], block_size: int, num_blocks: int, chunk: int
) -> None:
    """`in_order` keeps the last output token's KV, as the recorded answers do; an engine that is to
    generate one more computes it too. Where everything fits the two then agree."""
    trace = BlockTrace.from_tokens([p for p, _ in rows], [o for _, o in rows], block_size=block_size)
    hits = simulate(
        [(0.0, prompt, [*output, NO_TOKEN]) for prompt, output in rows],
        block_size=block_size,
        num_blocks=num_blocks,
        prefill_chunk=chunk,
    )
    assert found(hits) == replayed(replay(trace, ReplayConfig(num_blocks)))


@settings(max_examples=examples(50), deadline=None)
@given(
    rows=ROWS,
    block_size=st.integers(1, 4),
    num_blocks=st.integers(8, 40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_served_together_every_prompt_token_is_hit_or_computed(
    rows: list[tuple[list[int], list[int]]], block_size: int, num_blocks: int, batch_size: int, seed: int
) -> None:
    arrivals = np.random.default_rng(seed).exponential(0.05, len(rows)).cumsum().tolist()
    turns = [(at, *row) for at, row in zip(arrivals, rows, strict=True)]
    hits = simulate(
        turns, block_size=block_size, num_blocks=num_blocks, max_batch_size=batch_size, prefill_chunk=4
    )
    assert [one.prompt_len for one in hits] == [len(prompt) for prompt, _ in rows]
    for one in hits:
        if one.state != "rejected" and one.num_preemptions == 0:
            assert one.prefix_hit_tokens + one.num_prefill_tokens == one.prompt_len
            assert one.resumed_tokens == 0
        assert one.resumed_hit_tokens <= one.resumed_tokens


def test_a_conversation_by_hand() -> None:
    """Blocks of two. The second turn finds [1 2] [3 4], the third [1 2] [3 4] [5 6]; at the same
    time as the first turn, an equal prompt finds what that one has just computed."""
    turns = [
        (0.0, [1, 2, 3], [4, 5]),
        (0.0, [1, 2, 3], [4, 5]),
        (9.0, [1, 2, 3, 4, 5, 6], [7]),
        (20.0, [1, 2, 3, 4, 5, 6, 7, 8, 9], []),
    ]
    hits = simulate(turns, block_size=2, num_blocks=64, max_batch_size=4)
    assert found(hits) == [0, 2, 4, 6]
    without = simulate(turns, block_size=2, num_blocks=64, prefix_caching=False)
    assert found(without) == [0, 0, 0, 0]


def test_what_never_fits_is_rejected_and_order_is_checked() -> None:
    hits = simulate([(0.0, [1] * 9, [2]), (0.0, [1] * 8, [])], block_size=2, num_blocks=4)
    assert [one.state for one in hits] == ["rejected", "length"]
    with pytest.raises(UserError, match="sort the requests by arrival"):
        simulate([(1.0, [1], []), (0.0, [1], [])], block_size=2, num_blocks=4)


@pytest.fixture(scope="module")
def recorded_requests() -> dict[str, list[tuple[list[int], list[int]]]]:
    with gzip.open(oracle_file("synthetic_requests.json.gz"), "rt") as file:
        synthetic = [(row["prompt"], row["output"]) for row in json.load(file)]
    lines = real_file("sharegpt300_llama31.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    sharegpt = [(row["input_tok_ids"], row["output_tok_ids"]) for row in rows]
    return {"synthetic": synthetic, "sharegpt300": sharegpt}


def recorded_cases() -> list[dict[str, Any]]:
    return [
        case
        for case in map(json.loads, oracle_file("vllm_hits.jsonl").open())
        if case["concurrency"] == 1 and not case["rejected"] and not case["truncated"]
    ]


def test_the_recorded_answers_of_vllm(
    recorded_requests: dict[str, list[tuple[list[int], list[int]]]],
) -> None:
    """Every case that serves one request at a time, request by request. Its pool keeps a block back."""
    cases = recorded_cases()
    assert len(cases) >= 20
    for case in cases:
        hits = simulate(
            (
                (0.0, prompt, [*(output if case["decode"] else []), NO_TOKEN])
                for prompt, output in recorded_requests[case["trace"]]
            ),
            block_size=case["block_size"],
            num_blocks=case["num_blocks"] - 1,
        )
        assert found(hits) == case["hits"], {
            name: case[name] for name in ("trace", "block_size", "num_blocks")
        }
