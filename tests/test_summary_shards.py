"""Summaries of shards and of processes add up to the summary of all runs, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.summarize import main
from dsatrace.schema import LEVELS
from dsatrace.trace.histogram import ExactSum
from helpers.command_runs import told_error
from helpers.golden_run import SERVING, GoldenRequest, write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.tier_samples import setup

NUM_RUNS = 5


@pytest.fixture(scope="module")
def runs_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Five runs of a level, of other selections and lengths; one was killed."""
    known: dict[str, list[str]] = {}

    def made(level: str) -> list[str]:
        if level not in known:
            folder = tmp_path_factory.mktemp(level)
            known[level] = [
                str(
                    write_golden(
                        folder / f"run{i}",
                        [
                            GoldenRequest("r0", 30 + 7 * i, 9 + i, 7, score=100 / (i + 1)),
                            GoldenRequest("r1", 45, 6, 9, needle_positions=tuple(range(11, 20 + i))),
                        ],
                        level=level,
                        seed=i,
                        serving=SERVING,
                        tiers=setup(),
                        state="running" if i == 3 else "complete",
                    )
                )
                for i in range(NUM_RUNS)
            ]
        return known[level]

    return made


def summarized(runs: list[str], out: Path, *flags: str) -> bytes:
    assert main([*runs, *flags, "--out", str(out)]) == 0
    return out.read_bytes()


def shards_of(runs: list[str], folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{index}.json" for index in range(count)]
    for index, path in enumerate(paths):
        summarized(runs, path, "--shard", f"{index}/{count}")
    return paths


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", [1, 2, 3, NUM_RUNS])
def test_shards_add_up_to_the_whole(
    runs_at: Callable[[str], list[str]], level: str, count: int, tmp_path: Path
) -> None:
    whole = summarized(runs_at(level), tmp_path / "whole")
    shards = list(map(str, reversed(shards_of(runs_at(level), tmp_path, count))))
    assert main(["merge", *shards, "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged").read_bytes() == whole
    record = json.loads(whole)
    assert record["state"] == "incomplete" and record["counts"]["requests"] >= 2 * NUM_RUNS - 2
    assert record["scores"] and record["kv_fetch"] and record["needle_recall"] and record["prefix_hot_blocks"]


@pytest.mark.parametrize("level", LEVELS)
def test_processes_add_up_to_it_too(
    runs_at: Callable[[str], list[str]], level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, told = summarized(runs_at(level), tmp_path / "one"), capsys.readouterr()
    assert summarized(runs_at(level), tmp_path / "two", "--jobs", "2") == whole
    assert capsys.readouterr().err == told.err, "the same notes, in the same order"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_selection_adds_up(kind: str, tmp_path: Path) -> None:
    runs = [str(write_kind(tmp_path / f"run{i}", kind)) for i in range(2)]
    shards = map(str, shards_of(runs, tmp_path, 2))
    assert main(["merge", *shards, "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged").read_bytes() == summarized(runs, tmp_path / "whole")


def test_a_run_alone_is_a_shard_too(runs_at: Callable[[str], list[str]], tmp_path: Path) -> None:
    """Its requests keep their names, and its sections stay."""
    run = runs_at("stats")[:1]
    (shard,) = shards_of(run, tmp_path, 1)
    assert main(["merge", str(shard), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged").read_bytes() == summarized(run, tmp_path / "whole")
    assert json.loads((tmp_path / "merged").read_bytes())["tiers"]


def test_the_order_of_parts_does_not_show_in_a_sum() -> None:
    values = [0.1, 1e16, 0.2, -1e16, 0.3]

    def total(order: list[float]) -> float:
        sums = []
        for value in order:
            sums.append(ExactSum())
            sums[-1].add(value)
        for other in sums[1:]:
            sums[0].merge(other)
        return sums[0].total

    assert total(values) == total(values[::-1]) == total(sorted(values)) == 0.6
    assert sum(values) != 0.6


def test_shards_that_do_not_add_up_are_named(
    runs_at: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_at("stats")
    first, second = map(str, shards_of(runs, tmp_path, 2))
    (tmp_path / "others").mkdir()
    other = str(shards_of(runs[:3], tmp_path / "others", 2)[1])

    def said(*paths: str) -> str:
        return told_error(capsys, lambda: main(["merge", *paths]))

    assert "shard 1/2 of the runs is missing" in said(first)
    assert "shard 0/2 of the runs is given 2 times" in said(first, second, first)
    assert f"{other}: is a shard of other runs" in said(first, other)
    whole = tmp_path / "whole.json"
    summarized(runs, whole)
    assert "whole.json: no shard of this version" in said(first, str(whole))
    assert "nothing.json: cannot read it: No such file" in said(str(tmp_path / "nothing.json"))


def test_a_damaged_shard_is_named(
    runs_at: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = shards_of(runs_at("stats"), tmp_path, 1)
    record: dict[str, Any] = json.loads(path.read_bytes())
    record["sums"]["scan_bytes"] += 1
    path.write_text(json.dumps(record))
    assert f"{path}: damaged: its digest" in told_error(capsys, lambda: main(["merge", str(path)]))
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: not JSON" in told_error(capsys, lambda: main(["merge", str(path)]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard", "0/2"], "--shard without --out"),
        (["--shard", "2/2"], "--shard: 2/2: use I/N"),
        (["--shard", "0/2", "--out", "x.json"], "--shard 0/2: has none of 1 run;"),
        (["--jobs", "0"], "--jobs: 0: use at least 1"),
    ],
)
def test_mistakes_are_named(
    runs_at: Callable[[str], list[str]], flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in told_error(capsys, lambda: main([runs_at("stats")[0], *flags]))


def test_runs_of_two_kinds_are_refused_at_the_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_golden(tmp_path / f"run{size}", block_size=size, level="stats")) for size in (4, 8)]
    shards = map(str, shards_of(runs, tmp_path, 2))
    assert "1.json: blocks 8, but 4" in told_error(capsys, lambda: main(["merge", *shards]))
