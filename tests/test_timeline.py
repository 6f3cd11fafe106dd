"""The exported timeline: what Google's Trace Event Format asks for, and the run's own numbers.

Runs of every door, with tiers and without, killed, pooled, untimed; each file is read back and held against
the format: keys by phase, times that ascend within a track, slices that nest.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.cli import main
from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.selection_replay.per_step import buffers_of
from dsatrace.selection_replay.replay import replay_all
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
from dsatrace.selection_replay.work import find_work
from dsatrace.trace import perfetto
from dsatrace.trace import timeline as timelines
from dsatrace.trace.load import Run
from dsatrace.trace.reader import RunReader
from dsatrace.trace.timeline import Timeline
from dsatrace.workloads.tokenizer import write_byte_tokenizer
from helpers.command_runs import told_error
from helpers.golden_run import REQUESTS, SERVING, read_lines, write_golden, write_lines
from helpers.kind_runs import KINDS, NUM_STEPS, PROMPTS, write_kind
from helpers.tier_samples import SETUPS

OPEN = ROOT / "data" / "traces" / "needle-2k" / "2k"
KEYS = {
    "X": {"name": str, "pid": int, "tid": int, "ts": float, "dur": float},
    "C": {"name": str, "pid": int, "ts": float, "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}
"""Required by phase, as https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU has
them; times are in us."""
NAMES = {"process_name": "name", "thread_name": "name"} | dict.fromkeys(
    ("process_sort_index", "thread_sort_index"), "sort_index"
)
EPSILON_US = 0.01  # sums of numbers with three decimals


def check_format(trace: dict[str, Any]) -> None:
    """Raises `AssertionError` for what the format does not allow."""
    assert set(trace) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    tracks, counters, named = defaultdict(list), defaultdict(list), set()
    for event in trace["traceEvents"]:
        for key, kind in KEYS[event["ph"]].items():
            assert isinstance(event[key], (int, float) if kind is float else kind), event
        assert not set(event) - set(KEYS[event["ph"]]) - {"ph", "args", "tid"}, event
        if event["ph"] == "M":
            assert set(event["args"]) == {NAMES[event["name"]]}
            named.add((event["pid"], event["tid"], event["name"]))
            continue
        assert np.isfinite(event["ts"]) and event["ts"] >= 0, event
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, float) for value in event["args"].values()), event
            counters[event["pid"], event["name"]].append(event["ts"])
        else:
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for (process, track), slices in tracks.items():
        assert {(process, track, "thread_name"), (process, 0, "process_name")} <= named
        check_nesting(slices)
    for times in counters.values():
        assert times == sorted(times)


def check_nesting(slices: list[tuple[float, float]]) -> None:
    """Slices (begin, duration) in the order of the file: each lies within the one that it begins in."""
    assert [begin for begin, _ in slices] == sorted(begin for begin, _ in slices)
    open_until: list[float] = []
    for begin, duration in slices:
        assert duration >= 0
        while open_until and open_until[-1] <= begin + EPSILON_US:
            open_until.pop()
        assert not open_until or begin + duration <= open_until[-1] + EPSILON_US, (begin, duration)
        open_until.append(begin + duration)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([{"ph": "B", "name": "a", "pid": 1, "tid": 1, "ts": 0}], "B"),
        ([{"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 0}], "dur"),
        ([{"ph": "C", "name": "a", "pid": 1, "ts": -1, "args": {"a": 1.0}}], "ts"),
        ([{"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 0, "dur": 1}], "thread_name"),
        ([{"ph": "C", "name": "a", "pid": 1, "ts": at, "args": {"a": 1.0}} for at in (1, 0)], "sorted"),
    ],
)
def test_the_checker_finds(events, said):
    with pytest.raises((AssertionError, KeyError)) as raised:
        check_format({"displayTimeUnit": "ms", "otherData": {}, "traceEvents": events})
    assert said in str(raised.value) or said in str(raised.traceback[-1].statement)


@pytest.mark.parametrize("slices", [[(0, 4), (2, 4)], [(2, 1), (0, 1)], [(0, 4), (0, 5)]])
def test_the_checker_finds_slices_that_cross(slices):
    with pytest.raises(AssertionError):
        check_nesting(slices)
    check_nesting([(0, 4), (0, 1), (1, 3), (1, 2), (4, 2)])


class Exported:
    """A run's timeline, read back and checked, and what the command said."""

    def __init__(self, folder: Path, out: Path, capsys: Any, *flags: str) -> None:
        capsys.readouterr()
        assert main(["export", str(folder), "--to", "perfetto", "--out", str(out), *flags]) == 0
        self.said = capsys.readouterr().out
        self.trace = json.loads(gzip.decompress(out.read_bytes()))
        check_format(self.trace)
        self.told = self.trace["otherData"]
        self.events = self.trace["traceEvents"]
        (said,) = re.findall(r"([\d,]+) events, ", self.said)
        assert len(self.events) == int(said.replace(",", "")) <= perfetto.MOST_EVENTS
        for note in self.told["notes"]:
            assert note in self.said

    def slices(self, process: int) -> list[dict[str, Any]]:
        return [event for event in self.events if event["ph"] == "X" and event["pid"] == process]

    def requests(self) -> dict[str, dict[str, Any]]:
        return {event["name"]: event for event in self.slices(perfetto.REQUESTS) if "args" in event}

    def counter(self, name: str) -> dict[str, list[float]]:
        """Each line's values but the last, which ends the counter."""
        found = [
            event["args"] for event in self.events if event["ph"] == "C" and event["name"].startswith(name)
        ]
        return {line: [args[line] for args in found[:-1]] for line in (found[0] if found else ())}


@pytest.fixture
def exported(tmp_path, capsys):
    def export(folder: Path, *flags: str) -> Exported:
        return Exported(folder, tmp_path / f"{len(list(tmp_path.iterdir()))}.json.gz", capsys, *flags)

    return export


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return write_golden(tmp_path_factory.mktemp("golden") / "run", serving=SERVING)


def test_a_real_run_in_its_own_time(exported):
    """8 needles of 64 steps: prefilled one by one, decoded together."""
    found = exported(OPEN)
    assert found.told["time"] == "the run's clock" and found.told["notes"] == []
    lines = {line["request_id"]: line for line in RunReader(OPEN).requests()}
    assert found.requests().keys() == lines.keys()
    for name, event in found.requests().items():
        assert event["ts"] == pytest.approx(lines[name]["admitted_s"] * 1e6, abs=0.01)
        assert event["ts"] + event["dur"] == pytest.approx(lines[name]["finish_s"] * 1e6, abs=1)
        assert event["args"] == {"state": "length", "output_tokens": 65} | {
            "prompt_tokens": lines[name]["num_prompt_tokens"]
        }
    steps = found.slices(perfetto.STEPS)
    decode = [event for event in steps if event["name"] == "decode"]
    assert len(decode) == 64 and len(steps) == 64 + 8
    # A step lasts what was measured, and all lie between the last first token and the end.
    walls = {record["forward_idx"]: record["step_wall_us"] for record in RunReader(OPEN).steps()}
    for event in steps:
        assert event["dur"] == pytest.approx(walls[event["args"]["forward_idx"]], abs=1)
    assert decode[0]["ts"] >= max(line["first_token_s"] for line in lines.values()) * 1e6 - 1
    assert decode[-1]["ts"] + decode[-1]["dur"] <= max(line["finish_s"] for line in lines.values()) * 1e6 + 1
    for event in steps[:8]:  # a prompt's last pass ends with the first token
        ends = [line["first_token_s"] * 1e6 for line in lines.values()]
        assert min(abs(event["ts"] + event["dur"] - end) for end in ends) < 1


def test_its_misses_are_the_replays(exported):
    found = exported(OPEN, "--buffer", "1.5k")
    settings = ReplaySettings(policies=("lru",), sizes=parse_sizes("1.5k"))
    replayed = replay_all(find_work([OPEN], settings), settings)
    missed = found.counter("missed (LRU 1.5k, replayed)")
    assert len(missed) == 4
    for layer, values in missed.items():
        cell = replayed.buffers[layer.removeprefix("layer ")]["run"]["policies"]["lru"]["1.5k"]
        assert sum(values) == cell.missed > 0
    held = found.counter("resident (LRU 1.5k, replayed)")
    for values in held.values():
        assert sorted(values) == values and values[-1] == 8 * 288


def test_its_counters_are_the_records(exported):
    found, records = exported(OPEN), list(RunReader(OPEN).steps())
    for layer, values in found.counter("selected ids").items():
        of_layer = [one for one in records if f"layer {one['layer_id']}" == layer]
        assert sum(values) == sum(one["unique_token_pos_count"] for one in of_layer) > 0
    told = found.counter("bytes read")
    assert set(told) == {"hbm", "indexer"}
    assert sum(told["hbm"]) == sum(one["kv_fetch"]["hbm"]["bytes_read"] for one in records)
    assert sum(told["indexer"]) == sum(one["indexer_scan"]["bytes_read"] for one in records)
    context = found.counter("context")["tokens"]
    assert sum(context) == sum(one["seq_len_current"] for one in records if one["layer_id"] == 0)
    assert max(found.counter("rows")["rows"]) == 8


@pytest.mark.parametrize("name", SETUPS)
def test_tiers_give_their_misses(exported, tmp_path, name):
    folder = write_golden(tmp_path / "run", serving=SERVING, tiers=SETUPS[name])
    found, records = exported(folder), read_lines(folder)
    for line, field in (
        ("missed in HBM (measured)", "missed_tokens"),
        ("found in HBM (measured)", "hit_tokens"),
    ):
        told = found.counter(line)
        for layer in range(3):
            of_layer = [one["kv_fetch"]["hbm"][field] for one in records if one["layer_id"] == layer]
            assert sum(told[f"layer {layer}"]) == sum(of_layer) > 0
    told = found.counter("bytes read")
    assert told
    for tier in ("local_pool", "remote_pool"):
        assert sum(told.get(tier, [])) == sum(one["kv_fetch"][tier]["bytes_read"] for one in records)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_and_door(exported, tmp_path, name):
    folder, kind = write_kind(tmp_path / "run", name), KINDS[name]
    found = exported(folder)
    assert found.requests().keys() == PROMPTS.keys()
    steps = found.slices(perfetto.STEPS)
    assert len(steps) == NUM_STEPS
    selecting = [layer for layer in kind.layers if layer.heads]
    assert len(found.counter("selected ids")) == len(selecting)
    assert len(found.counter("missed (LRU 2k, replayed)")) == len(selecting)
    if "timing" in kind.tells:
        assert found.told["time"] == "the run's clock"
        return
    what = "layerwise" if kind.door == "layerwise" else "decode"
    assert [(one["name"], one["ts"], one["dur"]) for one in steps] == [
        (what, 1000.0 * i, 1000.0) for i in range(NUM_STEPS)
    ]
    assert found.told["notes"] == ["nothing was timed: modelled time: 1 step = 1 ms"]
    named = [event["args"]["name"] for event in found.events if event["name"] == "process_name"]
    assert all(name.endswith("; modelled time: 1 step = 1 ms") for name in named) and len(named) == 2
    assert {event["dur"] for event in found.requests().values()} == {1000.0 * NUM_STEPS}


def test_a_simulated_run_has_requests_only(exported, tmp_path):
    flags = ["--runner", "simulator", "--burstgpt-generate", "--limit", "10", "--serving", "continuous"]
    (tmp_path / "bytes").mkdir()
    write_byte_tokenizer(tmp_path / "bytes")
    flags += ["--max-new-tokens-cap", "4", "--no-hub", "--tokenizer", str(tmp_path / "bytes")]
    assert run_burstgpt([*flags, "--trace-out", str(tmp_path / "run")]) == 0
    found = exported(tmp_path / "run")
    assert len(found.requests()) == 10 and not found.slices(perfetto.STEPS)
    assert found.told["time"] == "the run's clock, virtual"
    assert "no misses are drawn: " in found.said


def test_parquet_gives_the_same_bytes(golden, tmp_path, capsys):
    for to in ("parquet", "replay"):
        assert main(["export", str(golden), "--to", to, "--out", str(tmp_path / to / "run")]) == 0
    files = [
        (Exported(folder, tmp_path / f"{i}.json.gz", capsys), (tmp_path / f"{i}.json.gz").read_bytes())[1]
        for i, folder in enumerate(
            (golden, golden, tmp_path / "parquet" / "run", tmp_path / "replay" / "run")
        )
    ]
    assert len(set(files)) == 1


def test_more_steps_are_pooled_and_said(exported, golden, monkeypatch):
    whole = exported(golden)
    monkeypatch.setattr(timelines, "MOST_STEPS", 4)
    found = exported(golden)
    (note,) = found.told["notes"]
    assert note == "8 steps: drawn 2 to a slice, counters as their means"
    steps, single = found.slices(perfetto.STEPS), whole.slices(perfetto.STEPS)
    assert len(single) == 8 and [one["args"]["steps"] for one in steps] == [2, 2, 2, 2]
    for i, one in enumerate(steps):
        assert one["ts"] == single[2 * i]["ts"] and one["args"]["last_forward_idx"] == 2 * i + 1
        assert one["args"]["busy_us"] == pytest.approx(
            sum(each["args"]["busy_us"] for each in single[2 * i : 2 * i + 2]), abs=0.2
        )
    for line, values in whole.counter("bytes read").items():
        means = np.array(values).reshape(-1, 2).mean(axis=1)
        assert found.counter("bytes read")[line] == pytest.approx(means, abs=0.001)


def test_more_requests_are_a_counter(exported, golden, monkeypatch):
    monkeypatch.setattr(perfetto, "MOST_REQUESTS", 2)
    found = exported(golden)
    assert found.told["notes"] == ["3 requests, more than 2: only their counter is drawn"]
    assert not found.requests()
    running = [event["args"] for event in found.events if event["name"] == "requests" and event["ph"] == "C"]
    assert max(one["running"] for one in running) > 1 and running[-1] == {"running": 0.0, "waiting": 0.0}


def test_more_changes_than_points_are_said(exported, golden, monkeypatch):
    monkeypatch.setattr(perfetto, "MOST_POINTS", 3)
    found = exported(golden)
    assert found.told["notes"] == ["requests under way: 8 changes, shown 3 times, evenly apart"]
    assert len([one for one in found.events if one["name"] == "requests" and one["ph"] == "C"]) == 3


def test_a_large_run_stays_below_the_limit():
    """The most slices and lanes that can come of a run."""
    per_step, per_request = 1 + 6, 3 + 2
    most = per_step * timelines.MOST_STEPS + per_request * perfetto.MOST_REQUESTS + perfetto.MOST_POINTS
    assert most + 100 < perfetto.MOST_EVENTS


def test_sums_do_not_depend_on_the_order(monkeypatch):
    monkeypatch.setattr(timelines, "MOST_STEPS", 8)
    rng = np.random.default_rng(0)
    forward, values = rng.integers(0, 100, 500), rng.integers(0, 9, 500)
    expected = np.bincount(forward // 16, values, minlength=8)
    for order in (np.argsort(forward), np.argsort(-forward), rng.permutation(500)):
        sums = timelines.Sums()
        for rows in np.array_split(order, 7):
            sums.add("a", forward[rows], values[rows])
        assert sums.per_stretch == 16
        assert np.array_equal(sums["a"], expected) and not sums["b"].any()


def test_a_killed_run(exported, golden, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(golden, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"state": "running", "files": None}))
    lines = (folder / "trace_steps.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "trace_steps.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    requests = (folder / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "requests.jsonl").write_bytes(requests[0])
    found = exported(folder)
    states = {name: event["args"]["state"] for name, event in found.requests().items()}
    assert sorted(states.values()) == ["length", "unfinished", "unfinished"]
    assert states.keys() == {request.request_id for request in REQUESTS}
    (note,) = found.told["notes"]
    assert note.startswith("left out: trace_steps.jsonl: line ") and note.endswith("40 bytes, cut short")


def test_sampled_steps_have_their_place_and_no_misses(exported, tmp_path):
    folder = write_golden(tmp_path / "run", serving=SERVING, sample_rate=0.5)
    found = exported(folder)
    assert 0 < len(found.slices(perfetto.STEPS)) < 8
    assert "no misses are drawn: " in found.said and "a share of 0.5" in found.said
    assert not found.counter("missed")


def test_a_hostile_request_id_moves_no_cursor(exported, tmp_path):
    requests = [REQUESTS[0]._replace(request_id='</script>\x1b[2J"\u202e'), *REQUESTS[1:]]
    found = exported(write_golden(tmp_path / "run", requests))
    (name,) = (name for name in found.requests() if "script" in name)
    assert name == '</script>\\u001b[2J"\\u202e'


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (None, ["--to", "parquet", "--buffer", "2k"], "--buffer 2k: belongs to --to perfetto; leave it out"),
        (None, ["--to", "perfetto", "--buffer", "2q"], "--sizes 2q: use a number of ids"),
        (None, ["--to", "perfetto", "--buffer", "1"], "does not hold a step of 8; give at least 8"),
        ("tiers", ["--to", "perfetto", "--buffer", "2k"], "the run has tiers, whose misses were measured"),
        ("empty", ["--to", "perfetto"], "no step and no request was recorded"),
        ("late", ["--to", "perfetto"], "forward_idx 1073741824: no step of a run; see `dsatrace verify`"),
        ("there", ["--to", "perfetto"], "exists already and is never overwritten; name another with --out"),
    ],
)
def test_what_is_refused(golden, tmp_path, capsys, change, flags, said):
    folder, out = golden, tmp_path / "out.json.gz"
    if change == "tiers":
        folder = write_golden(tmp_path / "run", tiers=SETUPS["block"])
    elif change == "empty":
        folder = shutil.copytree(golden, tmp_path / "run")
        for name in ("trace_steps.jsonl", "requests.jsonl"):
            (folder / name).write_text("")
    elif change == "late":
        folder = shutil.copytree(golden, tmp_path / "run")
        records = read_lines(folder)
        write_lines(folder, [*records[:-1], records[-1] | {"forward_idx": 1 << 30}])
    elif change == "there":
        out.write_text("mine")
    error = told_error(capsys, lambda: main(["export", str(folder), *flags, "--out", str(out)]))
    assert said in error
    assert out.read_text() == "mine" if change == "there" else not out.exists()


def test_a_run_without_a_folder_to_write_to(golden, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--to", "perfetto", "--out", str(tmp_path / "file" / "out.json.gz")]
    assert "cannot write it: " in told_error(capsys, lambda: main(["export", str(golden), *flags]))


def test_the_usual_name(golden, tmp_path, monkeypatch):
    shutil.copytree(golden, tmp_path / "mine")
    assert main(["export", str(tmp_path / "mine"), "--to", "perfetto"]) == 0
    assert (tmp_path / "mine_trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_reading_does_not_grow_with_steps():
    """What is held of the records: sums of stretches, whatever the number of passes."""
    timeline = Timeline(Run(OPEN), buffers_of(RunReader(OPEN), "2k"))
    held = sum(sums.nbytes for sums in timeline.sums._sums.values())
    assert held == len(timeline.sums._sums) * 8 * timelines.MOST_STEPS
    assert len(timeline.sums._sums) == 3 * 4 + len(timelines.BYTES) + 3
