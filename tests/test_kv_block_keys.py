"""Keys and ids of blocks are equal exactly where the tokens before and in them are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.prefix import KeyChain
from dsatrace.kv.simulation.block_trace import BlockTrace
from helpers.trace_samples import SECRET

PROMPTS = st.lists(
    st.lists(st.integers(-(2**31), -(2**31) + 1) | st.integers(0, 1), min_size=1, max_size=12), max_size=8
)
EXTRA = st.sampled_from([(), ("a",), ("b",), ("a", "b"), ("ab",)])


def prefixes(tokens: list[int], block_size: int) -> list[tuple[int, ...]]:
    """The tokens that each full block's key stands for."""
    return [tuple(tokens[:end]) for end in range(block_size, len(tokens) + 1, block_size)]


@settings(deadline=None)  # the first call compiles
@given(PROMPTS, st.integers(1, 4), st.lists(EXTRA, min_size=8, max_size=8))
def test_equal_keys_mean_equal_prefixes(
    prompts: list[list[int]], block_size: int, extra: list[tuple[str, ...]]
) -> None:
    trace = BlockTrace.from_tokens(prompts, block_size=block_size, extra=extra[: len(prompts)])
    chained: dict[object, bytes] = {}
    exact: dict[object, int] = {}
    for r, tokens in enumerate(prompts):
        chain = KeyChain(block_size, SECRET, extra[r])
        chain.extend(tokens)
        names = [(extra[r], prefix) for prefix in prefixes(tokens, block_size)]
        assert len(chain.keys) == len(names) == len(trace.keys_of(r))
        for name, key, number in zip(names, chain.keys, trace.keys_of(r), strict=True):
            assert chained.setdefault(name, key) == key
            assert exact.setdefault(name, number) == number
        before = [-1, *trace.keys_of(r)][: len(names)]
        parents = trace.parents[trace.keys_of(r)].tolist()
        assert [max(parent, -1) for parent in parents] == before
    assert len(set(chained.values())) == len(chained)
    assert sorted(exact.values()) == list(range(trace.num_keys))  # numbered as they appear


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 4), st.data())
def test_a_chain_grows_by_any_steps(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    at_once, stepwise = KeyChain(block_size, SECRET, ("salt",)), KeyChain(block_size, SECRET, ("salt",))
    at_once.extend(tokens)
    rest = tokens
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        stepwise.extend(rest[:n])
        rest = rest[n:]
    assert stepwise.keys == at_once.keys


def test_outputs_follow_their_prompt() -> None:
    trace = BlockTrace.from_tokens([[1, 2, 3], [1, 2, 3, 4, 5]], [[4, 5, 6], []], block_size=2)
    assert [trace.keys_of(0), trace.keys_of(1)] == [[0, 1, 2], [0, 1]]
    assert trace.total_tokens.tolist() == [6, 5]
    assert trace.num_blocks_at_most == 6
    assert trace.time_s.tolist() == [0.0, 1.0]


def test_many_ids_fill_the_hash_table() -> None:
    """Against a dictionary, with thousands of blocks that share long stems."""
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 2, 400)
    prompts = [np.concatenate([stem[: rng.integers(400)], rng.integers(0, 2, 40)]) for _ in range(300)]
    trace = BlockTrace.from_tokens(prompts, block_size=3)
    number: dict[tuple[int, ...], int] = {}
    for r, tokens in enumerate(prompts):
        expected = [number.setdefault(prefix, len(number)) for prefix in prefixes(tokens.tolist(), 3)]
        assert trace.keys_of(r) == expected
    assert trace.num_keys == len(number) > 2000


def test_block_ids_of_a_public_trace() -> None:
    rows = [[7, 40, 41], [7, 40, 9], [8]]
    trace = BlockTrace.from_block_ids(rows, [1100, 1536, 100], [3, 0, 5], block_size=512, time_s=[0, 0, 2.5])
    assert [trace.keys_of(r) for r in range(3)] == [
        [0, 2],
        [0, 2, 1],
        [],
    ]  # ids of partial blocks are dropped
    assert trace.parents.tolist() == [-1, 2, 0]
    with pytest.raises(ValueError, match="request 1 of the trace: block id 40 follows another block"):
        BlockTrace.from_block_ids([[7, 40], [8, 40]], [8, 8], [0, 0], block_size=4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [[1], []]}, "request 1 of the trace has no prompt token"),
        ({"block_size": 0}, "block_size 0 must be at least 1"),
        ({"time_s": [2.0, 1.0]}, "request 1 of the trace arrives before"),
        ({"outputs": [[1]]}, "2 prompts but 1 outputs"),
        ({"time_s": [1.0]}, "columns of a trace have different lengths"),
    ],
)
def test_a_bad_trace_is_named(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"prompts": [[1], [2, 3]], "block_size": 2, **changed}
    with pytest.raises(ValueError, match=message):
        BlockTrace.from_tokens(**arguments)  # type: ignore[arg-type]


def test_ids_that_contradict_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="request 0 of the trace has a negative number of output tokens"):
        BlockTrace.from_block_ids([[1]], [4], [-1], block_size=4)
    with pytest.raises(ValueError, match="request 0 of the trace has more ids than full blocks"):
        one, none = np.ones(1, np.int64), np.zeros(1, np.int64)
        ids, parents = np.zeros(1, np.int32), np.full(1, -1, np.int32)
        BlockTrace(4, one, none, ids, np.array([0, 1]), parents, np.zeros(1))


def test_a_bad_secret_or_block_size_is_refused() -> None:
    with pytest.raises(ValueError, match="16 to 64 bytes, not 3"):
        KeyChain(4, b"abc")
    with pytest.raises(ValueError, match="block_size 0"):
        KeyChain(0, SECRET)
