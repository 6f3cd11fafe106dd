"""Every query of docs/recipes.md runs, and finds what the run's records and summary say."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from dsatrace.trace.export import export_run
from dsatrace.trace.reader import RunReader
from helpers.golden_run import GoldenRequest, write_golden
from helpers.tier_samples import setup

duckdb = pytest.importorskip("duckdb", reason="needs duckdb: pip install duckdb")

PAGE = (ROOT / "docs" / "recipes.md").read_text()
Rows = list[tuple[Any, ...]]
Record = dict[str, Any]


def recipes() -> dict[str, str]:
    """The SQL below each heading."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for section in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]:
        found[section.splitlines()[0]] += re.findall(r"^```sql\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert all(len(blocks) == 1 for blocks in found.values())
    return {heading: blocks[0] for heading, blocks in found.items()}


RECIPES = recipes()
VIEWS = next(iter(RECIPES))


class Run:
    """A run with tiers and a shared prefix, its records, and a connection that has the page's views."""

    def __init__(self, folder: Path) -> None:
        requests = [GoldenRequest(f"r{i}", 30 + 9 * i, 9, cached_blocks=5 * (i % 2)) for i in range(4)]
        lines = RunReader(write_golden(folder / "outputs" / "mine", requests, sealed=True, tiers=setup()))
        export_run(lines, "parquet", folder / "outputs" / "mine_parquet")
        self.records = list(lines.steps())
        self.sparse = [record for record in self.records if record["path"] == "sparse"]
        self.decode = [record for record in self.records if record["phase"] == "decode"]
        self.summary = lines.summary()
        self.labels = {line["request_id"]: line["labels"] for line in lines.requests()}

    def by_layer(self, value: Callable[[list[Record]], Any], records: list[Record]) -> Rows:
        layers = sorted({record["layer_id"] for record in records})
        return [
            (layer, value([record for record in records if record["layer_id"] == layer])) for layer in layers
        ]

    def pairs(self) -> Iterator[tuple[Record, Record]]:
        """Sparse decode records, each with that of the step before."""
        known = {(one["request_id"], one["layer_id"], one["step_idx"]): one for one in self.decode}
        for (name, layer, step), one in known.items():
            before = known.get((name, layer, step - 1))
            if before and one["path"] == before["path"] == "sparse":
                yield one, before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Any]]:
    folder = tmp_path_factory.mktemp("recipes")
    run = Run(folder)
    with pytest.MonkeyPatch.context() as patch, duckdb.connect() as connection:
        patch.chdir(folder)
        connection.execute(RECIPES[VIEWS])
        yield run, connection


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def overlap(pairs: list[tuple[Record, Record]]) -> float:
    positions = [[set(one["selected_token_pos"]) for one in pair] for pair in pairs]
    return sum(len(now & before) for now, before in positions) / sum(len(now) for now, _ in positions)


def blocks_per_layer(run: Run, rows: Rows) -> None:
    assert [(row[0], row[2]) for row in rows] == run.by_layer(
        lambda some: pytest.approx(mean([one["unique_blocks"] for one in some])), run.sparse
    )
    assert max(row[4] for row in rows) == max(one["unique_blocks"] for one in run.sparse)
    for layer, _, _, (p50, p95), _ in rows:
        values = sorted(one["unique_blocks"] for one in run.sparse if one["layer_id"] == layer)
        assert p50 in values and p50 <= p95 and values.index(p50) <= len(values) // 2


def other_size(run: Run, rows: Rows) -> None:
    assert rows == run.by_layer(
        lambda some: pytest.approx(mean([len({p // 32 for p in one["selected_token_pos"]}) for one in some])),
        run.sparse,
    )
    at_32 = next(row for row in run.summary["blocks_touched"] if row["block_size_tokens"] == 32)
    counts = [sum(one["layer_id"] == layer for one in run.sparse) for layer, _ in rows]
    assert sum(n * row[1] for n, row in zip(counts, rows, strict=True)) / sum(counts) == pytest.approx(
        at_32["mean"]
    )


def regions(run: Run, rows: Rows) -> None:
    tenths = Counter(
        (one["layer_id"], 10 * p // one["seq_len_current"])
        for one in run.sparse
        for p in one["selected_token_pos"]
    )
    layers = Counter(one["layer_id"] for one in run.sparse for _ in one["selected_token_pos"])
    assert {row[:2]: row[2] for row in rows} == {
        key: pytest.approx(count / layers[key[0]]) for key, count in tenths.items()
    }


def offsets(run: Run, rows: Rows) -> None:
    found: Counter[tuple[int, int]] = Counter()
    for one in run.sparse:
        for p in one["selected_token_pos"]:
            offset = one["seq_len_current"] - 1 - p
            found[one["layer_id"], 1 << (max(offset, 1).bit_length() - 1)] += 1
    assert {row[:2]: row[2] for row in rows} == found


def prefix_share(run: Run, rows: Rows) -> None:
    hits = [one for one in run.records if one["prefix"]["prefix_cache_hit"]]
    assert [(row[0], row[2]) for row in rows] == run.by_layer(
        lambda some: pytest.approx(
            sum(len(one["prefix"]["intersection_blocks"]) for one in some)
            / sum(one["unique_blocks"] for one in some)
        ),
        hits,
    )


def bytes_by_tier(run: Run, rows: Rows) -> None:
    tokens = len({(one["request_id"], one["step_idx"]) for one in run.decode})
    (found,) = rows
    for tier, value in zip(("hbm", "local_pool", "remote_pool"), found, strict=True):
        total = sum(one["kv_fetch"][tier]["bytes_read"] for one in run.decode)
        assert total > 0 and value == pytest.approx(total / tokens)


def overlap_per_layer(run: Run, rows: Rows) -> None:
    pairs = list(run.pairs())
    assert len(rows) == 3
    for layer, value in rows:
        assert value == pytest.approx(overlap([pair for pair in pairs if pair[0]["layer_id"] == layer]))


def overlap_per_request(run: Run, rows: Rows) -> None:
    of_request: defaultdict[str, list[tuple[Record, Record]]] = defaultdict(list)
    for pair in run.pairs():
        of_request[pair[0]["request_id"]].append(pair)
    assert dict(rows) == {name: pytest.approx(overlap(pairs)) for name, pairs in of_request.items()}
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)


def hottest(run: Run, rows: Rows) -> None:
    for name, of_request in itertools.groupby(rows, key=lambda row: row[0]):
        counts = Counter(
            p // one["block_size_tokens"]
            for one in run.sparse
            if one["request_id"] == name
            for p in one["selected_token_pos"]
        )
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert [row[1:] for row in of_request] == best


def by_label(run: Run, rows: Rows) -> None:
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for one in run.sparse:
        groups[run.labels[one["request_id"]]["task"]].append(one)
    assert len(groups) == 2
    assert rows == [
        (
            task,
            len({one["request_id"] for one in groups[task]}),
            pytest.approx(mean([one["unique_blocks"] for one in groups[task]])),
        )
        for task in sorted(groups)
    ]


def slowest(run: Run, rows: Rows) -> None:
    forward = rows[0][0]
    slow = [one for one in run.decode if one["forward_idx"] == forward]
    assert rows[0][1] * 1000 == max(one["step_wall_us"] for one in run.decode) == slow[0]["step_wall_us"]
    assert rows[0][2] == len({one["request_id"] for one in slow})
    tiers = [tier for one in slow for tier in one["kv_fetch"].values()]
    assert rows[0][3] == sum(tier["bytes_read"] for tier in tiers)


CHECKS: dict[str, Callable[[Run, Rows], None]] = {
    "Is every record in columns?": lambda run, rows: check_equal(rows, [(0,)]),
    "Blocks touched per layer": blocks_per_layer,
    "The same at another block size": other_size,
    "Where in the context the selections lie": regions,
    "How far back they lie": offsets,
    "Share of the touched blocks in a shared prefix": prefix_share,
    "Bytes read per decoded token, by tier": bytes_by_tier,
    "Overlap with the step before": overlap_per_layer,
    "Overlap of each request, lowest first": overlap_per_request,
    "The hottest blocks of each request": hottest,
    "Blocks touched by label of the request": by_label,
    "The slowest steps, and what they held": slowest,
}


def check_equal(rows: Rows, expected: Rows) -> None:
    assert rows == expected


def test_every_recipe_is_checked() -> None:
    assert list(RECIPES) == [VIEWS, *CHECKS]


@pytest.mark.parametrize("heading", CHECKS)
def test_a_recipe_finds_what_the_records_say(run: tuple[Run, Any], heading: str) -> None:
    rows = run[1].execute(RECIPES[heading]).fetchall()
    assert rows
    CHECKS[heading](run[0], rows)
