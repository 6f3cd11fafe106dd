"""Sweeps: the same cells as simulation and as the pool, whatever the number of workers, in files."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.simulation.replay import ReplayConfig, replay
from dsatrace.study.accesses import Accesses, write_accesses
from dsatrace.study.requests import RequestsBuilder, StudyRequests, block_trace
from dsatrace.study.sweep import BY_WORKLOAD, SweepSettings, policy_runs, single_workload_policies, sweep
from dsatrace.study.sweep_cells import OPT, OVERALL, POOL, PolicyRun, lru_cells, pool_cells, simulated_cells
from dsatrace.study.sweep_inputs import (
    RequestLog,
    SeededSettings,
    limited,
    read_log,
    seeded_logs,
    split_by_workload,
)
from dsatrace.study.sweep_streams import CacheInput
from dsatrace.study.tokenization import WordVocabulary, open_vocabulary
from dsatrace.workloads.tokenizer import BOS
from helpers.study_samples import check_mistake, read_csv, study, study_json

BLOCK = 4
SMALL = SeededSettings(num_requests=40)


def chats(num_requests: int, seed: int, *, partial: bool = False) -> StudyRequests:
    """Turns of a few conversations, mixed at random; every request is prompt and answer of new tokens.

    With `partial` no prompt and no answer ends with a block.
    """
    draw = random.Random(seed)
    fresh = iter(range(10**6))
    histories: list[list[int]] = [[next(fresh) for _ in range(8)] for _ in range(3)]  # shared beginnings
    builder = RequestsBuilder()
    for at in range(num_requests):
        history = draw.choice(histories[-6:])
        prompt = history + [next(fresh) for _ in range(draw.randint(1, 12))]
        answer = [next(fresh) for _ in range(draw.randint(1, 12))]
        while partial and len(prompt) % BLOCK == 0:
            prompt.append(next(fresh))
        while partial and (len(prompt) + len(answer)) % BLOCK == 0:
            answer.append(next(fresh))
        builder.add(float(at), prompt, answer, conversation=(str(at),), turn=0, workload="abc"[at % 3])
        histories.append((prompt + answer)[:60] if len(prompt) < 60 else histories[0])
    return builder.build()


def accesses_of(requests: StudyRequests, block_size: int = BLOCK) -> Accesses:
    return Accesses.of(requests, block_trace(requests, block_size))


def one_workload(given: CacheInput) -> CacheInput:
    """The same requests under one label."""
    stream = dataclasses.replace(
        given.stream, workloads=np.zeros_like(given.stream.workloads), workload_names=("all",)
    )
    return dataclasses.replace(given, stream=stream)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(("reject", "truncate")), st.integers(1, 3))
def test_lru_of_one_pass_is_lru_simulated_at_every_capacity(seed, oversize, concurrency):
    given_ = CacheInput.of(accesses_of(chats(60, seed)), BLOCK, concurrency)
    capacities = [2, 7, 12, 30, 80]
    one_pass = lru_cells("t", given_, capacities, oversize)
    one_by_one = [
        cell
        for size in capacities
        for leaf in (True,)
        for cell in simulated_cells("t", given_, PolicyRun("lru", leaf), size, oversize)
    ]
    key = lambda cell: (cell.capacity_blocks, cell.workload)  # noqa: E731
    assert sorted(one_pass, key=key) == sorted(one_by_one, key=key)
    assert len(one_pass) == 4 * len(capacities)  # overall and three workloads


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(26, 70))
def test_lru_hits_what_the_pool_with_one_more_block_hits(seed, capacity):
    """One request at a time, each with one partial block: difference 1 of `sweep_cells`, and no other."""
    requests = chats(80, seed, partial=True)
    given_ = one_workload(CacheInput.of(accesses_of(requests), BLOCK))
    (lru,) = lru_cells("t", given_, [capacity], "reject")
    (pool,) = pool_cells("t", given_, capacity + 1, concurrency=1)
    assert lru.rejected == pool.rejected == 0
    assert (lru.accesses, lru.hits, lru.block_hits) == (pool.accesses, pool.hits, pool.block_hits)
    assert lru.hits > 0
    result = replay(block_trace(requests, BLOCK), ReplayConfig(capacity + 1))
    assert pool.hits == int(result.hit_tokens.sum()) // BLOCK


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(26, 70))
def test_the_pool_lies_between_lru_with_a_block_less_and_lru(seed, capacity):
    given_ = one_workload(CacheInput.of(accesses_of(chats(80, seed)), BLOCK))
    less, same = lru_cells("t", given_, [capacity - 1, capacity], "reject")
    (pool,) = pool_cells("t", given_, capacity, concurrency=1)
    assert less.hits <= pool.hits <= same.hits


def test_the_pool_and_the_policies_reject_the_same_requests():
    given_ = CacheInput.of(accesses_of(chats(80, 3)), BLOCK)
    for capacity in (1, 3, 5, 8, 13):
        pool, *_ = pool_cells("t", given_, capacity, concurrency=2)
        lru, *_ = lru_cells("t", given_, [capacity], "reject")
        assert 0 < pool.rejected == lru.rejected
        assert pool.accesses == lru.accesses == lru.hits + lru.misses
        (all_of_them, *_) = lru_cells("t", given_, [capacity], "truncate")
        assert all_of_them.rejected == 0
        assert all_of_them.accesses == int(given_.prompt_blocks.sum())


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_policy_in_either_form_beats_opt(concurrency):
    inputs = {
        (OVERALL, size): CacheInput.of(accesses_of(chats(150, 9), size), size, concurrency) for size in (2, 4)
    }
    options = SweepSettings((8, 16, 40), policy_runs(single_workload_policies(), ("leaf", "flat")))
    cells = [cell for cell in sweep(inputs, options) if cell.workload == OVERALL]
    bound = {(cell.block_size, cell.capacity_blocks): cell for cell in cells if cell.policy == OPT}
    assert len({cell.policy for cell in cells}) > 18
    for cell in cells:
        if cell.policy != POOL:
            best = bound[cell.block_size, cell.capacity_blocks]
            assert cell.hits <= best.hits
            assert cell.block_hits <= best.block_hits
            assert cell.hits <= cell.block_hits <= cell.accesses


def test_a_policy_above_the_bound_is_our_mistake(monkeypatch):
    given_ = one_workload(CacheInput.of(accesses_of(chats(80, 5)), BLOCK))
    options = SweepSettings((20,), policy_runs(["lru"]))
    monkeypatch.setattr(
        "dsatrace.study.sweep.simulated_cells",
        lambda trace, given, run, capacity, oversize: simulated_cells(
            trace, given, PolicyRun("mru", leaf=False) if run.policy == OPT else run, capacity, oversize
        ),
    )
    monkeypatch.setattr(PolicyRun, "name", property(lambda run: OPT if run.policy == "mru" else run.policy))
    with pytest.raises(AssertionError, match="hits more than OPT"):
        sweep({("t", BLOCK): given_}, options)


def test_several_workloads_must_be_the_only_trace():
    given_ = CacheInput.of(accesses_of(chats(30, 5)), BLOCK)
    options = SweepSettings((20,), policy_runs(["lru"]))
    with pytest.raises(UserError, match="t has several workloads"):
        sweep({("t", BLOCK): given_}, options)
    stream = dataclasses.replace(given_.stream, workload_names=("a", OVERALL, "c"))
    with pytest.raises(UserError, match="a workload is named 'overall'"):
        sweep({(OVERALL, BLOCK): dataclasses.replace(given_, stream=stream)}, options)


def test_a_trace_that_contradicts_itself_is_named():
    accesses = accesses_of(chats(30, 5))
    second = np.isin(np.arange(len(accesses.blocks)), accesses.starts[[0, 2]] + 1)
    for field, value, message in (
        ("num_tokens", accesses.num_tokens * 0, "request 0 of the trace has no prompt token"),
        ("blocks", np.where(second, accesses.blocks.max(), accesses.blocks), "follows another block"),
        ("blocks", accesses.blocks * 0, "names a block twice"),
    ):
        with pytest.raises(UserError, match=message):
            CacheInput.of(dataclasses.replace(accesses, **{field: value}), BLOCK)


def test_any_number_of_workers_gives_the_same_cells():
    words = open_vocabulary(None)
    logs = seeded_logs(("qa", "chat_multi"), SMALL, words)
    inputs = {(log.name, size): log.at(size) for log in logs for size in (16, 32)}
    options = SweepSettings((32, 64), policy_runs(["fifo", "random", "lru"], ("flat", "leaf")))
    told: list[tuple[int, int]] = []
    alone = sweep(inputs, options, 1, lambda done, total: told.append((done, total)))
    assert alone == sweep(inputs, options, 2)
    assert told == [(i, told[-1][1]) for i in range(1, told[-1][1] + 1)]
    assert [cell.workload for cell in alone] == sorted((c.workload for c in alone), reverse=True)
    assert {cell.policy for cell in alone} == {"fifo", "fifo-flat", "random", "random-flat", "lru", OPT, POOL}
    assert len(alone) == 2 * 2 * 2 * 7


def test_outputs_are_cached_but_not_looked_up():
    builder = RequestsBuilder()
    builder.add(0.0, range(100, 108), range(200, 208))
    builder.add(1.0, [*range(100, 108), *range(200, 208), *range(300, 304)], range(400, 404))
    builder.add(2.0, range(100, 108), range(200, 208))  # the first one again: its answer is computed again
    given_ = CacheInput.of(accesses_of(builder.build()), BLOCK)
    assert given_.stream.lengths.tolist() == [4, 6, 4]
    assert (given_.num_repeated, given_.prompt_blocks.tolist()) == (2, [2, 5, 2])
    (cell,) = simulated_cells("t", given_, PolicyRun("fifo"), 10, "reject")
    assert (cell.accesses, cell.hits, cell.misses, cell.output_hits) == (9, 4 + 2, 3, 2)
    (lru,) = lru_cells("t", given_, [10], "reject")
    assert (lru.hits, lru.misses, lru.block_hits, lru.output_hits) == (6, 3, 6, 2)
    (pool,) = pool_cells("t", given_, 10, concurrency=1)
    assert pool.hits == cell.hits - 1  # difference 3: the third prompt's last block


def test_a_repeated_answer_is_cached_again_once_it_was_evicted():
    """Two turns, something else that fills the cache, and the same two turns: each pair hits alike."""
    first = list(range(100, 110))
    answer, rest = list(range(200, 210)), list(range(300, 305))
    builder = RequestsBuilder()
    for at in (0.0, 3.0):
        builder.add(at, first, answer)  # 2 full blocks, with the answer 5
        builder.add(at + 1, [*first, *answer, *rest])  # 6 full blocks, the first 5 hit
        builder.add(at + 2, range(int(1000 + 50 * at), int(1040 + 50 * at)))  # 10: all there are
    given_ = CacheInput.of(accesses_of(builder.build()), BLOCK)
    assert given_.num_repeated == 3
    for run in policy_runs(["lru", "fifo", "opt"]):
        (cell,) = simulated_cells("t", given_, run, 10, "reject")
        assert cell.hits == 5 + 5
    (lru,) = lru_cells("t", given_, [10], "reject")
    (pool,) = pool_cells("t", given_, 10, concurrency=1)
    assert lru.hits == pool.hits == 10


def test_accesses_at_a_multiple_of_their_block_size():
    requests = chats(60, 4)
    fine, coarse = accesses_of(requests, 2), accesses_of(requests, 6)
    derived, direct = CacheInput.of(fine, 6), CacheInput.of(coarse, 6)
    assert derived.stream.starts.tolist() == direct.stream.starts.tolist()
    assert derived.prompt_blocks.tolist() == direct.prompt_blocks.tolist()
    assert lru_cells("t", derived, [5, 20], "reject") == lru_cells("t", direct, [5, 20], "reject")
    for size in (1, 3, 7):
        with pytest.raises(UserError, match="recorded at block size 2 cannot be replayed"):
            CacheInput.of(fine, size)


def test_rows_taken_from_accesses_are_those_of_the_requests():
    requests = chats(30, 8)
    rows = np.array([3, 4, 17, 29])
    taken, direct = accesses_of(requests).take(rows), accesses_of(requests.take(rows))
    capacities = [4, 12, 40]
    assert taken.workloads == direct.workloads
    assert lru_cells("t", CacheInput.of(taken, BLOCK), capacities, "truncate") == lru_cells(
        "t", CacheInput.of(direct, BLOCK), capacities, "truncate"
    )


def test_a_request_without_a_full_block_counts_nothing():
    builder = RequestsBuilder()
    for at in range(3):
        builder.add(float(at), [1, 2, 3])
    given_ = CacheInput.of(accesses_of(builder.build()), BLOCK)
    for cell in (*lru_cells("t", given_, [1], "reject"), *pool_cells("t", given_, 1, 1)):
        assert (cell.requests, cell.accesses, cell.hits, cell.hit_rate) == (3, 0, 0, 0.0)


def test_words_are_equal_where_the_text_is():
    words = WordVocabulary()
    first, again = words.encode("Hi there, you.\n\nHi there"), words.encode("Hi there, you.\n\nHi there")
    assert first == again
    assert len(first) == 9
    assert first[:2] != words.encode(" Hi there")[:2]
    assert BOS not in words.encode(BOS)
    assert words.special_id(BOS) not in words.encode(f"a {BOS} b")


def test_a_trace_is_split_by_its_labels():
    log = RequestLog("file", "file.jsonl", chats(30, 2))
    parts = split_by_workload(log)
    assert [(part.name, len(part)) for part in parts] == [("a", 10), ("b", 10), ("c", 10)]
    assert split_by_workload(parts[1])[0].labels == ("b",) * 10
    kept, counts = limited(log, 40, 1)
    assert len(kept) < len(log)
    assert counts["conversations dropped: a request over max_tokens"] > 0


def run(*argv: object) -> int:
    return study("sweep", *argv)


def test_the_command_writes_tables_pictures_and_what_they_mean(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--workloads", "qa", "--num-requests", 60, "--policies", "lru", "s3-fifo"]
    command += ["--block-sizes", 16, 32]
    assert run(*command, "--capacities", 64, 16, "--output-dir", out) == 0
    shown = capsys.readouterr().out
    assert "qa, blocks of 16 tokens" in shown
    assert "s3-fifo" in shown
    pictures = {f"cache_hits_qa_{policy}.png" for policy in ("lru", "s3-fifo", "vllm")}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "sweep.json", "sweep.csv"} | pictures
    result = json.loads((out / "sweep.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    rows = read_csv(out / "sweep.csv")
    assert len(rows) == len(result["cells"]) == 2 * 2 * 4
    assert [row["hits"] for row in rows] == [str(cell["hits"]) for cell in result["cells"]]
    assert manifest["state"] == "complete"
    assert manifest["argv"][:3] == ["dsatrace", "study", "sweep"]
    assert manifest["sources"] == ["synthetic: seeded generators"]
    assert manifest["settings"]["oversize"] == "reject"
    assert set(result["semantics"]) >= {"accesses", "hits", "vllm", "in flight", "rejected"}
    for cell in result["cells"]:
        assert cell["accesses"] == cell["hits"] + cell["misses"]
        assert cell["hit_rate"] == round(cell["hits"] / cell["accesses"], 6)
    (log,) = seeded_logs(["qa"], SeededSettings(num_requests=60), open_vocabulary(None))
    stream = log.at(16).stream
    wanted = {"policy": "s3-fifo", "block_size": 16, "capacity_blocks": 64}
    (cell,) = (cell for cell in result["cells"] if cell.items() >= wanted.items())
    assert cell["hits"] == int(simulate(stream, "s3-fifo", 64, leaf=True).hits.sum())


def test_the_command_reads_recorded_accesses_and_conversations(tmp_path):
    recorded, sample = tmp_path / "recorded", tmp_path / "chats.json"
    recorded.mkdir()
    write_accesses(recorded, accesses_of(chats(60, 1)))
    quick = ("--capacities", 20, "--policies", "lru")
    cells = study_json(tmp_path / "a", "sweep.json", "sweep", "--trace-file", recorded, *quick)["cells"]
    assert {(cell["workload"], cell["block_size"]) for cell in cells} == {("a", 4), ("b", 4), ("c", 4)}
    turns = [{"from": speaker, "value": "word " * 60} for speaker in ("human", "gpt", "human", "gpt")]
    sample.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    command = ("--data-path", sample, "--workloads", "chat_single", "chat_multi", "--min-turns", 2)
    every = ("--max-conversations", "all")
    result = study_json(tmp_path / "b", "sweep.json", "sweep", *command, *every, *quick)
    assert [trace["requests"] for trace in result["traces"]] == [3, 6]
    assert result["sources"][0]["path"] == str(sample)
    assert read_log(recorded, open_vocabulary(None)).block_size == BLOCK


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "lur"], "unknown policy 'lur'; choose from lru"),
        (["--policies", "wa-lru"], "policy wa-lru tells workloads apart"),
        (["--policies", "lru", "lru"], "name each policy once"),
        (["--capacities", "0"], "a cache holds at least 1 block, not 0"),
        (["--capacities", "8", "8"], "name each capacity once"),
        (["--block-sizes", "0"], "a block holds at least 1 token, not 0"),
        (["--block-sizes", "16", "16"], "name each block size once"),
        (["--num-requests", "0"], "--num-requests must be at least 1, not 0"),
        (["--concurrency", "0"], "--concurrency must be at least 1, not 0"),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--arrival-rate", "nan"], "--arrival-rate must be"),
        (["--trace-file", "none.jsonl"], "none.jsonl"),
        (["--trace-file", "none.jsonl", "--data-path", "x"], "--trace-file is a source by itself"),
        (["--max-tokens", "1"], "no request is left"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(flags, message, tmp_path, capsys):
    source = [] if "--trace-file" in flags else ["--workloads", "qa"]
    base = ["--num-requests", "20", "--skip-visualization", "--output-dir", str(tmp_path / "out")]
    check_mistake(capsys, run(*base, *source, *flags), message)


def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "kept").write_text("x")
    assert run("--workloads", "qa", "--output-dir", tmp_path) == 2
    assert "holds something already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_default_policies_are_all_that_need_no_workloads():
    assert set(single_workload_policies()) | set(BY_WORKLOAD) == set(POLICIES)
