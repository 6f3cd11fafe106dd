"""Mixes: several workloads in one cache, what the workload-aware policies know of them, and the bound."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.kv.policies.reuse import reuse_profile
from dsatrace.kv.policies.simulate import simulate
from dsatrace.study.mixed import (
    NEED_PROFILE,
    WorkloadProfile,
    default_policies,
    mixed_runs,
    profile_record,
    read_profile,
    warm_up,
)
from dsatrace.study.sweep import SweepSettings, sweep
from dsatrace.study.sweep_cells import OPT, OVERALL, POOL, Cell
from dsatrace.study.sweep_inputs import RequestLog, SeededSettings, mixed_log
from dsatrace.study.tokenization import open_vocabulary
from dsatrace.workloads.synthetic import WORKLOADS
from helpers.study_samples import check_mistake, study, study_json

OPTIONS = SeededSettings(num_requests=80)


@pytest.fixture(scope="module")
def log() -> RequestLog:
    return mixed_log(WORKLOADS, OPTIONS, open_vocabulary(None))


@pytest.fixture(scope="module")
def cells(log: RequestLog) -> list[Cell]:
    rest, profile = warm_up(log, 16, 0.2)
    runs = mixed_runs(default_policies(True), profile, priorities={"qa": 2.0, "chat_multi": 1.0}, seed=3)
    return sweep({(OVERALL, 16): rest.at(16)}, SweepSettings((128,), runs))


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
    assert max(cell.hits for cell in overall.values()) == overall[OPT].hits
    assert max(c.block_hits for c in overall.values() if c.policy != POOL) == overall[OPT].block_hits


def test_the_profile_is_of_the_warm_up(log):
    rest, profile = warm_up(log, 16, 0.25)
    num_first = round(0.25 * len(log))
    assert len(rest) == len(log) - num_first
    head = log.take(np.arange(num_first)).at(16).stream
    measured = reuse_profile(head)
    for i, name in enumerate(head.workload_names):
        assert profile[name].reuse_probability == measured.probability[i]
        assert profile[name].mean_reuse_s == measured.mean_s[i]
    best = max(entry.reuse_probability for entry in profile.values())
    assert all(entry.admitted == (entry.reuse_probability >= 0.5 * best) for entry in profile.values())
    assert 0 < sum(entry.admitted for entry in profile.values()) < len(WORKLOADS)


def test_what_comes_later_changes_nothing_before(log):
    """A policy's hits on a request are the same whatever follows it; only OPT's are not."""
    rest, profile = warm_up(log, 16, 0.2)
    runs = [run for run in mixed_runs(default_policies(False), profile) if run.policy != OPT]
    whole = rest.at(16).stream
    part = rest.take(np.arange(len(rest) // 2)).at(16).stream
    # Workloads are numbered by first appearance; the profile is by name, so both know the same.
    assert set(part.workload_names) == set(whole.workload_names)
    for run in runs:
        hits = [
            simulate(stream, run.policy, 64, leaf=run.leaf, **run.params).hits for stream in (whole, part)
        ]
        assert np.array_equal(hits[0][: len(hits[1])], hits[1]), run.name


def test_a_pattern_sets_the_order(log):
    pattern = ("qa", "chat_multi", "qa", "summarization", "chat_single")
    rounds = mixed_log(WORKLOADS, OPTIONS, open_vocabulary(None), pattern=pattern)
    assert rounds.labels[:10] == pattern * 2
    assert sorted(rounds.labels) == sorted(log.labels)


def test_both_chats_of_a_mix_get_conversations_of_their_own():
    from dsatrace.workloads.encoding import Message
    from dsatrace.workloads.sharegpt import Conversation

    turns = (Message("user", "question " * 40), Message("assistant", "answer " * 40))
    real = [Conversation(f"c{i}", i, (Message("user", f"{i} " * 40), *turns[1:], *turns)) for i in range(6)]
    mixed = mixed_log(("chat_single", "chat_multi"), OPTIONS, open_vocabulary(None), real, "chats.json")
    assert mixed.labels.count("chat_single") == 3
    assert mixed.labels.count("chat_multi") == 6
    assert "chats.json" in mixed.origin
    given = mixed.at(16)
    first = {}
    for name, begin in zip(mixed.labels, given.stream.starts, strict=False):
        first.setdefault(name, set()).add(int(given.stream.blocks[begin]))
    assert not first["chat_single"] & first["chat_multi"]


def test_a_profile_can_be_given(tmp_path):
    profile = {"qa": WorkloadProfile(0.75, 2.5, True), "chat_multi": WorkloadProfile(0.0, 1, False)}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_record(profile)))
    assert read_profile(path) == profile
    runs = {run.name: run.params for run in mixed_runs(NEED_PROFILE, profile)}
    assert runs["wa-lru"] == {"admit": ["qa"]}
    assert runs["wa-prob"] == {"reuse": {"qa": (0.75, 2.5), "chat_multi": (0.0, 1)}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the profile is not JSON"),
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


def test_a_warm_up_must_have_seen_every_workload(log):
    with pytest.raises(UserError, match="the warm-up of 1 requests has none of"):
        warm_up(log, 16, 1.2 / len(log))
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="--warm-up must be a share between 0 and 1"):
            warm_up(log, 16, share)


def run(*argv: object) -> int:
    return study("mixed", *argv)


def test_the_command_writes_table_picture_and_profile(tmp_path, capsys):
    small = ("--num-requests", 60, "--num-blocks", 96)
    assert run(*small, "--policies", "lru", "fifo", "wa-lru", "--output-dir", tmp_path / "a") == 0
    shown = capsys.readouterr().out
    assert "Mixed: hit rate in % of prompt blocks, 96 blocks of 16 tokens" in shown
    assert "which are not replayed" in shown
    names = {"manifest.json", "mixed.json", "mixed.csv", "profile.json", "mixed_hit_rates.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    result = json.loads((tmp_path / "a" / "mixed.json").read_text())
    policies = list(dict.fromkeys(cell["policy"] for cell in result["cells"]))
    assert policies == ["lru", "fifo", "fifo-flat", "wa-lru", OPT, POOL]
    assert len(result["cells"]) == 5 * len(policies)
    assert result["trace"]["replayed"] < result["trace"]["requests"]
    again = ("--policies", "wa-lru", "--profile", tmp_path / "a" / "profile.json")
    second = study_json(tmp_path / "b", "mixed.json", "mixed", *small, *again)
    assert second["trace"]["replayed"] == second["trace"]["requests"]
    assert second["profile"]["workloads"] == result["profile"]["workloads"]
    assert not (tmp_path / "b" / "mixed_hit_rates.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "qa"], "a mix needs two different workloads or more"),
        (["--pattern", "qa"], "the pattern and the workloads differ in 'chat_multi'"),
        (["--policies", "priority"], "policy priority needs --priorities"),
        (["--priorities", "qa"], "write a workload and a number"),
        (["--priorities", "qa=nan"], "write a workload and a number"),
        (["--priorities", "aq=1"], "priorities names workloads, unknown: aq"),
        (["--num-blocks", "0"], "a cache holds at least 1 block, not 0"),
        (["--warm-up", "2"], "--warm-up must be a share between 0 and 1, not 2.0"),
        (["--profile", "none.json"], "none.json: cannot read the profile"),
        (["--trace-file", "none.jsonl"], "none.jsonl"),
        (["--block-size", "-1"], "a block holds at least 1 token, not -1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(flags, message, tmp_path, capsys):
    code = run("--num-requests", 20, "--skip-visualization", "--output-dir", tmp_path / "out", *flags)
    check_mistake(capsys, code, message)
