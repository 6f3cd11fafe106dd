"""`dsatrace replay` over runs: what is found, and that parts, processes and shards add up to the whole."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.replay import main
from dsatrace.errors import UserError
from dsatrace.selection_replay import replay, work
from dsatrace.selection_replay.kept import KeptResults
from dsatrace.selection_replay.replay import replay_all, replay_part
from dsatrace.selection_replay.result import Result
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
from dsatrace.selection_replay.work import Work, find_work
from dsatrace.trace import selection_parts
from dsatrace.trace.export import export_run
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.reader import RunReader
from helpers.command_runs import told_error
from helpers.golden_run import TOP_K, GoldenRequest, write_golden
from helpers.kind_runs import KINDS, write_kind

REQUESTS = [GoldenRequest(f"r{i}", 30 + 5 * i, 9 + i % 3) for i in range(6)]
SETTINGS = ReplaySettings(policies=("lru", "fifo", "opt"), sizes=parse_sizes("1k,2k,50%"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden(tmp_path_factory.mktemp("replay") / "run", REQUESTS, sealed=True)


@pytest.fixture
def parts(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """One request each."""
    monkeypatch.setattr(selection_parts, "MIN_PARTS", 1 << 40)
    monkeypatch.setattr(selection_parts, "MIN_PART_BYTES", 1)
    work = find_work([run], SETTINGS)
    assert len(work) == len(REQUESTS)
    return work


def test_parts_in_any_order_and_grouping_add_up_to_the_whole(run: Path, parts: list[Work]) -> None:
    whole = Result.from_json(replay_all(parts, SETTINGS).to_json(), "whole")
    results = [replay_part(part, SETTINGS).to_json() for part in parts]
    for seed in range(5):
        random.Random(seed).shuffle(results)
        cut = random.Random(seed).randrange(1, len(results))
        halves = [results[:cut], results[cut:]]
        sums = []
        for half in halves:
            total = Result.from_json(half[0], "half")
            for part in half[1:]:
                total.add(Result.from_json(part, "part"), "part")
            sums.append(total)
        sums[0].add(sums[1], "other half")
        assert json.loads(json.dumps(sums[0].to_json(), sort_keys=True)) == json.loads(
            json.dumps(whole.to_json(), sort_keys=True)
        )


def test_a_request_counts_once(run: Path) -> None:
    result = replay_all(find_work([run], SETTINGS), SETTINGS)
    again = Result.from_json(result.to_json(), "again")
    with pytest.raises(UserError, match=r"there\.json: request run/r0 stands in another file too"):
        result.add(again, "there.json")


def test_runs_of_one_name_add(run: Path, tmp_path: Path) -> None:
    other = write_golden(tmp_path / "run", REQUESTS, sealed=True)
    result = replay_all(find_work([run, other], SETTINGS), SETTINGS)
    assert len(result.requests) == 2 * len(REQUESTS)
    with pytest.raises(UserError, match=r"request .*/run/r0 stands in another file too"):
        replay_all(find_work([run, run], SETTINGS), SETTINGS)


def test_other_settings_and_models_do_not_add(run: Path) -> None:
    result = replay_all(find_work([run], SETTINGS), SETTINGS)
    other = ReplaySettings(policies=("lru",), sizes=parse_sizes("1k"))
    with pytest.raises(UserError, match=r"b\.json: its settings is .* one set of flags"):
        result.add(replay_all(find_work([run], other), other), "b.json")
    changed = Result.from_json(result.to_json() | {"header": result.header | {"top_k": [16]}}, "c")
    with pytest.raises(UserError, match="its top k is"):
        result.add(changed, "c.json")


def test_a_replay_that_was_killed_goes_on(
    parts: list[Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replay_all(parts, SETTINGS).to_json()
    real, replayed = replay.replay_requests, []

    def until_the_third(requests: Any, *rest: Any) -> Result:
        replayed.append(requests[0].request_id)
        if len(replayed) == 3:
            raise KeyboardInterrupt
        return real(requests, *rest)

    monkeypatch.setattr(replay, "replay_requests", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        replay_all(parts, SETTINGS, keep=tmp_path)
    assert len(replayed) == 3 and len(list(tmp_path.iterdir())) == 2
    assert replay_all(parts, SETTINGS, keep=tmp_path).to_json() == whole
    assert len(replayed) == 3 + 4, "the first two parts were taken from the folder"
    assert replay_all(parts, SETTINGS, keep=tmp_path).to_json() == whole
    assert len(replayed) == 3 + 4


@pytest.mark.parametrize("damage", ["a digit", "cut short", "emptied"])
def test_a_damaged_kept_part_is_replayed_anew(parts: list[Work], tmp_path: Path, damage: str) -> None:
    whole = replay_all(parts, SETTINGS, keep=tmp_path).to_json()
    path = next(tmp_path.glob("*.part"))
    good = path.read_bytes()
    digit = zlib.decompress(good[65:]).replace(b'"missed":', b'"missed":9', 1)
    bad = {"a digit": good[:65] + zlib.compress(digit), "cut short": good[:-9], "emptied": b""}
    path.write_bytes(bad[damage])
    assert path.read_bytes() != good
    assert replay_all(parts, SETTINGS, keep=tmp_path).to_json() == whole
    assert path.read_bytes() == good


def test_two_replays_may_keep_in_one_folder(parts: list[Work], tmp_path: Path) -> None:
    """Each writes under a name of its own first, so that neither sees half of the other's."""
    result, key = replay_part(parts[0], SETTINGS), parts[0].key
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: KeptResults(tmp_path).put(key, result), range(40)))
    assert [path.name for path in tmp_path.iterdir()] == [f"{key}.part"]
    kept = KeptResults(tmp_path).get(key)
    assert kept is not None and kept.to_json() == json.loads(json.dumps(result.to_json()))


def test_a_small_run_of_lines_is_cut_for_many_processes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_parts, "MIN_PART_BYTES", 1)
    assert len(find_work([run], SETTINGS)) == len(REQUESTS)


def test_a_run_of_many_parts_is_few_pieces(
    run: Path, parts: list[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_WORK", 4)
    pieces = find_work([run], SETTINGS)
    assert [len(one.parts) for one in pieces] == [2, 2, 2]
    assert replay_all(pieces, SETTINGS).to_json() == replay_all(parts, SETTINGS).to_json()


def test_a_shard_opens_only_its_own_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsatrace.trace.parquet.replay_layout.FILE_BYTES", 1)
    export_run(RunReader(run), "replay", tmp_path / "run")
    paths = RunReader(tmp_path / "run").step_paths
    assert len(paths) == len(REQUESTS)
    for path in paths[1::2]:
        path.unlink()
    found = find_work([tmp_path / "run"], SETTINGS, (0, 2))
    assert {span.path for work in found for part in work.parts for span in part.spans} == set(paths[::2])


def test_a_part_of_other_content_is_replayed(parts: list[Work]) -> None:
    part = parts[0]
    (of_other_settings, *_) = find_work([part.folder], ReplaySettings())
    changes: list[dict[str, Any]] = [{"content": "0"}, {"name": "other"}, {"header": {"bytes_per_id": 656}}]
    keys = {part.key, of_other_settings.key, *(dataclasses.replace(part, **one).key for one in changes)}
    assert len(keys) == 5


def replayed(run: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main([str(run), "--policy", "lru,fifo,opt", "--out", str(out), *flags]) == 0
    record: dict[str, Any] = json.loads((out / "replay.json").read_bytes())
    return record


def test_processes_shards_and_formats_give_one_result(run: Path, tmp_path: Path) -> None:
    whole = replayed(run, tmp_path / "whole", "--no-figure")
    copy = tmp_path / "columns" / "run"
    export_run(RunReader(run), "parquet", copy)
    assert replayed(copy, tmp_path / "parquet", "--no-figure", "--jobs", "2")["sums"] == whole["sums"]


def test_shards_are_merged_by_the_command(run: Path, tmp_path: Path) -> None:
    other = write_golden(tmp_path / "other", [GoldenRequest(f"s{i}", 50, 12) for i in range(3)], seed=3)
    both = [str(run), str(other)]
    flags = ("--policy", "lru,opt", "--no-figure")
    assert main([*both, *flags, "--out", str(tmp_path / "all")]) == 0
    for shard in range(2):
        assert main([*both, *flags, "--shard", f"{shard}/2", "--out", str(tmp_path / f"{shard}")]) == 0
    shards = [str(tmp_path / f"{shard}" / "replay.json") for shard in range(2)]
    assert main(["merge", *shards, "--no-figure", "--out", str(tmp_path / "merged")]) == 0
    whole, merged = (json.loads((tmp_path / name / "replay.json").read_bytes()) for name in ("all", "merged"))
    assert merged == whole
    assert whole["num_requests"] == len(REQUESTS) + 3


def test_at_top_k_misses_are_what_the_step_before_lacked(run: Path, tmp_path: Path) -> None:
    """The identity that any capture can be checked with: 1 minus the raw overlap."""
    overall = replayed(run, tmp_path / "out", "--no-figure")["overall"]
    missed = 1 - overall["overlap"]["run"]["share"][0]
    for policy in ("lru", "fifo", "opt"):
        assert overall["policies"][policy]["1k"]["miss_rate"] == pytest.approx(missed)
    assert overall["curves"]["run"]["sizes"][0] == TOP_K
    assert overall["curves"]["run"]["miss_rate"][0] == pytest.approx(missed)


def test_the_files_and_tables(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = replayed(run, tmp_path)
    shown = capsys.readouterr().out
    for words in ("Share of the selected ids", "synthetic", "uniform selector", "serves 95%", "recall"):
        assert words in shown
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "replay.csv").open()))
    assert len(rows) == 4 * 3 * 3, "all layers and three, policies, sizes"
    cell = record["overall"]["policies"]["lru"]["2k"]
    assert float(rows[1]["miss_rate"]) == cell["miss_rate"] and rows[1]["size"] == "2k"
    low, high = cell["interval"]
    assert low <= cell["miss_rate"] <= high
    assert cell["misses_per_step"]["p50"] <= cell["misses_per_step"]["p99"] <= TOP_K
    assert cell["bytes_per_token"] == pytest.approx(cell["reads_per_token"] * 1152)


def test_few_requests_give_no_interval(tmp_path: Path) -> None:
    run = write_golden(tmp_path / "run", [GoldenRequest("only", 40, 9)])
    record = replayed(run, tmp_path / "out", "--no-figure")
    assert record["overall"]["policies"]["lru"]["1k"]["interval"] is None


def test_a_buffer_below_a_step_is_said_to_be(run: Path, tmp_path: Path) -> None:
    """Blocks: a step touches more of them than its tokens would fill."""
    record = replayed(run, tmp_path, "--unit", "block:4", "--sizes", "1k,8k", "--no-figure")
    cells = record["overall"]["policies"]["lru"]
    assert cells["1k"]["miss_rate"] is None and "at once" in cells["1k"]["too_small"]
    assert cells["8k"]["ids"] == 2 * TOP_K and cells["8k"]["miss_rate"] >= 0
    assert record["bytes_per_id"] == 4 * 1152


def test_touched_blocks_replay_as_the_positions_do(run: Path, tmp_path: Path) -> None:
    """A run at level blocks holds what a replay in blocks needs."""
    thin = write_golden(tmp_path / "thin" / "run", REQUESTS, level="blocks")
    flags = ("--unit", "block:8", "--sizes", "8k", "--policy", "lru", "--no-figure")
    whole, blocks = (
        replayed(path, tmp_path / f"{i}", *flags)["overall"]["policies"] for i, path in enumerate((run, thin))
    )
    assert whole["lru"]["8k"]["miss_rate"] == blocks["lru"]["8k"]["miss_rate"] > 0


@pytest.mark.parametrize("name", sorted(KINDS))
def test_runs_of_every_kind_of_selection(name: str, tmp_path: Path) -> None:
    """Whatever an id stands for, in both formats: at top-k, misses are what the step before lacked."""
    run = write_kind(tmp_path / "run", name)
    record = replayed(run, tmp_path / "out", "--sizes", "1k,2k,50%", "--format", "svg")
    sets = [f"{layer}.{head}" if heads > 1 else f"{layer}" for layer, heads, head in _sets(KINDS[name])]
    assert [layer["name"] for layer in record["layers"]] == sets
    for layer in record["layers"]:
        overlap, cell = layer["overlap"]["run"], layer["policies"]["lru"]["1k"]
        assert 0 < overlap["share"][0] < 1
        if KINDS[name].door != "attach":  # where a set may hold fewer, the buffer keeps older ones
            assert cell["miss_rate"] == pytest.approx(1 - overlap["share"][0])
        assert layer["policies"]["opt"]["2k"]["miss_rate"] <= layer["policies"]["lru"]["2k"]["miss_rate"]
        is_position = KINDS[name].id_kind == "position" and KINDS[name].unit != "expert"
        assert (overlap["shifted_share"] is not None) == is_position
        assert ("recency" in layer["overlap"]) == is_position
    export_run(RunReader(run), "parquet", tmp_path / "columns" / "run")
    again = replayed(tmp_path / "columns" / "run", tmp_path / "again", "--sizes", "1k,2k,50%", "--no-figure")
    assert again["sums"] == record["sums"]


def _sets(kind: SelectionKind) -> list[tuple[int, int, int]]:
    return [(i, layer.heads, head) for i, layer in enumerate(kind.layers) for head in range(layer.heads)]


def test_layers_in_one_buffer(run: Path, tmp_path: Path) -> None:
    record = replayed(run, tmp_path, "--share", "request")
    assert record["overall"]["policies"]["lru"]["1k"]["ids"] == 3 * TOP_K
    assert [layer.get("policies") for layer in record["layers"]] == [None] * 3
    cell = record["overall"]["policies"]["lru"]["1k"]
    assert cell["reads_per_token"] == pytest.approx(3 * cell["misses_per_step"]["mean"]), "of all layers"
    assert "engines" not in record["chosen"], "whose buffers are per layer"
    assert (tmp_path / "replay.png").exists()


def test_a_foreign_folder_is_not_written_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    said = told_error(capsys, lambda: main([str(run), "--out", str(tmp_path)]))
    assert "holds notes.txt" in said and "--out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard", "2/2"], "--shard: 2/2: use I/N"),
        (["--shard", "1/3"], "--shard 1/3: the runs have fewer parts"),
        (["--jobs", "0"], "--jobs: 0: use at least 1"),
        (["--out", "s3://bucket/out"], "--out: name a folder of this machine"),
        (["--engine", "ray", "--jobs", "2"], "--jobs 2 with --engine ray"),
        (["--choose", "3k"], "--choose 3k: choose one of the replayed sizes, 1k, 2k, 4k"),
        (["--link", "pcie5-x16"], "--link without --compute-us"),
        (["--compute-us", "50"], "--compute-us without --link"),
        (["--hbm-gb", "40"], "--hbm-gb 40.0"),
        (["--link", "carrier-pigeon", "--compute-us", "50"], "carrier-pigeon"),
        (["--link", "pcie5-x16", "--compute-us", "fast"], "--compute-us fast"),
        (["--measured", "/nowhere/metrics.txt"], "--measured /nowhere/metrics.txt: cannot read it"),
        (["--policy", "arc"], "--policy arc"),
    ],
)
def test_mistakes_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert said in told_error(capsys, lambda: main([str(run), "--out", str(tmp_path), *flags]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # before anything was replayed


def test_a_run_that_selects_everything_has_nothing_to_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_golden(tmp_path / "run", [GoldenRequest("short", 2, 4)])
    said = told_error(capsys, lambda: main([str(run), "--out", str(tmp_path / "out")]))
    assert "no request has a step that counts" in said


def test_merging_names_what_is_wrong(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("[1]")
    replayed(run, tmp_path / "good", "--no-figure")
    good = str(tmp_path / "good")
    out = ["--out", str(tmp_path / "sum")]
    assert "bad.json: no result" in told_error(
        capsys, lambda: main(["merge", good, f"{tmp_path}/bad.json", *out])
    )
    assert "stands in another file too" in told_error(capsys, lambda: main(["merge", good, good, *out]))
    assert "--out DIR is missing" in told_error(capsys, lambda: main(["merge", good]))
