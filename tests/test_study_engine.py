"""`study run --runner engine`: the engine's own scheduler finds what the replay of the pool finds."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsatrace.cli import main
from dsatrace.study.engine_check import through_the_engine
from dsatrace.study.request_files import read_requests
from dsatrace.study.run import StudySettings, run_study
from dsatrace.study.tokenization import WordVocabulary
from dsatrace.workloads.rows import BadRows
from helpers.real_data import real_file
from helpers.study_samples import requests_of


def of(turns):
    return requests_of([(prompt, answer, "chat_multi") for prompt, answer in turns])


TURNS = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.lists(st.integers(0, 2), max_size=6)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    turns=TURNS,
    block_size=st.integers(1, 4),
    num_blocks=st.sampled_from([None, 24, 40]),
    schedule=st.sampled_from(["continuous", "in_order"]),
    decode=st.booleans(),
    chunk_tokens=st.integers(1, 9),
)
def test_one_at_a_time_they_agree(turns, block_size, num_blocks, schedule, decode, chunk_tokens):
    options = StudySettings(
        block_size, num_blocks, schedule=schedule, decode=decode, chunk_tokens=chunk_tokens
    )
    replayed = run_study(of(turns), options)
    check = through_the_engine(replayed)
    assert check.num_equal == check.num_requests == len(turns)
    assert check.hit_tokens == check.replay_hit_tokens
    assert check.num_rejected == 0


@pytest.mark.parametrize("name", ["sharegpt300_llama31.jsonl", "mooncake/conversation_trace_head500.jsonl"])
def test_on_real_traces(name):
    requests = read_requests(real_file(name), WordVocabulary(), BadRows())
    some = requests.take(np.arange(60))
    options = StudySettings(block_size=512 if "mooncake" in name else 16, schedule="continuous")
    replayed = run_study(some, options)
    check = through_the_engine(replayed)
    assert check.num_equal == 60
    assert check.hit_rate == pytest.approx(replayed.result.hit_tokens.sum() / check.prompt_tokens)


def test_the_command_says_both(tmp_path, capsys):
    flags = ["--runner", "engine", "--schedule", "continuous", "--num-blocks", "400", "--skip-visualization"]
    assert main(["study", "run", *flags, "--output-dir", str(tmp_path / "run")]) == 0
    assert "Through the engine's scheduler" in capsys.readouterr().out
    stats = json.loads((tmp_path / "run" / "engine_stats.json").read_text())
    assert stats["num_equal"] == stats["num_requests"] == 17
    assert stats["hit_tokens"] == stats["replay_hit_tokens"] > 0


def test_without_prefix_caching_nothing_is_found():
    requests = of([([1, 2, 3, 4, 5], [6]), ([1, 2, 3, 4, 5], [6])])
    options = StudySettings(block_size=2, prefix_caching=False)
    assert through_the_engine(run_study(requests, options)).hit_tokens == 0
    cached = dataclasses.replace(options, prefix_caching=True)
    assert through_the_engine(run_study(requests, cached)).hit_tokens == 4
