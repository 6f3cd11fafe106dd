"""`--share prefix`: whose blocks a request begins with, and one buffer per layer for those that do alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.commands.replay import main
from dsatrace.errors import UserError
from dsatrace.files import write_json
from dsatrace.kv.prefix import PrefixCacheAnalyzer
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE
from dsatrace.selection_replay.buffers import Member, buffers_of
from dsatrace.selection_replay.policies import misses
from dsatrace.selection_replay.prefixes import Beginning, Prefix, find_prefixes, span_of_blocks
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.streams import Recorded
from dsatrace.trace import selection_parts
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.export import export_run
from dsatrace.trace.kind import Layer, SelectionKind, engine_kind
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.selections import LayerSet
from dsatrace.trace.tracer import Tracer
from helpers.command_runs import told_error
from helpers.golden_run import GoldenRequest, read_lines, write_golden, write_lines
from helpers.kind_runs import LAYOUT, write_kind
from helpers.trace_samples import SECRET, SampleRequest, config_for

quickly = settings(max_examples=60, deadline=None)
BLOCK = 4

Prompts = Mapping[str, Sequence[int]]


@st.composite
def prompts(draw: st.DrawFn) -> Prompts:
    """Up to 7 prompts of blocks out of three, so that many begin alike; some are cut inside a block."""
    found = {}
    for number in range(draw(st.integers(1, 7))):
        blocks = draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=6))
        tokens = [token for token in blocks for _ in range(BLOCK)]
        found[f"r{number}"] = tokens[: len(tokens) - draw(st.integers(0, BLOCK - 1))]
    return found


def told(prompts: Prompts, key_tokens: int) -> dict[str, Prefix]:
    """What a run of these prompts lets a reader find."""
    analyzer = PrefixCacheAnalyzer(BLOCK, key_tokens, secret=SECRET)
    beginnings = []
    for name, prompt in prompts.items():
        prefix = analyzer.add(prompt)
        shared = prefix.num_cached_blocks * BLOCK
        beginnings.append(Beginning(name, prefix.key, shared, len(prompt), len(prompt)))
    return find_prefixes(beginnings, key_tokens, BLOCK)


@quickly
@given(prompts(), st.integers(1, 30))
def test_what_is_told_is_true(prompts: Prompts, key_tokens: int) -> None:
    """Each told block is its owner's, who came earlier; and what is untold is shared, too."""
    analyzer = PrefixCacheAnalyzer(BLOCK, secret=SECRET)
    for name, prefix in told(prompts, key_tokens).items():
        num_shared = analyzer.add(prompts[name]).num_cached_blocks
        assert prefix.shared_tokens + prefix.untold == num_shared * BLOCK
        for end, owner in prefix.spans:
            assert list(prompts[owner][:end]) == list(prompts[name][:end])
            assert list(prompts).index(owner) < list(prompts).index(name)
        assert sorted(prefix.spans) == list(prefix.spans)
        assert prefix.group == (prefix.spans[0][1] if prefix.spans else name)


@quickly
@given(prompts())
def test_short_keys_tell_all_of_two_levels(prompts: Prompts) -> None:
    """A key of one block tells the rest apart where requests that share more share it with one prompt."""
    cut = {name: prompt[: 2 * BLOCK] for name, prompt in prompts.items()}
    assert all(prefix.untold == 0 or len(cut) > 2 for prefix in told(cut, BLOCK).values())
    same = {name: [*([7] * 3 * BLOCK), number] for number, name in enumerate(prompts)}
    for name, prefix in told(same, BLOCK).items():
        assert prefix.spans == (() if name == "r0" else ((3 * BLOCK, "r0"),)) and prefix.untold == 0


def test_who_shares_with_whom_may_be_untold() -> None:
    """r3 shares two blocks, which r1 and r2 have, each its own: the first is r0's in both."""
    one, two, three = [1] * BLOCK, [2] * BLOCK, [3] * BLOCK
    prompts = {"r0": one, "r1": one + two, "r2": one + three, "r3": one + three}
    assert told(prompts, BLOCK)["r3"] == Prefix("r0", ((BLOCK, "r0"),), BLOCK)
    assert told(prompts, 2 * BLOCK)["r3"] == Prefix("r0", ((BLOCK, "r0"), (2 * BLOCK, "r2")), 0)


def test_a_request_without_records_may_be_the_one() -> None:
    """It was announced, so later prompts were compared with it; nobody knows what it began with."""
    silent = Beginning("r1", None, 0, 8, 8)
    beginnings = [Beginning("r0", "a", 0, 8, 8), Beginning("r2", "b", 8, 12, 12)]
    assert find_prefixes(beginnings, 16, BLOCK)["r2"].spans == ((8, "r0"),)
    assert find_prefixes([silent, *beginnings], 16, BLOCK)["r2"] == Prefix("r2", (), 8)


def test_a_cached_answer_may_be_the_beginning() -> None:
    """Of a prompt of 4 tokens and its answer of 8; the longer prompt's key is of other tokens."""
    beginnings = [
        Beginning("r0", "a", 0, 4, 12),
        Beginning("r1", "b", 0, 12, 12),
        Beginning("r2", "c", 12, 16, 16),
    ]
    assert find_prefixes(beginnings, 8, BLOCK)["r2"].spans == ((12, "r0"),)


@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 7), st.integers(0, 12))
def test_a_block_is_shared_as_a_whole(lengths: list[int], block: int, num_blocks: int) -> None:
    """Of whatever size: it is of the span in which it ends."""
    ends = list(itertools.accumulate(length * BLOCK for length in lengths))
    spans = tuple((end, f"r{i}") for i, end in enumerate(ends))
    found = span_of_blocks(spans, num_blocks, block).tolist()
    for at, span in enumerate(found):
        assert span == next((i for i, end in enumerate(ends) if (at + 1) * block <= end), len(ends))


TOKENS = Recorded(engine_kind(1, 4), 1, 656, 132)
SHARED = ReplaySettings(block=BLOCK, share="prefix", policies=("lru",))


@quickly
@given(prompts(), st.data())
def test_a_shared_buffer_is_asked_in_turn(prompts: Prompts, data: st.DataObject) -> None:
    """Against sets of blocks that are named by their owners, taken in the order of the forward passes."""
    prefixes = told(prompts, BLOCK)
    group = prefixes["r0"].group
    names = [name for name, prefix in prefixes.items() if prefix.group == group]
    members, plain = [], []
    for place, name in enumerate(names):
        num_blocks = len(prompts[name]) // BLOCK + 1  # and one of its answer
        begin, num_steps = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
        num_warm = data.draw(st.integers(0, num_steps))
        ids = st.lists(st.integers(0, num_blocks - 1), unique=True, min_size=1, max_size=3)
        sets = [data.draw(ids) for _ in range(num_steps)]
        when = np.arange(begin, begin + num_steps)
        steps = Steps.of(sets, [num_blocks - 1] * num_steps, [num_blocks] * num_steps, num_warm)
        steps = Steps(steps.ids, steps.ptr, steps.newest, steps.visible, steps.num_ids, num_warm, when)
        members.append([Member(name, LayerSet(0), "0", steps, prefixes[name])])
        spans = prefixes[name].spans
        for step, one in enumerate(sets):
            content = [
                (next((owner for end, owner in spans if (block + 1) * BLOCK <= end), name), block)
                for block in one
            ]
            plain.append((begin + step, place, content, step >= num_warm))
    (buffer,) = buffers_of(members, TOKENS, SHARED)
    asked, num_ids = buffer.asked_for([member.steps for member in buffer.members])
    plain.sort(key=lambda one: one[:2])
    known: dict[int, tuple[str, int]] = {}
    for step, (_, _, content, is_counted) in enumerate(plain):
        assert asked.counted[step] == is_counted
        for id_, block in zip(asked.of_step(step).tolist(), content, strict=True):
            assert known.setdefault(id_, block) == block
    assert len(set(known.values())) == len(known), "two ids are two blocks"
    size = max(len(content) for _, _, content, _ in plain) + 1
    assert misses(asked, "fifo", size).misses.tolist() == plain_fifo([one[2] for one in plain], size)
    at_once = max(sum(one[0] == when for one in plain) for when in {one[0] for one in plain})
    assert buffer.top_k >= 4 * at_once, "room for all that run together"
    assert num_ids >= len(known)


def plain_fifo(sets: Sequence[Sequence[Any]], size: int) -> list[int]:
    held: list[Any] = []
    found = []
    for one in sets:
        missed = [block for block in one if block not in held]
        victims = [block for block in held if block not in one][: max(0, len(held) + len(missed) - size)]
        held = [block for block in held if block not in victims] + missed
        found.append(len(missed))
    return found


def test_room_is_for_those_that_run_together() -> None:
    def members(*begins: int) -> list[list[Member]]:
        steps = [Steps.of([[0], [1]]) for _ in begins]
        alike = Prefix("r0", (), 0)
        return [
            [Member(f"r{i}", LayerSet(0), "0", Steps(*_fields(one), np.array([begin, begin + 1])), alike)]
            for i, (one, begin) in enumerate(zip(steps, begins, strict=True))
        ]

    def room(*begins: int) -> int:
        (buffer,) = buffers_of(members(*begins), TOKENS, SHARED)
        return buffer.top_k // 4

    assert room(0) == 1 and room(0, 2, 4) == 1 and room(0, 1, 2) == 2 and room(0, 0, 1, 9) == 3


def _fields(steps: Steps) -> tuple[Any, ...]:
    return steps.ids, steps.ptr, steps.newest, steps.visible, steps.num_ids, steps.num_warm


NUM_STEPS, TOP_K = 9, 8
KIND = SelectionKind(layers=(Layer(TOP_K), Layer(TOP_K)), door="attach", missing=("scores", "tiers"))
BEGINS = {"a0": 0, "b0": 0, "a1": 3, "b1": 4, "a2": 5, "c0": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents of 24 and 16 tokens, asked about by three requests and two; one request is alone."""
    beginnings = {"a": [1] * 24, "b": [2] * 16, "c": [3] * 30}
    requests = [
        SampleRequest(name, beginnings[name[0]] + [10 + number] * 9) for number, name in enumerate(BEGINS)
    ]
    folder = tmp_path_factory.mktemp("shared") / "run"
    info = RunInfo(
        model_config={"name": "shared"}, layouts=(LAYOUT,), device="cpu", selections="synthetic", kind=KIND
    )
    config = config_for(folder, block_size=BLOCK, compared_block_sizes=(BLOCK,), prefix_key_tokens=8)
    rng = np.random.default_rng(0)
    with Tracer(config, info, secret=SECRET) as tracer:
        for request in requests:
            tracer.add_request(request)
        for forward in range(max(BEGINS.values()) + NUM_STEPS):
            running = [one for one in requests if 0 <= forward - BEGINS[one.request_id] < NUM_STEPS]
            steps = [forward - BEGINS[one.request_id] for one in running]
            lengths = [len(one.prompt_token_ids) + step + 1 for one, step in zip(running, steps, strict=True)]
            ids = [[rng.choice(length, TOP_K, replace=False) for length in lengths] for _ in range(2)]
            names = tuple(one.request_id for one in running)
            tracer.put(
                StepCapture(
                    phase="decode",
                    request_ids=names,
                    step_idx=tuple(steps),
                    seq_len=np.array(lengths, np.int32),
                    batch_size=len(names),
                    positions=np.array(ids, np.int32),
                    score_stats=None,
                    scores=None,
                    prefixes=tracer.prefixes(names),
                    forward_idx=forward,
                    step_wall_us=1.0,
                    step_synced=True,
                )
            )
        for request in requests:
            tracer.finish_request(request, RequestFacts(num_output_tokens=NUM_STEPS + 1, state="length"))
    return folder


FLAGS = ("--unit", f"block:{BLOCK}", "--share", "prefix", "--policy", "lru,fifo,opt", "--no-figure")
SIZES = "32,4k,75%"


def replayed(run: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main([str(run), *FLAGS, "--sizes", SIZES, "--out", str(out), *flags]) == 0
    record: dict[str, Any] = json.loads((out / "replay.json").read_bytes())
    return record


def test_a_run_misses_what_a_plain_buffer_per_document_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = replayed(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "3 of 6 begin with 64 tokens of others" in said.replace("\n", " ")
    assert "no intervals: they need five groups of requests" in said
    assert record["num_requests"] == 6 and record["num_groups"] == 3
    sums = record["sums"]
    for layer in (0, 1):
        missed = selected = 0
        for document in "abc":
            sets, is_counted, length = [], [], {"a": 24, "b": 16, "c": 0}[document]
            for one in RunReader(run).steps():
                if one["layer_id"] != layer or one["request_id"][0] != document:
                    continue
                blocks = dict.fromkeys(position // BLOCK for position in one["selected_token_pos"])
                shared = [
                    ("all" if (block + 1) * BLOCK <= length else one["request_id"], block) for block in blocks
                ]
                sets.append(shared)
                is_counted.append(one["step_idx"] > 0)
            for step, count in enumerate(plain_fifo(sets, 32 // BLOCK)):
                missed += count * is_counted[step]
                selected += len(sets[step]) * is_counted[step]
        cell = sums["buffers"][str(layer)]["run"]["policies"]["fifo"]["32"]
        assert (cell["missed"], cell["selected"]) == (missed, selected) and 0 < missed < selected
        assert cell["steps"] == 6 * (NUM_STEPS - 1) and cell["buffers"] == 3
    apart = replayed(run, tmp_path / "apart", "--share", "none")
    large = [one["overall"]["policies"]["opt"]["4k"]["miss_rate"] for one in (record, apart)]
    assert large[0] < large[1], "what one request has fetched the next one finds"


def test_sizes_are_for_those_that_run_together(run: Path, tmp_path: Path) -> None:
    sums = replayed(run, tmp_path)["sums"]["buffers"]["0"]["run"]["policies"]["lru"]
    assert sums["4k"]["ids"] == (3 + 2 + 1) * 4 * TOP_K // BLOCK
    blocks = [6 + 3 * 5, 4 + 2 * 5, 12]  # that the last steps could choose from
    assert sums["75%"]["ids"] == sum(-(-block * 3 // 4) for block in blocks)


def test_parts_shards_and_layouts_give_one_result(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that share stay together, in whatever file they lie."""
    whole = replayed(run, tmp_path / "whole")
    monkeypatch.setattr(selection_parts, "MIN_PARTS", 1 << 40)
    monkeypatch.setattr(selection_parts, "MIN_PART_BYTES", 1)
    monkeypatch.setattr("dsatrace.trace.parquet.replay_layout.FILE_BYTES", 1)
    export_run(RunReader(run), "replay", tmp_path / "laid out" / "run")
    for folder in (run, tmp_path / "laid out" / "run"):
        outs = [tmp_path / f"{folder.parent.name} {shard}" for shard in range(2)]
        for shard, out in enumerate(outs):
            replayed(folder, out, "--shard", f"{shard}/2")
            assert len(list((out / "parts").iterdir())) == 2 - shard
        merged = tmp_path / f"{folder.parent.name} merged"
        assert main(["merge", *map(str, outs), "--no-figure", "--out", str(merged)]) == 0
        assert json.loads((merged / "replay.json").read_bytes()) == whole


def test_what_is_untold_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [GoldenRequest(f"r{i}", 40 + i, 6, cached_blocks=[0, 0, 7][i]) for i in range(3)]
    record = replayed(write_golden(tmp_path / "run", requests), tmp_path / "out")
    assert record["shared_prefixes"] == {"requests": 0, "tokens": 0, "untold": 28}
    said = " ".join(capsys.readouterr().out.split())
    assert "28 more are some other request's too" in said and "--trace-prefix-key-tokens" in said


def test_a_request_whose_steps_do_not_count_still_fills_the_buffer(tmp_path: Path) -> None:
    """r0 has one step, and r2 none; r1 finds what r0 has fetched."""
    requests = [GoldenRequest(f"r{i}", 40 + i, 9, cached_blocks=[0, 9, 9][i]) for i in range(3)]
    run = write_golden(tmp_path / "run", requests)
    lines = read_lines(run, REQUESTS_FILE)
    for line in lines:
        line["answer_tokens"] = {"r0": 1, "r1": 7, "r2": 0}[line["request_id"]]
    write_lines(run, lines, REQUESTS_FILE)
    manifest = json.loads((run / MANIFEST_FILE).read_bytes())
    write_json(run / MANIFEST_FILE, manifest | {"answer_end": {"min_new_tokens": 0, "ignore_eos": True}})
    flags = ("--steps", "answer", "--start", "first-set")
    together, apart = (
        replayed(run, tmp_path / share, *flags, "--share", share) for share in ("prefix", "none")
    )
    assert together["num_requests"] == apart["num_requests"] == 1 and together["num_groups"] == 1
    assert together["sums"]["locality"] == apart["sums"]["locality"]
    for layer, streams in together["sums"]["buffers"].items():
        cells = [
            one["policies"]["lru"]["4k"] for one in (streams["run"], apart["sums"]["buffers"][layer]["run"])
        ]
        assert cells[0]["selected"] == cells[1]["selected"] and cells[0]["missed"] <= cells[1]["missed"]


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("two heads", [], "requests share blocks, and its unit is token; add --unit block:8"),
        ("uneven layers", ["--unit", "block:8"], "say nothing of prefixes"),
        ("slots", [], "say nothing of prefixes"),
        ("expert", [], "say nothing of prefixes"),
        ("block", ["--policy", "lru,window"], "--policy window with --share prefix"),
        ("block", ["--policy", "sglang"], "--policy sglang with --share prefix"),
        ("block", ["--start", "first-b"], "--start first-b with --share prefix"),
        (
            "block",
            ["--link", "pcie5-x16", "--compute-us", "9"],
            "--link with --share prefix",
        ),
    ],
)
def test_what_cannot_share_is_named(
    kind: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_kind(tmp_path / "run", kind)
    given = [str(run), "--share", "prefix", "--out", str(tmp_path / "out"), "--no-figure", *flags]
    assert said in " ".join(told_error(capsys, lambda: main(given)).split())


def test_records_without_prefixes_are_named(tmp_path: Path) -> None:
    from dsatrace.selection_replay.work import find_work

    run = write_golden(tmp_path / "run", [GoldenRequest("r0", 40, 6)])
    path = run / "trace_steps.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"prefix_key"', b'"other_key"'))
    with pytest.raises(UserError, match="its records say nothing of prefixes"):
        find_work([run], ReplaySettings(block=4, share="prefix", policies=("lru",), sizes=parse_sizes("9k")))


def test_blocks_of_a_block_run_are_shared(tmp_path: Path) -> None:
    """Its unit is a block already, of 12 tokens: the first lies in the 16 that both prompts begin with."""
    run = write_kind(tmp_path / "run", "block")
    assert (
        main(
            [
                str(run),
                "--share",
                "prefix",
                "--policy",
                "lru",
                "--out",
                str(tmp_path / "out"),
                "--no-figure",
            ]
        )
        == 0
    )
    record = json.loads((tmp_path / "out" / "replay.json").read_bytes())
    assert record["shared_prefixes"] == {"requests": 1, "tokens": 16, "untold": 0}
    assert record["num_requests"] == 2 and record["num_groups"] == 1
