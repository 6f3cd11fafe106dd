"""`--min-new-tokens` and `--ignore-eos`: answers that go on past their end, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import INFERENCE, ROOT
from dsatrace.commands import chat as chat_command
from dsatrace.commands.generate import main as generate
from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.commands.run_dataset import main as run_dataset
from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.ending import EndSettings
from dsatrace.engine.engine import Engine
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Scheduler
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import open_simulator, replay
from dsatrace.files import write_json
from dsatrace.model.convert import convert_checkpoint
from dsatrace.report.workload_tables import workload_tables
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.sampler import Sampler
from dsatrace.schema import MANIFEST_FILE, REQUEST_FIELDS, REQUESTS_FILE, SUMMARY_FILE, problems
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_totals import RequestTotals
from dsatrace.trace.summarize import sum_runs, summarize_runs
from dsatrace.trace.summed_runs import Shard, merge_shards, write_shard
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.requests import PlainRequests
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request
from helpers.command_runs import runs_below, told_error
from helpers.golden_run import read_lines, write_golden, write_lines
from helpers.models import SMALL, random_model, random_tokens
from helpers.ranks import on_ranks

BLOCK, CHUNK, NUM_NEW = 16, 32, 12
NEEDLE = ROOT / "data" / "models" / "needle-2k"
SIMULATED = ("--runner", "simulator", "--no-hub", "--save-text", "--tokenizer", str(NEEDLE))
RULER = ("--dataset", "ruler", "--ruler-generate", "--ruler-length", 500, *SIMULATED)


# ---- tokens


@pytest.fixture(scope="module")
def model():
    return random_model(dataclasses.replace(SMALL, dtype="fp64"))


def served(model, end: EndSettings, stops: frozenset[int], temperature: float = 0.0) -> list[LiveRequest]:
    """Three requests in one batch."""
    pool = new_pool(64, BLOCK, False)
    sampler = Sampler(3, stops, end.min_new_tokens)
    runner = ModelRunner(model, model.new_cache(64, BLOCK), sampler)
    engine = Engine(Scheduler(pool, 8, CHUNK, stops, end=end), runner, run=RunSettings(end=end))
    live = [
        engine.submit(Request(f"r{i}", tuple(random_tokens(n, model.args, i)), NUM_NEW, temperature))
        for i, n in enumerate((70, 20, 41))
    ]
    for _ in engine.run():
        pass
    return live


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_up_to_the_end_are_those_of_a_run_without_the_flags(model, temperature: float) -> None:
    endless = [one.answer for one in served(model, EndSettings(), frozenset(), temperature)]
    in_no_logits = model.args.vocab_size + 5
    stops = frozenset({endless[0][4], endless[1][2], in_no_logits})
    ends = [next((i for i, token in enumerate(answer) if token in stops), None) for answer in endless]
    assert ends[0] is not None and ends[1] is not None and 0 < min(ends[0], ends[1]) < NUM_NEW - 2

    plain = served(model, EndSettings(), stops, temperature)
    ignored = served(model, EndSettings(ignore_eos=True), stops, temperature)
    later = served(model, EndSettings(min_new_tokens=10), stops, temperature)
    for answer, end, one, whole, longer in zip(endless, ends, plain, ignored, later, strict=True):
        if end is None:
            assert one.answer == whole.answer == longer.answer == answer
            continue
        assert (one.state, one.answer, one.past_answer) == ("stop", answer[: end + 1], [])
        assert (whole.state, whole.generated) == ("length", answer)
        assert (whole.answer, whole.past_answer[0]) == (answer[:end], answer[end])
        assert longer.answer == longer.generated[: longer.answer_end] == answer[:end]
        assert stops.isdisjoint(longer.generated[:10])
        assert longer.state == "length" or longer.generated[-1] in stops


def test_the_next_best_token_takes_the_place_of_the_end() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 4.0], [0.0, 9.0, 3.0, 1.0]])
    young, old = (LiveRequest.of(Request(name, (0,), 9)) for name in "ab")
    old.tokens += [2] * 6
    assert Sampler(0, frozenset({1, 3}), 4)(logits, [young, old]) == [2, 1]
    assert (young.answer_end, old.answer_end) == (0, None)
    assert Sampler(0, frozenset({1, 3}))(logits, [young, old]) == [1, 1]
    assert logits[0, 1] == 5.0  # the logits are the model's, and stay so


def test_the_score_is_of_the_answer_alone(tmp_path: Path) -> None:
    said = []
    run = RunSettings(
        stop_tokens=frozenset({0}),
        end=EndSettings(min_new_tokens=8),
        judge=lambda live: said.append(live.answer) or 1.0,
        answer_text=bytes,
    )
    with open_simulator(EngineSettings(), run, replay({"a": [5, 6], "b": range(1, 12)})) as engine:
        short, long = (engine.submit(Request(name, (7,), 20)) for name in "ab")
        for _ in engine.run():
            pass
    assert said == [[5, 6], list(range(1, 12))]
    assert (short.generated, short.state) == ([5, 6] * 4 + [0], "stop")
    assert long.generated == [*range(1, 12), 0]


# ---- the simulator


def test_the_simulator_says_its_answer_again(tmp_path: Path) -> None:
    flags = ("--limit", 2, "--max-new-tokens", 24)
    run = runs_below(tmp_path, run_dataset, *RULER, *flags)
    stopped, longer, whole = run(), run("--min-new-tokens", 20), run("--ignore-eos")
    for folder in (stopped, longer, whole):
        assert verify(folder).state == "complete"
    plain = {line["request_id"]: line for line in read_lines(stopped, REQUESTS_FILE)}
    assert not any("answer_tokens" in line for line in plain.values())
    assert "past_answer" not in RunReader(stopped).summary()
    assert "answer_end" not in RunReader(stopped).manifest
    for folder, num_tokens, state in ((longer, 21, "stop"), (whole, 24, "length")):
        for line in read_lines(folder, REQUESTS_FILE):
            before = plain[line["request_id"]]
            assert problems(line, "full", REQUEST_FIELDS) == []
            assert (line["num_output_tokens"], line["state"]) == (num_tokens, state)
            assert line["answer_tokens"] == before["num_output_tokens"] - 1  # without the end of sequence
            assert (line["text"], line["score"]) == (before["text"], 100.0)
            assert line["text_past_answer"].startswith(before["text"][:10])
    past = RunReader(longer).summary()["past_answer"]
    answered = sum(line["num_output_tokens"] - 1 for line in plain.values())
    assert past == {"requests": 2, "decode_steps": 40, "past_steps": 40 - answered}
    assert RunReader(longer).manifest["answer_end"] == {"min_new_tokens": 20, "ignore_eos": False}
    assert summarize_runs([longer])["past_answer"] == past


def test_a_logged_length_is_an_answers_length(tmp_path: Path) -> None:
    run = runs_below(tmp_path, run_burstgpt, "--burstgpt-generate", "--limit", 12, *SIMULATED)
    plain = run()
    for flags in (("--ignore-eos",), ("--min-new-tokens", 1000)):
        folder = run(*flags)
        assert verify(folder).state == "complete"
        pairs = zip(read_lines(folder, REQUESTS_FILE), read_lines(plain, REQUESTS_FILE), strict=True)
        for line, before in pairs:
            assert line.pop("answer_tokens") == line["num_output_tokens"]
            assert line == before
        assert RunReader(folder).summary()["past_answer"]["past_steps"] == 0


# ---- a model that ends its answers


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needle")
    for ranks in (1, 2):
        convert_checkpoint(NEEDLE, folder / f"mp{ranks}", 4, model_parallel=ranks)
    config = (NEEDLE / "serving_config.json").read_text().replace('"fp32"', '"fp64"')
    (folder / "config.json").write_text(config)
    flags = ("--tokenizer", str(NEEDLE), "--tokens", "300", "--seed", "3")
    subprocess.run(
        [sys.executable, "-m", "dsatrace", "needle", *flags, "--out", str(folder / "prompt.txt")],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(INFERENCE)},
    )
    return folder


def asked(needle: Path, ranks: int = 1) -> list[object]:
    flags: list[object] = ["--ckpt-path", needle / f"mp{ranks}", "--config", needle / "config.json"]
    return [
        *flags,
        "--input-file",
        needle / "prompt.txt",
        "--temperature",
        0,
        "--device",
        "cpu",
        "--save-text",
    ]


def test_what_follows_the_answer_is_told_apart(
    needle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs_below(tmp_path, generate, *asked(needle), "--max-new-tokens", 9)
    stopped, longer, whole = run(), run("--min-new-tokens", 8), run("--ignore-eos")
    (plain,), (later,), (on,) = (read_lines(folder, REQUESTS_FILE) for folder in (stopped, longer, whole))
    assert (plain["text"], plain["state"]) == ("721429", "stop")
    assert later["text"] == on["text"] == "721429"
    assert later["answer_tokens"] == on["answer_tokens"] == plain["num_output_tokens"] - 1
    assert len(later["text_past_answer"]) > 0
    out = capsys.readouterr().out
    assert out.count("[r0] 721429\n") == 3
    assert f"[r0, past its answer] {later['text_past_answer']}\n" in out
    kept = ("step_idx", "layer_id", "selected_token_pos")
    records = [
        [[record[name] for name in kept] for record in RunReader(folder).steps()]
        for folder in (stopped, longer, whole)
    ]
    num_same = (later["answer_tokens"]) * 4
    assert len(records[0]) == num_same and len(records[1]) == (later["num_output_tokens"] - 1) * 4
    assert records[1][:num_same] == records[2][:num_same] == records[0]
    for folder in (longer, whole):
        assert verify(folder).num_records == len(list(RunReader(folder).steps()))


def test_two_ranks_go_on_alike(needle: Path, tmp_path: Path) -> None:
    flags = ("--max-new-tokens", 9, "--min-new-tokens", 8)
    assert generate([str(x) for x in (*asked(needle), *flags, "--trace-out", tmp_path / "one")]) == 0
    two = (*asked(needle, ranks=2), *flags, "--trace-out", tmp_path / "two")
    done = on_ranks(2, "generate", two, tmp_path / "said")
    assert done.returncode == 0, done.stderr
    kept = ("num_output_tokens", "answer_tokens", "state", "text", "text_past_answer")
    lines = [read_lines(tmp_path / name, REQUESTS_FILE) for name in ("one", "two")]
    assert [[line[name] for name in kept] for line in lines[0]] == [
        [line[name] for name in kept] for line in lines[1]
    ]
    assert lines[1][0]["answer_tokens"] < lines[1][0]["num_output_tokens"] - 1
    assert verify(tmp_path / "two").state == "complete"


def test_a_chat_marks_where_its_answer_ended(capsys: pytest.CaptureFixture[str]) -> None:
    run = RunSettings(stop_tokens=frozenset({0}), end=EndSettings(min_new_tokens=5))
    stream = SimpleNamespace(push=lambda token: f"<{token}>", flush=lambda: "")
    with open_simulator(EngineSettings(), run, replay({"r0": [5, 6]})) as engine:
        chat: Any = SimpleNamespace(
            chat=SimpleNamespace(
                tokenizer=SimpleNamespace(stream=lambda: stream), stop_tokens=run.stop_tokens
            ),
            is_rank_0=True,
            max_new_tokens=9,
            temperature=0.0,
        )
        live = chat_command._answer(chat, engine, [7], 0)
    assert live.answer == [5, 6]
    assert capsys.readouterr().out == "<5><6>\n[past its answer] <5><6><5>\n"


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--min-new-tokens", 9, "--max-new-tokens", 8), "--min-new-tokens 9 is above --max-new-tokens 8; "),
        (
            ("--min-new-tokens", 129),
            "--min-new-tokens 129 is above the 128 new tokens of niah_single_1; give",
        ),
        (("--ruler-task", "niah_single_1,vt", "--min-new-tokens", 31), "is above the 30 new tokens of vt; "),
        (("--min-new-tokens", -1), "--min-new-tokens -1: use at least 0"),
    ],
)
def test_a_least_length_above_the_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], why: str
) -> None:
    argv = [str(x) for x in (*RULER, "--limit", 2, "--trace-out", tmp_path / "run", *flags)]
    assert why in told_error(capsys, lambda: run_dataset(argv))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["longbenchv2", "sharegpt"])
def test_a_data_sets_own_most(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    argv = ["--dataset", name, *SIMULATED, "--min-new-tokens", "129", "--trace-out", str(tmp_path / "run")]
    assert f"above the 128 new tokens of {name}; give" in told_error(capsys, lambda: run_dataset(argv))


def test_generate_refuses_it_too(needle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(x) for x in (*asked(needle), "--min-new-tokens", 201)]
    assert "201 is above --max-new-tokens 200" in told_error(capsys, lambda: generate(argv))


def test_a_resume_goes_on_with_the_same_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--limit", 3, "--max-new-tokens", 24, "--min-new-tokens", 20)
    folder = runs_below(tmp_path, run_dataset, *RULER, *flags)()
    whole = {line["request_id"]: line for line in read_lines(folder, REQUESTS_FILE)}
    manifest = RunReader(folder).manifest
    write_json(folder / MANIFEST_FILE, manifest | {"state": "incomplete", "files": None})
    write_lines(folder, read_lines(folder, REQUESTS_FILE)[:1], REQUESTS_FILE)
    for other in (["--min-new-tokens", "8"], ["--ignore-eos"]):
        said = told_error(capsys, lambda other=other: run_dataset(["--resume", str(folder), *other]))
        assert "cannot resume: answer_end." in said
        assert "give the same --min-new-tokens and --ignore-eos" in said
    assert run_dataset(["--resume", str(folder)]) == 0
    assert verify(folder).state == "complete"
    for line in read_lines(folder, REQUESTS_FILE):
        assert line["answer_tokens"] == whole[line["request_id"]]["answer_tokens"]


def test_a_run_that_ended_its_answers_does_not_resume_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs_below(tmp_path, run_dataset, *RULER, "--limit", 2)()
    write_json(folder / MANIFEST_FILE, RunReader(folder).manifest | {"state": "incomplete", "files": None})
    said = told_error(capsys, lambda: run_dataset(["--resume", str(folder), "--ignore-eos"]))
    assert "cannot resume: answer_end was None and is {" in said


# ---- what verify says


Spoil = Callable[[dict[str, Any], dict[str, Any], list[dict[str, Any]]], object]


@pytest.fixture(params=("full", "blocks", "stats"))
def thin(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return _golden(tmp_path / "run", request.param)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return _golden(tmp_path / "run", "full")


def _golden(folder: Path, level: str) -> Path:
    """A run with `--min-new-tokens 3`: r1 stops by itself, r0 and r2 have gone on past their answers."""
    write_golden(folder, level=level)
    lines = read_lines(folder, REQUESTS_FILE)
    for line in lines:
        line["answer_tokens"] = {"r0": 1, "r1": 3, "r2": 2}[line["request_id"]]
    assert lines[0]["request_id"] == "r1"
    lines[0]["state"] = "stop"
    write_lines(folder, [_in_order(line) for line in lines], REQUESTS_FILE)
    manifest = RunReader(folder).manifest
    trace = {name: manifest.pop(name) for name in list(manifest)[list(manifest).index("trace") :]}
    ends = {"answer_end": {"min_new_tokens": 3, "ignore_eos": False}}
    write_json(folder / MANIFEST_FILE, manifest | ends | trace)
    write_json(folder / SUMMARY_FILE, summarize_runs([folder]))
    return folder


def _in_order(line: dict[str, Any]) -> dict[str, Any]:
    return {field.name: line[field.name] for field in REQUEST_FIELDS if field.name in line}


def spoilt(folder: Path, spoil: Spoil) -> Mismatch:
    manifest, summary = RunReader(folder).manifest, RunReader(folder).summary()
    lines = read_lines(folder, REQUESTS_FILE)
    spoil(manifest, summary, lines)
    write_json(folder / MANIFEST_FILE, manifest)
    write_json(folder / SUMMARY_FILE, summary)
    write_lines(folder, [_in_order(line) for line in lines], REQUESTS_FILE)
    with pytest.raises(Mismatch) as caught:
        verify(folder)
    return caught.value


def test_a_run_past_its_answers_is_verified(golden: Path) -> None:
    assert verify(golden).state == "complete"
    lines = {line["request_id"]: line for line in read_lines(golden, REQUESTS_FILE)}
    past = sum(max(line["num_output_tokens"] - 1 - line["answer_tokens"], 0) for line in lines.values())
    assert RunReader(golden).summary()["past_answer"]["past_steps"] == past > 0


def test_the_answers_recall_ends_with_it(thin: Path) -> None:
    """Of r2's 5 decode steps in 3 layers, 2 say its answer, at every level and in a sum of shards too."""
    summary = RunReader(thin).summary()
    told = [summary[name] for name in ("needle_recall", "needle_recall_past")]
    shares: list[list[float]] = [[], []]
    for record in RunReader(thin).steps():
        if record["request_id"] == "r2" and record["phase"] == "decode":
            shares[record["step_idx"] >= 2].append(record["needle"]["selected"] / record["needle"]["tokens"])
    num_layers = len(told[0]["per_layer"])
    assert [len(found) for found in shares] == [2 * num_layers, 3 * num_layers]
    for recall, found in zip(told, shares, strict=True):
        assert (recall["records"], recall["mean"]) == (len(found), pytest.approx(sum(found) / len(found)))
    assert verify(thin).state == "complete"
    shard = thin.parent / "0.json"
    write_shard(shard, sum_runs([thin], [""]), Shard(0, 1, ("run",)))
    merged, _ = merge_shards([shard])
    assert [merged[name] for name in ("needle_recall", "needle_recall_past")] == told


def test_an_older_run_pools_both(golden: Path) -> None:
    summary = RunReader(golden).summary()
    parts = [summary["needle_recall"], summary.pop("needle_recall_past")]
    count = sum(part["records"] for part in parts)
    pooled = {
        name: sum(part[name] * part["records"] for part in parts) / count for name in ("mean", "random_mean")
    }
    layers = zip(*(part["per_layer"] for part in parts), strict=True)
    share = parts[0]["records"] / count
    pooled["per_layer"] = [said * share + past * (1 - share) for said, past in layers]
    write_json(golden / SUMMARY_FILE, summary | {"needle_recall": {"records": count, **pooled}})
    assert verify(golden).state == "complete"
    (grid,) = (grid for grid in workload_tables(RunReader(golden).summary()) if "tokens that" in grid.title)
    past = summary["past_answer"]
    assert f"{past['past_steps']} of {past['decode_steps']} steps past the answers among them" in grid.title


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda manifest, summary, lines: lines[1].update(answer_tokens=7), "answer_tokens"),
        (lambda manifest, summary, lines: lines[1].update(answer_tokens=-1), "answer_tokens"),
        (lambda manifest, summary, lines: lines[1].pop("answer_tokens"), "answer_tokens"),
        (lambda manifest, summary, lines: lines[0].update(answer_tokens=4), "answer_tokens"),
        (lambda manifest, summary, lines: manifest.pop("answer_end"), "answer_tokens"),
        (
            lambda manifest, summary, lines: manifest["answer_end"].update(min_new_tokens=4),
            "num_output_tokens",
        ),
        (lambda manifest, summary, lines: manifest["answer_end"].update(ignore_eos=True), "state"),
        (lambda manifest, summary, lines: manifest["answer_end"].update(min_new_tokens=0), "answer_end"),
        (lambda manifest, summary, lines: summary["past_answer"].update(past_steps=0), "past_answer"),
        (lambda manifest, summary, lines: summary.pop("past_answer"), "past_answer"),
        (lambda manifest, summary, lines: summary["needle_recall"].update(mean=0.0), "needle_recall.mean"),
        (lambda manifest, summary, lines: summary.pop("needle_recall_past"), "needle_recall."),
        (
            lambda manifest, summary, lines: summary["needle_recall_past"].update(records=0),
            "needle_recall_past.records",
        ),
    ],
)
def test_a_false_end_is_found(golden: Path, spoil: Spoil, field: str) -> None:
    assert field in spoilt(golden, spoil).field


def test_both_implementations_count_alike() -> None:
    fast, plain = RequestTotals(), PlainRequests()
    base = {"request_id": "r", "score": None, "arrival_s": 0.0, "state": "length"}
    for num_output, answer in ((0, 0), (1, 0), (1, 1), (9, 9), (9, 8), (9, 7), (9, 0)):
        line = base | {"num_output_tokens": num_output, "answer_tokens": answer}
        fast.add(line)
        plain.add(line)
    fields, _ = fast.to_json()
    assert fields["past_answer"] == plain.to_json()["past_answer"]
    assert fields["past_answer"] == {"requests": 2, "decode_steps": 32, "past_steps": 1 + 8}
