"""Sections of the page: what they show is what the records, the summary and the replay say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import ROOT
from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.report.page.blocks_touched import blocks_touched, counted_by_layer
from dsatrace.report.page.cost import cost_and_crossover
from dsatrace.report.page.heat_map import packed
from dsatrace.report.page.material import Material
from dsatrace.report.page.moved import kv_found_and_moved
from dsatrace.report.page.offsets import baselines, contexts_of, measured, offsets, points
from dsatrace.report.page.over_time import in_flight, requests_over_time
from dsatrace.report.page.page import MAX_BYTES, page_html
from dsatrace.report.page.position_maps import MAX_BYTES as MAP_BYTES
from dsatrace.report.page.position_maps import MOST_IDS, MOST_STEPS, counted, map_of, position_maps
from dsatrace.report.page.prefix import shared_prefix
from dsatrace.selection_replay.cost import LINKS, Compute, Cost
from dsatrace.trace.load import load
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import LayerSelections
from dsatrace.trace.summary import recency_blocks, uniform_blocks
from helpers.golden_run import SERVING, GoldenRequest, write_golden
from helpers.kind_runs import KINDS, write_kind
from helpers.page import Page
from helpers.tier_samples import SETUPS

NEEDLE = ROOT / "data/traces/needle-2k/2k"
NO_REPLAY = "nobody asked for one"


def material_of(folder, replay=NO_REPLAY, **choice):
    return Material.of(RunReader(folder), replay, **choice)


def parts_of(section):
    return Page(section.html())


@pytest.fixture(scope="module")
def needle():
    return material_of(NEEDLE)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return write_golden(tmp_path_factory.mktemp("page") / "run", serving=SERVING)


@pytest.fixture(scope="module")
def replayed(golden, tmp_path_factory):
    out = tmp_path_factory.mktemp("replayed") / "out"
    assert cli.main(["replay", str(golden), "--policy", "lru", "--out", str(out), "--no-figure"]) == 0
    return json.loads((out / "replay.json").read_text())


@pytest.fixture(scope="module")
def maps(needle):
    return parts_of(position_maps(needle))


def dense(folder, request_id, layer):
    """(T, N) selected positions of the decode steps, NaN where a query cannot see."""
    found = load(folder).selections(request_id, layer)
    rows = [i for i, phase in enumerate(found.phase) if phase != "prefill"]
    seen = found.seq_len[rows]
    values = np.where(np.arange(seen.max()) < seen[:, None], 0.0, np.nan)
    for row, ids in zip(values, (found.rows()[i] for i in rows), strict=True):
        row[ids] = 1
    return values


def test_a_maps_bytes_are_the_selected_positions(maps):
    """Layers 0, 1 and 3: the first, the one that knows the answer, the last."""
    for layer, (shown, _) in zip((0, 1, 3), maps.heat_maps("positions"), strict=True):
        np.testing.assert_array_equal(shown, dense(NEEDLE, "niah_single_1.2048.row0", layer))


def test_a_maps_numbers_are_the_sums_of_its_bytes(maps):
    for layer, (shown, _) in zip((0, 1, 3), maps.heat_maps("positions"), strict=True):
        rows = [row for row in maps.rows("positions-table") if row[0] == layer]
        assert len(rows) == 16
        for _, first, last, count, share in rows:
            assert count == np.nansum(shown[:, int(first) : int(last) + 1])
            assert share == pytest.approx(count / np.nansum(shown))


def test_the_shares_of_sinks_recent_band_and_answer(maps):
    (line,) = [r for r in RunReader(NEEDLE).requests() if r["request_id"] == "niah_single_1.2048.row0"]
    answer = line["needle_positions"]
    for row in maps.rows("position-shares"):
        values = dense(NEEDLE, line["request_id"], int(row[0]))
        visible = np.isfinite(values).sum(axis=1)
        k = np.nansum(values, axis=1)
        recent = [np.nansum(one[n - 64 : n]) for one, n in zip(values, visible, strict=True)]
        expected = [
            np.nansum(values[:, :16]) / k.sum(),
            (k * 16 / visible).sum() / k.sum(),
            sum(recent) / k.sum(),
            (k * 64 / visible).sum() / k.sum(),
            values[:, answer].mean(),
            (k / visible).mean(),
        ]
        assert row[1:] == pytest.approx(expected)
    assert maps.rows("position-shares")[1][5] > 0.6  # layer 1 looks the answer up


def test_other_requests_and_layers_on_demand(needle):
    other = material_of(NEEDLE, request="niah_single_1.2048.row1", layer=2)
    ((shown, _),) = parts_of(position_maps(other)).heat_maps("positions")
    np.testing.assert_array_equal(shown, dense(NEEDLE, "niah_single_1.2048.row1", 2))
    with pytest.raises(UserError, match="no request 'nobody'"):
        position_maps(material_of(NEEDLE, request="nobody"))
    with pytest.raises(UserError, match="--layer 9"):
        position_maps(material_of(NEEDLE, layer=9))


@pytest.fixture(scope="module")
def long_layer():
    """1,100 steps of 2,048 positions drawn from 128K: the least compressible there is."""
    rng, steps = np.random.default_rng(0), 1100
    seq_len = 131_072 + np.arange(1, steps + 1)
    ids = np.concatenate([rng.choice(n, 2048, replace=False) for n in seq_len[::50] for _ in range(50)])
    ptr = np.arange(steps + 1) * 2048
    return LayerSelections(
        np.arange(steps), seq_len, np.arange(steps), np.full(steps, "decode"), ids.astype(np.int32), ptr
    )


def test_a_large_map_is_pooled_within_its_budget(long_layer):
    one = map_of(0, ["first layer"], long_layer, long_layer.seq_len, num_maps=5)
    rows, columns = one.cells.shape
    assert rows <= MOST_STEPS
    assert columns <= MOST_IDS
    assert one.steps_per_row == 3
    assert one.ids_per_column >= 128
    assert np.nansum(one.cells) == len(long_layer.ids)  # nothing is lost
    assert len(packed(one.cells, float(np.nanmax(one.cells)))) <= MAP_BYTES // 5


@pytest.mark.parametrize(("steps", "ids"), [(1, 1), (2, 1), (1, 4), (3, 8)])
def test_a_pooled_cell_counts_its_ids(steps, ids):
    found = load(NEEDLE).selections("niah_single_1.2048.row0", 1)
    exact = np.zeros((len(found), int(found.seq_len.max())))
    for row, chosen in zip(exact, found.rows(), strict=True):
        row[chosen] = 1
    cells = counted(found, found.seq_len, steps, ids)
    groups = [np.arange(0, size, by) for size, by in zip(exact.shape, (steps, ids), strict=True)]
    expected = np.add.reduceat(np.add.reduceat(exact, groups[0], axis=0), groups[1], axis=1)
    seen = groups[1] < np.maximum.reduceat(found.seq_len, groups[0])[:, None]
    np.testing.assert_array_equal(cells, np.where(seen, expected, np.nan))


def test_blocks_touched_are_the_summarys_and_add_up_over_layers(needle):
    table = parts_of(blocks_touched(needle)).rows("blocks-table")
    overall = {row[1]: row[2:] for row in table if row[0] == "all"}
    for row in needle.summary["blocks_touched"]:
        keys = ("mean", "uniform_mean", "recency_mean", "context_mean")
        assert overall[row["block_size_tokens"]] == [row[key] for key in keys]
    found = counted_by_layer(load(NEEDLE), needle.kind, (16, 32, 64))
    assert found.is_whole
    assert found.num_records == needle.summary["counts"]["sparse_records"]
    for row in needle.summary["blocks_touched"]:
        whole = found.sums[row["block_size_tokens"]].sum(axis=1) / found.records.sum()
        assert whole == pytest.approx([row[key] for key in keys])


def test_blocks_by_layer_counted_by_hand():
    run, found = load(NEEDLE), {}
    for request in run.all_selections():
        layer = next(layer for (number, _), layer in request.layers.items() if number == 2)
        for ids, seq_len in zip(layer.rows(), layer.seq_len.tolist(), strict=True):
            one = np.array([seq_len])
            touched = len({position // 32 for position in ids.tolist()})
            whole = (seq_len + 31) // 32
            found.setdefault("rows", []).append(
                (touched, uniform_blocks(one, len(ids), 32)[0], recency_blocks(one, len(ids), 32)[0], whole)
            )
    means = counted_by_layer(run, material_of(NEEDLE).kind, (32,)).means(32)[:, 2]
    assert means == pytest.approx(np.mean(found["rows"], axis=0))


@pytest.mark.parametrize("name", SETUPS)
def test_tiers_are_the_summarys(tmp_path, name):
    material = material_of(write_golden(tmp_path / "run", tiers=SETUPS[name]))
    section = kv_found_and_moved(material)
    table = {(row[0], row[1]): row[3] for row in parts_of(section).rows("bytes-table")}
    fetch = material.summary["kv_fetch"]
    titles = {"hbm": "HBM", "local_pool": "local pool", "remote_pool": "remote pool"}
    for tier in fetch:
        has_tier = material.manifest["tiers"][tier] is not None
        assert ((titles[tier], "selected tokens found") in table) == has_tier
        if has_tier:
            for label, key in (
                ("selected tokens found", "hit_tokens"),
                ("touched blocks found", "hit_blocks"),
                ("read, bytes", "bytes_read"),
                ("written, bytes", "bytes_written"),
                ("reads", "read_ops"),
            ):
                assert table[titles[tier], label] == fetch[tier][key]
    total = sum(one["hit_tokens"] for one in fetch.values())
    for tier in fetch:
        if material.manifest["tiers"][tier] is not None and fetch[tier]["hit_tokens"]:
            share = f"{fetch[tier]['hit_tokens'] / total:.1%} ({fetch[tier]['hit_tokens']:,})"
            assert share in section.body


def test_bytes_without_tiers_are_the_summarys(needle):
    table = {row[1]: row[3] for row in parts_of(kv_found_and_moved(needle)).rows("bytes-table")}
    read = needle.summary["bytes_read"]
    assert table["latents of the touched blocks"] == read["without_indexer_scan"]
    assert table["indexer keys (it scans every token)"] == read["indexer_scan"]
    assert table["latents and indexer keys together"] == read["with_indexer_scan"]


def test_hot_blocks_are_the_summarys(needle):
    table = parts_of(shared_prefix(needle)).rows("prefix-table")
    hot = needle.summary["prefix_hot_blocks"]
    expected = [[name, one["block_id"], one["touches"]] for name, blocks in hot.items() for one in blocks]
    assert table == expected


def test_offsets_beside_selectors_counted_by_hand(golden):
    material = material_of(golden)
    records = list(material.run.steps())
    table = parts_of(offsets(material)).rows("offsets-table")
    everything = [r["seq_len_current"] - 1 - p for r in records for p in r["selected_token_pos"]]
    for offset, share, uniform, recency in table:
        assert share == pytest.approx(np.mean(np.array(everything) <= offset))
        of = [(r["seq_len_current"], len(r["selected_token_pos"])) for r in records]
        assert uniform == pytest.approx(sum(k * min(offset + 1, n) / n for n, k in of) / len(everything))
        assert recency == pytest.approx(sum(min(offset + 1, k) for _, k in of) / len(everything))
    assert table[-1][1:] == [1, 1, 1]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.holds("offset_max")])
def test_offset_baselines_of_every_kind_end_at_one(tmp_path, name):
    material = material_of(write_kind(tmp_path / "run", name))
    contexts, _ = contexts_of(material.run)
    at = points(int(contexts[0].max()))
    for share in (
        measured(material.summary["histograms"]["offsets"], at),
        *baselines(material.kind, contexts, at),
    ):
        assert np.all(np.diff(share) >= 0)
        assert share[-1] == pytest.approx(1)


def test_requests_over_time_are_the_summarys(golden):
    material = material_of(golden)
    serving = material.summary["serving"]
    parts = parts_of(requests_over_time(material))
    buckets = serving["requests_over_time"]
    expected = [[one["start_s"], one["arrived"], one["finished"]] for one in buckets]
    assert [row[:3] for row in parts.rows("requests-table")] == expected
    assert parts.rows("served")[0][1:] == [
        serving["latency_ms"][name] for name in ("p50", "p95", "p99", "max", "mean")
    ]
    assert in_flight([{"arrived": 3, "finished": 1}, {"arrived": 0, "finished": 2}]) == [2, 0]


def test_costs_are_the_models(golden, replayed):
    material = material_of(golden, replayed)
    parts = parts_of(cost_and_crossover(material))
    cost, hbm = Cost.stored(replayed)
    assert cost == Cost.of(replayed, "2k", LINKS["pcie5-gather"], Compute(50, 1.5))
    record = cost.to_json(hbm)
    assert parts.rows("cost-batches") == [
        [row["batch"], row["whole_ms"], row["overlapped_ms"], row["serial_ms"]] for row in record["by_batch"]
    ]
    keys = ("context", "most_requests", "most_requests_offloaded", "tokens_per_s", "tokens_per_s_offloaded",
            "pays_from_batch")  # fmt: skip
    assert parts.rows("cost-contexts") == [[row[key] for key in keys] for row in record["by_context"]]


def test_costs_follow_what_the_replay_was_asked(golden, tmp_path):
    out = tmp_path / "out"
    flags = ["--policy", "lru", "--link", "nvlink-c2c", "--compute-us", "20+0.5", "--hbm-gb", "0.5"]
    assert cli.main(["replay", str(golden), "--out", str(out), "--no-figure", *flags]) == 0
    record = json.loads((out / "replay.json").read_text())
    cost, hbm = Cost.stored(record)
    assert cost.compute == Compute(20, 0.5)
    assert cost.link.name == "nvlink-c2c"
    assert cost.to_json(hbm) == record["chosen"]["cost"]


def test_costs_are_left_out_where_ids_have_no_bytes(replayed, golden):
    material = material_of(golden, {**replayed, "bytes_per_id": None})
    assert (
        cost_and_crossover(material).why == "what an id holds is not known in bytes, so its fetch has no cost"
    )
    assert NO_REPLAY in cost_and_crossover(material_of(golden)).why


LEFT_OUT = {  # sections of this file that a kind cannot have
    "two heads": set(),
    "uneven layers": {"prefix"},
    "entry": set(),
    "block": {"bytes"},
    "expert": {"blocks", "prefix", "offsets", "bytes"},
    "slots": {"positions", "blocks", "prefix", "offsets"},  # a token has an indexer key wherever it lies
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_its_sections(tmp_path, name):
    folder = write_kind(tmp_path / "run", name)
    page = Page(page_html(material_of(folder)))
    shown = page.sections()
    assert {"positions", "blocks", "bytes", "prefix", "offsets"} - shown.keys() == LEFT_OUT[name]
    maps = page.heat_maps("positions") if "positions" in shown else []
    for values, _ in maps:
        assert np.nansum(values) > 0
    if name == "expert":
        assert maps[0][1]["x"] == ["expert", 0, 256]
        assert "sinks" not in shown["positions"].text
    if name == "entry":  # of 4 tokens: the axis counts tokens
        title, low, high = maps[0][1]["x"]
        assert (title, low, high % 4) == ("position (tokens)", 0, 0)
    if name == "slots":
        assert "Its ids are an engine's slots, which say nothing of positions" in page.root.text


@pytest.mark.parametrize("level", ["stats", "blocks"])
def test_records_of_less_than_full_level(tmp_path, level):
    page = Page(page_html(material_of(write_golden(tmp_path / "run", level=level))))
    assert ("positions" in page.sections()) == (level == "blocks")
    assert "blocks" in page.sections()
    if level == "stats":
        assert "Records of level stats hold no positions" in page.root.text


def test_hostile_names_stay_text(tmp_path):
    name = '"><script>alert(1)</script>\x1b[31m'
    requests = (GoldenRequest(name, 40, 6, 3, (4, 5)), GoldenRequest("</textarea>", 40, 6, 7))
    folder = write_golden(tmp_path / "<img src=x onerror=alert(1)>", requests, serving=SERVING)
    html = page_html(material_of(folder))
    page = Page(html)
    tags = [element.tag for element in page.root.all()]
    assert tags.count("script") == 1
    assert not {"img", "textarea"} & set(tags)
    assert "<script>alert" in page.root.text
    assert "\x1b" not in html


def test_a_deep_model_of_long_context_stays_small(tmp_path):
    requests = (GoldenRequest("r0", 131_072, 6, 3, (70_000,)), GoldenRequest("r1", 131_000, 6, 7))
    folder = write_golden(tmp_path / "run", requests, num_layers=61)
    html = page_html(material_of(folder))
    assert len(html.encode()) < MAX_BYTES
    assert len(Page(html).heat_maps("positions")) >= 2
