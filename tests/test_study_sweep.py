"""Sweeps: the same cells as simulation and as the pool, whatever the number of workers, in files."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.commands.study.sweep import ALONE
from dsatrace.errors import UserError
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.kv.simulation.replay import ReplayConfig, replay
from dsatrace.study.accesses import write_accesses
from dsatrace.study.prepare import ClientSettings, limit_requests
from dsatrace.study.requests import RequestsBuilder, StudyRequests, block_trace, by_workload
from dsatrace.study.sources import Client, Source
from dsatrace.study.spread import interval, with_intervals
from dsatrace.study.sweep import BY_WORKLOAD, SweepSettings, num_jobs, policy_runs, sweep
from dsatrace.study.sweep_cells import (
    BYPASS,
    OPT,
    OVERALL,
    POOL,
    Given,
    PolicyRun,
    bypass_cells,
    lru_cells,
    num_repeated_outputs,
    pool_cells,
    simulated_cells,
)
from dsatrace.study.tokenization import WordVocabulary, open_vocabulary
from dsatrace.workloads.tokenizer import BOS
from helpers.study_samples import check_mistake, read_csv, study, study_json

BLOCK = 4


def seeded(*names: str, num_requests: int) -> dict[str, StudyRequests]:
    settings = ClientSettings(num_requests=num_requests)
    return Client(Source(workloads=names), settings, open_vocabulary("words")).each()


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


def given_of(requests: StudyRequests, block_size: int = BLOCK, concurrency: int = 1) -> Given:
    return Given.of(block_trace(requests, block_size), concurrency)


def one_workload(trace: BlockTrace) -> BlockTrace:
    """The same requests under one label."""
    return dataclasses.replace(trace, workload=np.zeros_like(trace.workload), workload_names=("all",))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(("reject", "truncate")), st.integers(1, 3))
def test_lru_of_one_pass_is_lru_simulated_at_every_capacity(seed, oversize, concurrency):
    given_ = given_of(chats(60, seed), concurrency=concurrency)
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
    given_ = Given.of(one_workload(block_trace(requests, BLOCK)))
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
    given_ = Given.of(one_workload(block_trace(chats(80, seed), BLOCK)))
    less, same = lru_cells("t", given_, [capacity - 1, capacity], "reject")
    (pool,) = pool_cells("t", given_, capacity, concurrency=1)
    assert less.hits <= pool.hits <= same.hits


def test_the_pool_and_the_policies_reject_the_same_requests():
    given_ = given_of(chats(80, 3))
    prompt_blocks = int(given_.trace.prompt_blocks.sum())
    for capacity in (1, 3, 5, 8, 13):
        pool, *_ = pool_cells("t", given_, capacity, concurrency=2)
        lru, *_ = lru_cells("t", given_, [capacity], "reject")
        assert 0 < pool.rejected == lru.rejected
        assert pool.accesses == lru.accesses == lru.hits + lru.misses == prompt_blocks
        assert 0 < pool.rejected_accesses == lru.rejected_accesses <= lru.misses
        (all_of_them, *_) = lru_cells("t", given_, [capacity], "truncate")
        assert all_of_them.rejected == 0
        assert (all_of_them.accesses, all_of_them.rejected_accesses) == (prompt_blocks, 0)


def test_a_hit_rate_never_falls_as_the_cache_grows():
    """Prompts that a small cache rejects stay in its denominator, so a row of a table has one."""
    given_ = given_of(seeded("summarization", num_requests=80)["summarization"], 16)
    cells = lru_cells("t", given_, [64, 128, 256, 512, 4096], "reject")
    assert cells[0].rejected > 10 > cells[-1].rejected == 0
    assert len({cell.accesses for cell in cells}) == 1
    rates = [cell.hit_rate for cell in cells]
    assert rates == sorted(rates) and rates[-1] > 0


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_policy_in_either_form_beats_opt(concurrency):
    inputs = {(OVERALL, size): block_trace(chats(150, 9), size) for size in (2, 4)}
    runs = policy_runs(ALONE.policies, ("leaf", "flat"))
    options = SweepSettings((8, 16, 40), runs, concurrency=concurrency)
    cells = [cell for cell in sweep(inputs, options) if cell.workload == OVERALL]
    bound = {(cell.block_size, cell.capacity_blocks): cell for cell in cells if cell.policy == OPT}
    bounds = {(c.block_size, c.capacity_blocks): c for c in cells if c.policy == BYPASS}
    assert len({cell.policy for cell in cells}) > 18
    assert any(bounds[place].hits > bound[place].hits for place in bound)
    assert {cell.rejected for cell in bounds.values()} == {0} != {cell.rejected for cell in bound.values()}
    for cell in cells:
        outer = bounds[cell.block_size, cell.capacity_blocks]
        assert cell.hits <= outer.hits and outer.accesses == cell.accesses
        if cell.policy not in (POOL, BYPASS):
            best = bound[cell.block_size, cell.capacity_blocks]
            assert cell.hits <= best.hits
            assert cell.block_hits <= best.block_hits
            assert cell.hits <= cell.block_hits <= cell.accesses


def test_a_policy_above_the_bound_is_our_mistake(monkeypatch):
    trace = one_workload(block_trace(chats(80, 5), BLOCK))
    options = SweepSettings((20,), policy_runs(["lru"]))
    monkeypatch.setattr(
        "dsatrace.study.sweep.simulated_cells",
        lambda trace, given, run, capacity, oversize: simulated_cells(
            trace, given, PolicyRun("mru", leaf=False) if run.policy == OPT else run, capacity, oversize
        ),
    )
    monkeypatch.setattr(PolicyRun, "name", property(lambda run: OPT if run.policy == "mru" else run.policy))
    with pytest.raises(AssertionError, match="hits more than OPT"):
        sweep({("t", BLOCK): trace}, options)


def test_several_workloads_must_be_the_only_trace():
    trace = block_trace(chats(30, 5), BLOCK)
    options = SweepSettings((20,), policy_runs(["lru"]))
    with pytest.raises(UserError, match="t has several workloads"):
        sweep({("t", BLOCK): trace}, options)
    named = dataclasses.replace(trace, workload_names=("a", OVERALL, "c"))
    with pytest.raises(UserError, match="a workload is named 'overall'"):
        sweep({(OVERALL, BLOCK): named}, options)


def test_ids_that_contradict_themselves_are_named():
    for rows, message in (
        (([1, 3], [2, 3]), "request 1 of the trace: block id 3 follows another block"),
        (([1, 1], [2, 3]), "request 0 of the trace: block id 1 follows another block"),
    ):
        builder = RequestsBuilder(BLOCK)
        for ids in rows:
            builder.add(0.0, ids, num_prompt_tokens=8)
        with pytest.raises(UserError, match=message):
            block_trace(builder.build(), BLOCK)


def test_any_number_of_workers_gives_the_same_cells():
    logs = seeded("qa", "chat_multi", num_requests=40)
    inputs = {(name, size): block_trace(log, size) for name, log in logs.items() for size in (16, 32)}
    options = SweepSettings((32, 64), policy_runs(["fifo", "random", "lru"], ("flat", "leaf")))
    told: list[None] = []
    alone = sweep(inputs, options, 1, lambda: told.append(None))
    assert alone == sweep(inputs, options, 2)
    assert len(told) == num_jobs(inputs, options) > 20
    assert [cell.workload for cell in alone] == sorted((c.workload for c in alone), reverse=True)
    assert {cell.policy for cell in alone} == {
        "fifo",
        "fifo-flat",
        "random",
        "random-flat",
        "lru",
        OPT,
        POOL,
        BYPASS,
    }
    assert len(alone) == 2 * 2 * 2 * 8


def test_outputs_are_cached_but_not_looked_up():
    builder = RequestsBuilder()
    builder.add(0.0, range(100, 108), range(200, 208))
    builder.add(1.0, [*range(100, 108), *range(200, 208), *range(300, 304)], range(400, 404))
    builder.add(2.0, range(100, 108), range(200, 208))  # the first one again: its answer is computed again
    given_ = given_of(builder.build())
    assert given_.stream.lengths.tolist() == [4, 6, 4]
    assert (num_repeated_outputs(given_.trace), given_.trace.prompt_blocks.tolist()) == (2, [2, 5, 2])
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
    given_ = given_of(builder.build())
    assert num_repeated_outputs(given_.trace) == 3
    for run in policy_runs(["lru", "fifo", "opt"]):
        (cell,) = simulated_cells("t", given_, run, 10, "reject")
        assert cell.hits == 5 + 5
    (lru,) = lru_cells("t", given_, [10], "reject")
    (pool,) = pool_cells("t", given_, 10, concurrency=1)
    assert lru.hits == pool.hits == 10


def test_a_request_without_a_full_block_counts_nothing():
    builder = RequestsBuilder()
    for at in range(3):
        builder.add(float(at), [1, 2, 3])
    given_ = given_of(builder.build())
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
    requests = chats(30, 2)
    parts = by_workload(requests, "file")
    assert {name: len(part) for name, part in parts.items()} == {"a": 10, "b": 10, "c": 10}
    assert block_trace(parts["b"], BLOCK).workload_names == ("b",)
    assert by_workload(parts["b"], "file").keys() == {"b"}
    kept, counts = limit_requests(requests, 40, 1)
    assert len(kept) < len(requests)
    assert counts["conversations dropped: a request over max_tokens"] > 0


def run(*argv: object) -> int:
    return study("sweep", *argv)


def test_the_command_writes_tables_pictures_and_what_they_mean(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--workloads", "qa", "--num-requests", 60, "--policies", "lru", "s3-fifo"]
    command += ["--block-sizes", 16, 32, "--seeds", 1, "--tokenizer", "words"]
    assert run(*command, "--capacities", 64, 16, "--output-dir", out) == 0
    shown = capsys.readouterr().out
    assert "qa, blocks of 16 tokens" in shown
    assert "s3-fifo" in shown
    pictures = {f"cache_hits_qa_{policy}.png" for policy in ("lru", "s3-fifo", "vllm")}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "sweep.json", "sweep.csv"} | pictures
    result = json.loads((out / "sweep.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    rows = read_csv(out / "sweep.csv")
    assert len(rows) == len(result["cells"]) == 2 * 2 * 5
    assert [row["hits"] for row in rows] == [str(cell["hits"]) for cell in result["cells"]]
    assert manifest["state"] == "complete"
    assert manifest["argv"][:3] == ["dsatrace", "study", "sweep"]
    assert manifest["source"] == {"kind": "synthetic", "workloads": ["qa"]}
    assert manifest["settings"]["oversize"] == "reject"
    assert set(result["semantics"]) >= {"accesses", "hits", "vllm", "in flight", "rejected"}
    for cell in result["cells"]:
        assert cell["accesses"] == cell["hits"] + cell["misses"]
        assert cell["hit_rate"] == round(cell["hits"] / cell["accesses"], 6)
    stream = given_of(seeded("qa", num_requests=60)["qa"], 16).stream
    wanted = {"policy": "s3-fifo", "block_size": 16, "capacity_blocks": 64}
    (cell,) = (cell for cell in result["cells"] if cell.items() >= wanted.items())
    assert cell["hits"] == int(simulate(stream, "s3-fifo", 64, leaf=True).hits.sum())


def test_the_command_reads_recorded_accesses_and_conversations(tmp_path):
    recorded, sample = tmp_path / "recorded", tmp_path / "chats.json"
    recorded.mkdir()
    requests = chats(60, 1)
    write_accesses(recorded, requests, block_trace(requests, BLOCK))
    quick = ("--capacities", 20, "--policies", "lru")
    cells = study_json(tmp_path / "a", "sweep.json", "sweep", "--trace-file", recorded, *quick)["cells"]
    assert {(cell["workload"], cell["block_size"]) for cell in cells} == {("a", 4), ("b", 4), ("c", 4)}
    turns = [{"from": speaker, "value": "word " * 60} for speaker in ("human", "gpt", "human", "gpt")]
    sample.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    command = ("--data-path", sample, "--workloads", "chat_single", "chat_multi", "--min-turns", 2)
    every = ("--max-conversations", "all")
    result = study_json(tmp_path / "b", "sweep.json", "sweep", *command, *every, *quick)
    assert [trace["requests"] for trace in result["traces"]] == [3, 6]
    assert result["source"]["path"] == str(sample)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "lur"], "unknown policy 'lur'; choose from lru"),
        (["--policies", "wa-lru"], "policy wa-lru tells workloads apart"),
        (["--policies", "lru", "lru"], "name each policy once"),
        (["--capacities", "0"], "--num-blocks must lie between 1"),
        (["--capacities", "8", "8"], "--num-blocks: name each number once"),
        (["--block-sizes", "0"], "--block-size must lie between 1"),
        (["--block-sizes", "16", "16"], "--block-size: name each number once"),
        (["--num-requests", "0"], "--num-requests must be at least 1, not 0"),
        (["--concurrency", "0"], "--concurrency must lie between 1"),
        (["--arrival-rate", "nan"], "--arrival-rate must be"),
        (["--trace-file", "none.jsonl"], "none.jsonl"),
        (["--trace-file", "none.jsonl", "--data-path", "x"], "--trace-file is a source by itself"),
        (["--trace-file", "none.jsonl", "--num-requests", "9"], "--num-requests makes a trace of conv"),
        (["--max-tokens", "1"], "no conversation is left"),
        (["--policies", "admit-lru"], "policy admit-lru tells workloads apart"),
        (["--admit", "qa"], "--admit is for workloads that share a cache"),
        (["--pattern", "qa"], "--pattern is for workloads that share a cache"),
        (["--profile", "p.json"], "--profile is for workloads that share a cache"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(flags, message, tmp_path, capsys):
    source = [] if "--trace-file" in flags else ["--workloads", "qa", "--num-requests", "20"]
    base = ["--skip-visualization", "--output-dir", str(tmp_path / "out")]
    check_mistake(capsys, run(*base, *source, *flags), message)


def test_seeds_are_pooled_and_give_an_interval(tmp_path):
    flags = ("--workloads", "qa", "--num-requests", 50, "--num-blocks", 64, "--block-size", 16)
    flags = (*flags, "--policies", "lru", "s3-fifo")
    rates, counts = [], []
    for seed in (42, 43, 44):
        one = study_json(tmp_path / str(seed), "sweep.json", "sweep", *flags, "--seeds", 1, "--seed", seed)
        (lru,) = (cell for cell in one["cells"] if cell["policy"] == "lru")
        assert lru["hit_rate_low"] is None
        rates.append(lru["hit_rate"])
        counts.append((lru["hits"], lru["accesses"]))
    assert len(set(rates)) == 3
    together = study_json(tmp_path / "all", "sweep.json", "sweep", *flags, "--seeds", 3)
    cells = {cell["policy"]: cell for cell in together["cells"]}
    hits, accesses = map(sum, zip(*counts, strict=True))
    assert (cells["lru"]["hits"], cells["lru"]["accesses"]) == (hits, accesses)
    assert together["intervals"] == {"over": "seeds", "seeds": [42, 43, 44]}
    low, high = cells["lru"]["hit_rate_low"], cells["lru"]["hit_rate_high"]
    assert low < min(rates) < max(rates) < high  # of three seeds it is wide
    paired = cells["s3-fifo"]
    assert paired["gain"] == pytest.approx(paired["hit_rate"] - cells["lru"]["hit_rate"], abs=2e-6)
    assert paired["gain_high"] - paired["gain_low"] < high - low  # what moves both is not in it
    assert "seeds" not in study_json(tmp_path / "eight", "sweep.json", "sweep", *flags)["settings"]
    assert len(json.loads((tmp_path / "eight" / "sweep.json").read_text())["intervals"]["seeds"]) == 8


def test_the_interval_of_a_rate_ends_at_0_and_1():
    inputs = {(OVERALL, BLOCK): block_trace(chats(9, seed=1), BLOCK)}
    cell = sweep(inputs, SweepSettings((20,), policy_runs(["lru"])))[0]
    of_two = dataclasses.replace(cell, parts=np.array([[10, 100], [90, 100]]))
    low, high = interval(*of_two.parts.T, "seeds")
    assert low < 0 and high > 1
    (told,) = with_intervals([of_two], "seeds")
    assert (told.hit_rate_low, told.hit_rate_high) == (0, 1)


def test_the_interval_over_seeds_covers_the_mean():
    """Of 400 draws of eight seeds each, about 95 % of the intervals hold the true ratio."""
    draw = np.random.default_rng(3)
    accesses = draw.integers(80, 120, (400, 8))
    hits = draw.binomial(accesses, 0.3)
    covered = [low <= 0.3 <= high for low, high in map(interval, hits, accesses, ["seeds"] * 400)]
    assert 0.92 < np.mean(covered) < 0.98
    drawn = [low <= 0.3 <= high for low, high in map(interval, hits, accesses, ["conversations"] * 400)]
    assert 0.8 < np.mean(drawn) < 0.97  # a bootstrap of eight is narrow; a log has 64
    assert interval(hits[0][:1], accesses[0][:1], "seeds") == (None, None)
    assert interval(hits[0] * 0, accesses[0] * 0, "seeds") == (None, None)
    same_rate = interval(accesses[0] * 2, accesses[0] * 4, "seeds")
    assert same_rate == pytest.approx((0.5, 0.5))


def test_a_log_is_bootstrapped_over_its_conversations(tmp_path):
    """The same requests under one conversation each, or all of one: then nothing is known."""
    sizes = {}
    for name in ("many", "one"):
        rows = [
            {
                "prompt": f"{i % 7} words of a prompt " * 30,
                "response": "yes",
                "conversation_id": f"c{i // 3}" if name == "many" else "c",
                "turn_index": i % 3 if name == "many" else i,
                "timestamp": i,
            }
            for i in range(90)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--trace-file", path, "--num-blocks", 60, "--block-size", 16, "--policies", "lru", "fifo")
        flags += ("--tokenizer", "words")
        result = study_json(tmp_path / f"out_{name}", "sweep.json", "sweep", *flags)
        assert result["intervals"]["over"] == "conversations"
        sizes[name] = [(c["hit_rate"], c["hit_rate_low"], c["hit_rate_high"]) for c in result["cells"]]
    assert [rate for rate, *_ in sizes["many"]] == [rate for rate, *_ in sizes["one"]]
    assert all(low <= rate <= high and high - low > 0.001 for rate, low, high in sizes["many"])
    assert all(low is high is None for _, low, high in sizes["one"])


def test_parts_add_up_under_lru_and_every_other_way():
    given_ = Given.of(block_trace(chats(80, 3), BLOCK), by_conversation=True)
    assert 30 < given_.num_parts <= 64
    ways = (
        lru_cells("t", given_, [20], "reject"),
        simulated_cells("t", given_, PolicyRun("lru"), 20, "reject"),
        pool_cells("t", given_, 20, 1),
        bypass_cells("t", given_, 20),
    )
    for cells in ways:
        for cell in cells:
            assert cell.parts.sum(axis=0).tolist() == [cell.hits, cell.accesses]
    for one, other in zip(*ways[:2], strict=True):
        assert one.parts.tolist() == other.parts.tolist()


def test_results_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "kept").write_text("x")
    assert run("--workloads", "qa", "--output-dir", tmp_path) == 2
    assert "holds something already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_default_policies_are_all_that_need_no_workloads():
    assert set(ALONE.policies) | set(BY_WORKLOAD) == {*POLICIES, "admit-lru"}
