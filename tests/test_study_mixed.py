"""Mixes: several workloads in one cache, what the workload-aware policies know of them, and the bound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsatrace.commands.study.sweep import MIXED
from dsatrace.errors import UserError
from dsatrace.kv.policies.reuse import reuse_profile
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.prepare import ClientSettings
from dsatrace.study.profile import (
    NEED_PROFILE,
    WorkloadProfile,
    learned_profile,
    params_of,
    profile_record,
    read_profile,
)
from dsatrace.study.requests import StudyRequests, block_trace
from dsatrace.study.sources import Client, Source
from dsatrace.study.sweep import SweepSettings, policy_runs, sweep
from dsatrace.study.sweep_cells import BYPASS, OPT, OVERALL, POOL, Cell
from dsatrace.study.tokenization import open_vocabulary
from dsatrace.workloads.synthetic import WORKLOADS
from helpers.study_samples import check_mistake, study, study_json

PRIORITIES = {"qa": 2.0, "chat_multi": 1.0}


def mixed(*, pattern: tuple[str, ...] | None = None) -> StudyRequests:
    settings = ClientSettings(num_requests=80, turn_delay=1.0)
    return Client(Source(workloads=WORKLOADS, pattern=pattern), settings, open_vocabulary("words")).requests()


def labels(requests: StudyRequests) -> list[str]:
    return [requests.workload_names[i] for i in requests.workload]


@pytest.fixture(scope="module")
def requests() -> StudyRequests:
    return mixed()


@pytest.fixture(scope="module")
def trace(requests: StudyRequests) -> BlockTrace:
    return block_trace(requests, 16)


@pytest.fixture(scope="module")
def cells(trace: BlockTrace) -> list[Cell]:
    policies = [*MIXED.policies, "priority"]
    params = params_of(policies, *learned_profile(trace, 0.2), priorities=PRIORITIES, seed=3)
    return sweep({(OVERALL, 16): trace}, SweepSettings((128,), policy_runs(policies, MIXED.forms, params)))


def test_the_workloads_of_a_mix_add_up_under_every_policy(cells):
    by_policy = {cell.policy: [] for cell in cells}
    for cell in cells:
        by_policy[cell.policy].append(cell)
    assert {"lru", "fifo", "fifo-flat", "wa-lru", "wa-prob", "priority", OPT, POOL} <= set(by_policy)
    for overall, *parts in by_policy.values():
        assert overall.workload == OVERALL
        assert {part.workload for part in parts} == set(WORKLOADS)
        for field in ("requests", "rejected", "accesses", "hits", "misses", "block_hits"):
            assert getattr(overall, field) == sum(getattr(part, field) for part in parts)


def test_no_policy_beats_opt_overall(cells):
    overall = {cell.policy: cell for cell in cells if cell.workload == OVERALL}
    assert overall[OPT].hits > overall["lru"].hits > 0
    assert overall[BYPASS].hits > overall[OPT].hits
    ours = [cell for cell in overall.values() if cell.policy not in (POOL, BYPASS)]
    assert max(cell.hits for cell in ours) == overall[OPT].hits
    assert max(cell.block_hits for cell in ours) == overall[OPT].block_hits


def test_every_policy_is_measured_on_every_request(cells, requests):
    assert {cell.requests for cell in cells if cell.workload == OVERALL} == {len(requests)}
    assert len({cell.accesses for cell in cells if cell.workload == OVERALL}) == 1


def test_the_profile_is_of_the_first_requests(trace):
    profile, since_s = learned_profile(trace, 0.25)
    head = AccessStream.of_trace(trace).head(0.25)
    assert head.num_requests == round(0.25 * trace.num_requests)
    assert since_s == trace.time_s[head.num_requests]
    measured = reuse_profile(head)
    for i, name in enumerate(head.workload_names):
        assert profile[name].reuse_probability == measured.probability[i]
        assert profile[name].mean_reuse_s == measured.mean_s[i]
    best = max(entry.reuse_probability for entry in profile.values())
    assert all(entry.admitted == (entry.reuse_probability >= 0.5 * best) for entry in profile.values())
    assert 0 < sum(entry.admitted for entry in profile.values()) < len(WORKLOADS)


def test_what_comes_later_changes_nothing_before(requests, trace):
    """A policy's hits on a request are the same whatever follows it; only OPT's are not."""
    params = params_of(MIXED.policies, *learned_profile(trace, 0.2))
    runs = [run for run in policy_runs(MIXED.policies, MIXED.forms, params) if run.policy != OPT]
    half = block_trace(requests.take(np.arange(len(requests) // 2)), 16)
    streams = [AccessStream.of_trace(each) for each in (trace, half)]
    assert streams[0].workload_names == streams[1].workload_names
    for run in runs:
        hits = [
            simulate(each, run.policy, 64, leaf=run.leaf, admitted=run.admitted(each), **run.params).hits
            for each in streams
        ]
        assert np.array_equal(hits[0][: len(hits[1])], hits[1]), run.name


def test_a_pattern_sets_the_order(requests):
    pattern = ("qa", "chat_multi", "qa", "summarization", "chat_single")
    rounds = labels(mixed(pattern=pattern))
    assert rounds[:10] == list(pattern) * 2
    assert sorted(rounds) == sorted(labels(requests))


def test_workloads_of_a_mix_arrive_apart(requests):
    first = {name: requests.arrival_s[labels(requests).index(name)] for name in WORKLOADS}
    assert set(first.values()) == {0.0}
    second = {name: np.sort(requests.arrival_s[np.array(labels(requests)) == name])[1] for name in first}
    assert len(set(second.values())) == len(WORKLOADS)


@pytest.mark.parametrize("real", [False, True])
def test_both_chats_of_a_mix_get_conversations_of_their_own(real, tmp_path):
    path = None
    if real:
        path = tmp_path / "chats.json"
        speakers = ("human", "gpt", "human", "gpt")
        turns = [[{"from": who, "value": f"{i} {who} " * 40} for who in speakers] for i in range(6)]
        path.write_text(json.dumps([{"id": f"c{i}", "conversations": turn} for i, turn in enumerate(turns)]))
    source = Source((path,) if path else (), workloads=("chat_single", "chat_multi"))
    client = Client(source, ClientSettings(num_requests=3, max_conversations=6), open_vocabulary("words"))
    requests = client.requests()
    assert labels(requests).count("chat_single") == 3
    assert labels(requests).count("chat_multi") == 6 if real else 3
    trace = block_trace(requests, 16)
    first = {}
    for name, begin in zip(labels(requests), trace.key_ptr, strict=False):
        first.setdefault(name, set()).add(int(trace.keys[begin]))
    assert not first["chat_single"] & first["chat_multi"]


def test_a_profile_can_be_given(tmp_path):
    profile = {"qa": WorkloadProfile(0.75, 2.5, True), "chat_multi": WorkloadProfile(0.0, 1, False)}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_record(profile)))
    assert read_profile(path) == profile
    params = params_of(NEED_PROFILE, profile)
    assert params["wa-lru"] == params["admit-lru"] == {"admit": ["qa"], "since_s": 0.0}
    assert params["wa-prob"] == {"reuse": {"qa": (0.75, 2.5), "chat_multi": (0.0, 1)}, "since_s": 0.0}


def test_nothing_is_known_before_it_was_learned(requests, trace):
    """On the first requests, from which the profile comes, the policies that need one are LRU."""
    profile, since_s = learned_profile(trace, 0.5)
    runs = policy_runs(NEED_PROFILE, params=params_of(NEED_PROFILE, profile, since_s))
    stream, first = AccessStream.of_trace(trace), int(np.searchsorted(trace.time_s, since_s))
    assert first == pytest.approx(len(requests) / 2, abs=1)
    lru = simulate(stream, "lru", 96).hits
    for run in runs:
        if run.policy == OPT:
            continue
        admitted = run.admitted(stream)
        hits = simulate(stream, run.policy, 96, leaf=run.leaf, admitted=admitted, **run.params).hits
        if run.policy == "wa-prob":  # it tells requests of the same moment apart by depth, not by order
            assert hits[:first].sum() == pytest.approx(lru[:first].sum(), rel=0.03)
        else:
            assert hits[:first].tolist() == lru[:first].tolist()
        assert hits[first:].sum() > lru[first:].sum()


def test_who_is_not_admitted_is_never_inserted(trace):
    """The published policy: the others find nothing of their own, and take no room from those admitted."""
    params = params_of(["lru", "admit-lru"], None, admit=["chat_multi", "qa"])
    settings = SweepSettings((96,), policy_runs(["lru", "admit-lru"], params=params))
    cells = {(c.policy, c.workload): c for c in sweep({(OVERALL, 16): trace}, settings)}
    assert cells["lru", "summarization"].hits > 0 == cells["admit-lru", "summarization"].hits
    assert cells["admit-lru", "chat_multi"].hits > cells["lru", "chat_multi"].hits
    kept = np.isin(trace.workload, [trace.workload_names.index(name) for name in ("chat_multi", "qa")])
    alone = AccessStream.of_trace(trace).select(kept & (trace.needed_blocks <= 96))
    assert cells["admit-lru", OVERALL].hits == simulate(alone, "lru", 96).hits.sum()
    assert not set(cells["admit-lru", OVERALL].row()) ^ set(cells["lru", OVERALL].row())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a profile is an object of workloads"),
        ('{"qa": {"reuse_probability": 0.5}}', "workload 'qa' needs exactly reuse_probability"),
        ('{"qa": {"reuse_probability": 1, "mean_reuse_s": 1, "admitted": true}}', "from 0 to below 1"),
        ('{"qa": {"reuse_probability": 0.5, "mean_reuse_s": 0, "admitted": true}}', "above 0"),
        ('{"qa": {"reuse_probability": 0.5, "mean_reuse_s": 1, "admitted": 1}}', "admitted is 1"),
        ('{"qa": {"reuse_probability": true, "mean_reuse_s": 1, "admitted": true}}', "is True"),
    ],
)
def test_a_bad_profile_names_what_is_wrong(text, message, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_profile(path)


def test_a_warm_up_must_have_seen_every_workload(trace):
    with pytest.raises(UserError, match="the warm-up of 1 request has none of"):
        learned_profile(trace, 1.2 / trace.num_requests)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="--warm-up must be a share between 0 and 1"):
            learned_profile(trace, share)


def run(*argv: object) -> int:
    return study("mixed", *argv)


def test_the_command_writes_table_picture_and_profile(tmp_path, capsys):
    small = ("--num-requests", 20, "--num-blocks", 96)
    assert run(*small, "--policies", "lru", "fifo", "wa-lru", "--output-dir", tmp_path / "a") == 0
    shown = capsys.readouterr().out
    assert "Mixed: hit rate in % of prompt blocks, 96 blocks of 16 tokens" in shown
    assert "profile of the workloads, for wa-lru: learned from the first " in shown
    names = {"manifest.json", "mixed.json", "mixed.csv", "profile.json", "mixed_hit_rates.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    result = json.loads((tmp_path / "a" / "mixed.json").read_text())
    policies = list(dict.fromkeys(cell["policy"] for cell in result["cells"]))
    assert policies == ["lru", "fifo", "fifo-flat", "wa-lru", OPT, POOL, BYPASS]
    assert len(result["cells"]) == 5 * len(policies)
    (num_requests,) = {cell["requests"] for cell in result["cells"] if cell["workload"] == OVERALL}
    assert num_requests > 7 * result["traces"][0]["requests"]  # of eight seeds
    again = ("--policies", "wa-lru", "--profile", tmp_path / "a" / "profile.json")
    second = study_json(tmp_path / "b", "mixed.json", "mixed", *small, *again, "--seeds", 1)
    assert second["profile"]["from"].startswith("the file ")
    assert second["profile"]["workloads"] == result["profile"]["workloads"]
    assert not (tmp_path / "b" / "mixed_hit_rates.png").exists()


def test_a_profile_is_told_only_where_a_policy_uses_it(tmp_path, capsys):
    small = ("--num-requests", 9, "--seeds", 1, "--warm-up", 0.9, "--admit", "qa,chat_multi")
    told = {}
    for policies in (("lru", "admit-lru"), ("admit-lru", "wa-prob")):
        flags = ("--policies", *policies, "--skip-visualization", "--output-dir", tmp_path / policies[0])
        assert run(*small, *flags) == 0
        told[policies] = capsys.readouterr().out
        assert "admitted by admit-lru: qa, chat_multi\n" in told[policies]
    assert "profile of the workloads" not in told["lru", "admit-lru"]
    assert not (tmp_path / "lru" / "profile.json").exists()
    assert "profile of the workloads, for wa-prob: learned" in told["admit-lru", "wa-prob"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "qa"], "a mix needs two different workloads or more"),
        (["--pattern", "qa"], "the pattern and the workloads differ in 'chat_multi'"),
        (["--policies", "priority"], "policy priority needs --priorities"),
        (["--policies", "lru", "--admit", "qa"], "--admit is for wa-lru, admit-lru, and no such policy runs"),
        (["--policies", "wa-prob", "--priorities", "qa=1"], "--priorities is for priority, and no such"),
        (["--policies", "wa-lru", "--admit", "qa", "--profile", "p.json"], "--profile is for wa-prob, and"),
        (["--priorities", "qa"], "write a workload and a number"),
        (["--priorities", "qa=nan"], "write a workload and a number"),
        (["--priorities", "aq=1"], "priorities names workloads, unknown: aq"),
        (["--num-blocks", "0"], "--num-blocks must lie between 1"),
        (["--admit", "qa,aq"], "admit names workloads, unknown: aq; there are chat_single"),
        (["--admit", "aq", "--policies", "admit-lru"], "--admit names workloads, unknown: aq"),
        (["--seeds", "3", "--trace-file", "none.jsonl"], "--seeds draws seeded workloads again"),
        (["--warm-up", "2"], "--warm-up must be a share between 0 and 1, not 2.0"),
        (["--profile", "none.json"], "none.json: cannot read it: No such file"),
        (["--trace-file", "none.jsonl"], "none.jsonl"),
        (["--block-size", "-1"], "--block-size must lie between 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(flags, message, tmp_path, capsys):
    size = [] if "--trace-file" in flags else ["--num-requests", 20]
    code = run(*size, "--skip-visualization", "--output-dir", tmp_path / "out", *flags)
    check_mistake(capsys, code, message)
