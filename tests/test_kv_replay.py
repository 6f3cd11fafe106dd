"""The compiled replay equals the plain one: every hit, every event, and the state it leaves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.blocks import HIT, MISS
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, ReplayResult, replay
from helpers.power import examples
from helpers.replay_plain import replay_plain

TOKENS = st.lists(st.integers(0, 1), max_size=14)
TRACES = st.builds(
    lambda rows, block_size: dataclasses.replace(
        BlockTrace.from_tokens(
            [[0, *prompt] for prompt, *_ in rows], [output for _, output, _ in rows], block_size=block_size
        ),
        conversation=np.array([name for *_, name in rows], np.int32),
    ),
    st.lists(st.tuples(TOKENS, TOKENS, st.integers(-1, 3)), max_size=14),
    st.integers(1, 4),
)
CONFIGS = st.builds(
    ReplayConfig,
    num_blocks=st.none() | st.integers(2, 16),
    concurrency=st.integers(1, 5),
    chunk_tokens=st.none() | st.integers(1, 6),
    decode=st.booleans(),
    schedule=st.sampled_from(["in_order", "continuous"]),
    free_order=st.sampled_from(["old", "new"]),
    null_block=st.booleans(),
    prefix_caching=st.sampled_from([True, True, True, False]),
    record_events=st.booleans(),
)


def assert_equal(fast: ReplayResult, plain: ReplayResult) -> None:
    for field in dataclasses.fields(ReplayResult):
        ours, theirs = getattr(fast, field.name), getattr(plain, field.name)
        if field.name == "final":
            ours, theirs = dataclasses.astuple(ours), dataclasses.astuple(theirs)
        elif isinstance(ours, np.ndarray):
            ours, theirs = (ours,), (theirs,)
        if ours is None:
            assert theirs is None, field.name
            continue
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=field.name)


@settings(max_examples=examples(150), deadline=None)
@given(TRACES, CONFIGS)
def test_equals_the_plain_replay(trace: BlockTrace, config: ReplayConfig) -> None:
    assert_equal(replay(trace, config), replay_plain(trace, config))


def test_a_conversation_by_hand() -> None:
    """Three turns, blocks of two: each turn finds the full blocks of all before it, output included."""
    turns = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    outputs = [[4, 5], [7], [0]]
    trace = BlockTrace.from_tokens(turns, outputs, block_size=2, time_s=[0.0, 1.5, 4.0])
    result = replay(trace, ReplayConfig(None, record_events=True))
    assert result.hit_tokens.tolist() == [0, 4, 6]
    assert result.blocks_allocated.tolist() == [3, 2, 2]
    assert result.cached_blocks.tolist() == [0, 2, 3]
    assert (result.num_hit_blocks, result.num_blocks_allocated, result.num_unique_keys) == (5, 7, 5)
    assert result.key_accesses.tolist() == [3, 3, 2, 1, 1]
    assert result.key_hits.tolist() == [2, 2, 1, 0, 0]
    assert result.key_first.tolist() == [0, 0, 1, 2, 2]
    assert result.events is not None
    assert [(e["kind"], e["key"], e["request"]) for e in result.events] == [
        (MISS, 0, 0), (MISS, 1, 0),
        (HIT, 0, 1), (HIT, 1, 1), (MISS, 2, 1),
        (HIT, 0, 2), (HIT, 1, 2), (HIT, 2, 2), (MISS, 3, 2), (MISS, 4, 2),
    ]  # fmt: skip
    assert trace.time_s[result.events["clock"][-1]] == 4.0


def test_why_a_request_is_not_served() -> None:
    trace = BlockTrace.from_tokens([[1] * 9, [2] * 4, [3] * 2], [[], [2] * 9, []], block_size=2)
    in_order = replay(trace, ReplayConfig(4))
    assert in_order.rejections() == {"output_cut": 1, "prompt_too_long": 1, "request_too_long": 0}
    assert in_order.generated_tokens.tolist() == [0, 4, 0]
    assert in_order.served.tolist() == [False, True, True]
    continuous = replay(trace, ReplayConfig(4, schedule="continuous"))
    assert continuous.rejections() == {"output_cut": 0, "prompt_too_long": 0, "request_too_long": 2}
    assert continuous.blocks_allocated.tolist() == [0, 0, 1]


def test_hits_of_a_resumed_request_stand_apart() -> None:
    prompts, outputs = [[1] * 4, [2] * 4], [[1] * 9, [2] * 9]
    trace = BlockTrace.from_tokens(prompts, outputs, block_size=2)
    result = replay(trace, ReplayConfig(9, 2, schedule="continuous"))
    assert result.num_preemptions.tolist() == [0, 1]
    assert result.generated_tokens.tolist() == [9, 9]
    assert result.hit_tokens.tolist() == [0, 0]
    # Both held four full blocks when the first took the ninth. The second gave way, and waited until
    # the first was done, which took one more block: the tail of what the second had left.
    assert (result.resumed_tokens.tolist(), result.resumed_hit_tokens.tolist()) == ([0, 9], [0, 6])
    assert result.blocks_allocated.tolist() == [6, 4 + 2 + 1]
    alone = replay(trace, ReplayConfig(9, 1, schedule="continuous"))
    assert alone.num_preemptions.tolist() == [0, 0]


def test_chunks_alone_change_no_hit() -> None:
    rng = np.random.default_rng(3)
    prompts = [np.append(np.zeros(rng.integers(1, 60), int), rng.integers(0, 9, 30)) for _ in range(80)]
    trace = BlockTrace.from_tokens(prompts, block_size=4)
    whole, chunked = (replay(trace, ReplayConfig(None, 4, chunk_tokens=chunk)) for chunk in (None, 7))
    assert whole.hit_tokens.sum() > 0
    assert whole.hit_tokens.tolist() == chunked.hit_tokens.tolist()


def test_a_turn_waits_for_the_turn_before_it() -> None:
    """Two chats of three turns and one request without a chat, which comes first where turns wait."""
    turns = [[7, 1], [7, 1, 2, 2, 3, 3], [7, 1, 2, 2, 3, 3, 4, 4, 5], [8], [8, 1, 1, 1], [9, 9, 9]]
    outputs = [[2, 2, 9], [4, 4, 9], [1], [1, 1, 9], [1], [1]]
    trace = BlockTrace.from_tokens(turns, outputs, block_size=1)
    chats = dataclasses.replace(trace, conversation=np.array([0, 0, 0, 1, 1, -1], np.int32))
    config = ReplayConfig(None, 4, schedule="continuous", record_events=True)
    alone = replay(chats, dataclasses.replace(config, concurrency=1))
    at_once, waited = replay(trace, config), replay(chats, config)
    assert waited.hit_tokens.tolist() == alone.hit_tokens.tolist() == [0, 4, 8, 0, 3, 0]
    assert at_once.hit_tokens.sum() < waited.hit_tokens.sum()
    assert waited.events is not None
    first = {int(event["request"]): i for i, event in reversed(list(enumerate(waited.events)))}
    assert first[5] < first[1] < first[2]


def test_schedules_agree_without_evictions() -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 2, rng.integers(1, 40)) for _ in range(60)]
    outputs = [rng.integers(0, 2, 3) for _ in prompts]
    trace = BlockTrace.from_tokens(prompts, outputs, block_size=2)
    for decode in (False, True):
        one, other = (
            replay(trace, ReplayConfig(None, decode=decode, schedule=schedule)).hit_tokens
            for schedule in ("in_order", "continuous")
        )
        # An engine never computes the last token, which may have filled a block.
        assert (one >= other).all() and (decode or (one == other).all())
        assert one.sum() > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, not 0"),
        ({"num_blocks": 1, "null_block": True}, "num_blocks must be at least 2, not 1"),
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
    ],
)
def test_a_bad_setting_is_named(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**{"num_blocks": 4, **changed})  # type: ignore[arg-type]
