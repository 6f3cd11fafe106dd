"""The compiled path writes the bytes of the numpy path, and derives the same statistics."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.tiers.account import default_tiers
from dsatrace.trace import kernels as kernels_module
from dsatrace.trace.json_lines import Choice, LineEncoder, Runs
from dsatrace.trace.kernels import compile_kernels
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.statistics import fused_statistics
from helpers.power import examples
from helpers.step_records import step_lines
from helpers.step_statistics import step_statistics
from helpers.trace_samples import LAYOUT, WAYS, config_for, sample_capture, sample_needles

LINES = StepLines()  # one for all, so that what a step leaves in the buffer would show


def derive(capture: Any, **config: Any) -> Any:
    return RecordDeriver(config_for(**config), LAYOUT, default_tiers(LAYOUT)).derive(capture)


@settings(max_examples=examples(100), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seq_lens=st.lists(st.one_of(st.integers(1, 130), st.integers(9_000, 250_000)), min_size=1, max_size=4),
    num_layers=st.integers(1, 3),
    k=st.integers(1, 70),
    block_size=st.one_of(st.integers(1, 50), st.sampled_from([64, 128, 4096])),
    clustered=st.booleans(),
    cached=st.integers(0, 6),
    forward_idx=st.integers(0, 2**62),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    how=st.sampled_from(WAYS),
)
def test_the_same_bytes(
    seed: int,
    seq_lens: list[int],
    num_layers: int,
    k: int,
    block_size: int,
    clustered: bool,
    cached: int,
    forward_idx: int,
    name: str,
    how: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    capture = sample_capture(
        rng,
        seq_lens,
        num_layers,
        k,
        clustered=clustered,
        cached_blocks=[min(cached, n // block_size) for n in seq_lens],
        request_ids=tuple(f"{name}{b}" for b in range(len(seq_lens))),
        forward_idx=forward_idx,
        needles=sample_needles(rng, seq_lens),
    )
    capture = dataclasses.replace(capture, step_idx=(-1, 0, 12, 10_000)[: len(seq_lens)])
    step = derive(capture, block_size=block_size, **how)
    assert bytes(LINES.encode(step)) == step_lines(step)

    reference = step_statistics(
        capture.positions,
        capture.seq_len,
        np.array([p.num_cached_blocks for p in capture.prefixes]),
        block_size,
    )
    for field in dataclasses.fields(reference):
        ours, theirs = getattr(step.stats, field.name), getattr(reference, field.name)
        assert ours.dtype == theirs.dtype, field.name
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


def test_views_and_read_only_arrays_are_taken() -> None:
    ring = np.full((3, 8, 5), -1, dtype=np.int32)
    ring[:, 0] = np.arange(15).reshape(3, 5)
    frozen = ring[:, :1].copy()
    frozen.flags.writeable = False
    for positions in (ring[:, :1], frozen):
        stats = fused_statistics(positions, np.array([20], dtype=np.int32), np.array([0]), 4)
        assert stats.tokens.tolist() == list(range(15))


def random_selection(rng: np.random.Generator) -> np.ndarray:
    """(2, 2, 4) positions of 10 visible ones, seldom a selection a model could make."""
    positions = rng.integers(-1, 12, (2, 2, 4)).astype(np.int32)
    for row in positions.reshape(-1, 4)[rng.random(4) < 0.7]:
        row[:] = rng.choice(10, 4, replace=False)
    return positions


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_same_selections_are_refused(seed: int) -> None:
    positions = random_selection(np.random.default_rng(seed))
    arguments = (positions, np.array([10, 10]), np.array([0, 0]), 4)
    try:
        expected = step_statistics(*arguments)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            fused_statistics(*arguments)
        assert str(caught.value) == str(error)
    else:
        np.testing.assert_array_equal(fused_statistics(*arguments).tokens, expected.tokens)


@given(
    ints=st.lists(st.integers(-(2**63) + 1, 2**63 - 1), min_size=1, max_size=20),
    runs=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), min_size=1, max_size=6),
    floats=st.lists(st.floats(width=32), min_size=1, max_size=20),
)
@settings(deadline=None)
def test_columns_are_written_as_orjson_writes_records(
    ints: list[int], runs: list[list[int]], floats: list[float]
) -> None:
    encoder = LineEncoder()
    doubles = np.array(floats) / 3
    for column, values in (
        (np.array(ints), ints),
        (np.array(floats, dtype=np.float32), np.array(floats, dtype=np.float32)),
        (doubles, doubles.tolist()),
    ):
        lines = bytes(encoder.encode({"a": {}, "b": {"x": column, "y": None}}, len(values))).splitlines()
        expected = [{"a": {}, "b": {"x": value, "y": None}} for value in values]
        assert lines == [orjson.dumps(one, option=orjson.OPT_SERIALIZE_NUMPY) for one in expected]

    ends = np.cumsum([len(run) for run in runs])
    joined = np.array([value for run in runs for value in run], dtype=np.int32)
    column = Runs(joined, np.insert(ends[:-1], 0, 0), ends)
    lines = bytes(encoder.encode({"r": column, "s": column}, len(runs))).splitlines()
    assert lines == [orjson.dumps({"r": run, "s": run}) for run in runs]


def test_choices() -> None:
    column = Choice(["a\n\u2028", None, True], np.array([2, 0, 0, 1]))
    lines = bytes(LineEncoder().encode({"é": column}, 4)).decode().split("\n")[:-1]
    assert [json.loads(line)["é"] for line in lines] == [True, "a\n\u2028", "a\n\u2028", None]
    assert lines[0] == '{"é":true}'


def test_nothing_is_compiled_while_a_step_is_written() -> None:
    compile_kernels()
    kernels = [kernel for kernel, _ in kernels_module._KERNELS]
    capture = sample_capture(np.random.default_rng(0), [90, 40], step_idx=3)
    LINES.encode(derive(capture))
    assert [len(kernel.signatures) for kernel in kernels] == [1] * len(kernels)
    with pytest.raises(TypeError):
        kernels[0](1.5)


def test_a_block_larger_than_any_context() -> None:
    step = derive(sample_capture(np.random.default_rng(0), [90]), block_size=2**40)
    assert bytes(LINES.encode(step)) == step_lines(step)
    assert step.stats.block_ids.tolist() == [0, 0]
