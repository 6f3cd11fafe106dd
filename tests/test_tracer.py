"""A run's folder from the first byte to the last: whole, failed or killed."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.schema import TABLES, problems
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.manifest import redact_argv
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.tracer import Tracer
from dsatrace.trace.writer import TraceWriterError
from helpers.trace_samples import RUN, SECRET, SampleRequest, config_for, plain_records, sample_capture

ROOT = Path(__file__).resolve().parents[1]


def captures(num_steps: int, **changes: Any) -> list[StepCapture]:
    rng = np.random.default_rng(3)
    return [sample_capture(rng, [40 + i, 60 + i], step_idx=i, **changes) for i in range(num_steps)]


def request(i: int, prompt: list[int] | None = None) -> SampleRequest:
    return SampleRequest(f"r{i}", prompt or [i] * 40, source_row=i)


def open_tracer(folder: Path, **changes: Any) -> Tracer:
    return Tracer(config_for(folder, **changes), RUN, secret=SECRET)


def test_a_whole_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_tracer(folder) as tracer:
        running = RunReader(folder)
        assert running.state == "running"
        first = tracer.add_request(request(0, [1] * 40))
        second = tracer.add_request(request(1, [1] * 33 + [2] * 20))
        assert (first.num_cached_blocks, second.num_cached_blocks) == (0, 2)
        steps = captures(3, prefixes=(first, second))
        for capture in steps:
            tracer.put(capture, handover_us=10.0, sync_us=5.0)
        tracer.finish_request(
            request(0), RequestFacts(num_output_tokens=4, state="stop", first_token_s=0.1, finish_s=0.5)
        )

    run = RunReader(folder)
    assert run.state == "complete"
    lines = list(run.steps())
    assert len(lines) == 3 * 2 * 2
    expected = [record for capture in steps for record in plain_records(capture, tracer.config)]
    for name in ("request_id", "layer_id", "step_idx", "selected_token_pos", "prefix", "kv_fetch"):
        assert [line[name] for line in lines] == [record[name] for record in expected]
    assert [(r["request_id"], r["state"], r["num_output_tokens"]) for r in run.requests()] == [
        ("r0", "stop", 4),
        ("r1", "unfinished", 0),
    ]
    assert run.torn_lines == {}
    summary = run.summary()
    assert summary["state"] == "complete"
    assert summary["counts"] == {
        "steps": 3,
        "prefills": 0,
        "records": 12,
        "sparse_records": 12,
        "requests": 2,
    }
    assert list(summary["prefix_hot_blocks"]) == ["r1"]
    cost = summary["tracing_cost"]
    assert cost["traced_steps"] == 3
    assert cost["handover_us_mean"] >= 10.0
    assert cost["with_sync_us_mean"] == pytest.approx(cost["without_sync_us_mean"] + 5.0)
    assert cost["writer_busy_ms"] > 0
    files: dict[str, list[dict[str, Any]]] = {
        "manifest.json": [run.manifest],
        "summary.json": [summary],
        "trace_steps.jsonl": lines,
        "requests.jsonl": list(run.requests()),
    }
    for name, records in files.items():
        assert [problems(record, "full", TABLES[name]) for record in records] == [[]] * len(records)
    assert not [path for path in folder.iterdir() if path.name not in TABLES]


def test_no_token_id_lands_in_the_folder(tmp_path: Path) -> None:
    marked = 98765432101
    with open_tracer(tmp_path) as tracer:
        tracer.add_request(request(0, [marked] * 40))
        tracer.add_request(request(1))
        tracer.put(captures(1, prefixes=tracer.prefixes(["r0", "r1"]))[0])
    assert all(str(marked) not in path.read_text() for path in tmp_path.iterdir())


def test_the_tracer_knows_each_requests_answer(tmp_path: Path) -> None:
    asked = dataclasses.replace(request(0), needle_positions=(7, 5, 5), labels={"task": "vt"})
    with open_tracer(tmp_path) as tracer:
        prefixes = (tracer.add_request(asked), tracer.add_request(request(1)))
        first, second = captures(2, prefixes=prefixes, needles=tracer.needles(["r0", "r1"]))
        first.positions[:, 0] = [7, 9, 11, 13, 15, 17, 19, 21]
        tracer.put(first)
        tracer.finish_request(asked, RequestFacts(num_output_tokens=2, state="stop", score=100.0))
        assert tracer.needles(["r1"]) == ()
        tracer.put(dataclasses.replace(second, request_ids=("r1",), **one_row(second)))
    run = RunReader(tmp_path)
    needles = [record.get("needle") for record in run.steps()]
    assert needles == [{"tokens": 2, "selected": 1}] * 2 + [None] * 4
    line = next(run.requests())
    assert (line["needle_positions"], line["labels"], line["score"]) == ([5, 7], {"task": "vt"}, 100.0)
    assert run.summary()["needle_recall"]["per_layer"] == [0.5, 0.5]
    assert run.summary()["scores"]["by"] == {"task": {"vt": {"mean": 100.0, "num_scored": 1}}}


@pytest.mark.parametrize("level", ["full", "stats"])
def test_what_it_selects_past_its_answer_is_apart(tmp_path: Path, level: str) -> None:
    """r0 generates 3 tokens, of which one is its answer; r1 is cut off, and nobody knows its answer."""
    asked = [dataclasses.replace(request(i), needle_positions=(5, 7)) for i in range(2)]
    ends = {"min_new_tokens": 3, "ignore_eos": False}
    info = dataclasses.replace(RUN, model_config={"n_layers": 2, "index_topk": 8}, answer_end=ends)
    with Tracer(config_for(tmp_path, level=level), info, secret=SECRET) as tracer:
        prefixes = tuple(tracer.add_request(one) for one in asked)
        steps = captures(2, prefixes=prefixes, needles=tracer.needles(["r0", "r1"]))
        for step, first in zip(steps, (5, 6), strict=True):
            step.positions[:] = [first, 9, 11, 13, 15, 17, 19, 21]
            tracer.put(step)
        facts = RequestFacts(num_output_tokens=3, answer_tokens=1, state="length", score=100.0)
        tracer.finish_request(asked[0], facts)
    summary = RunReader(tmp_path).summary()
    assert summary["needle_recall"] | {"random_mean": None} == {
        "records": 6, "mean": 1 / 3, "random_mean": None, "per_layer": [1 / 3, 1 / 3]
    }  # fmt: skip
    assert summary["needle_recall_past"]["per_layer"] == [0.0, 0.0]
    assert problems(summary, level, TABLES["summary.json"]) == []
    again = summarize_runs([tmp_path])
    for name in ("needle_recall", "needle_recall_past"):
        assert again[name] == summary[name]


def one_row(capture: StepCapture) -> dict[str, Any]:
    """The arrays of the second request alone."""
    return {
        "positions": capture.positions[:, 1:],
        "score_stats": capture.score_stats[:, 1:],
        "scores": None,
        "seq_len": capture.seq_len[1:],
        "step_idx": capture.step_idx[1:],
        "prefixes": capture.prefixes[1:],
        "needles": (),
    }


def test_the_tracer_knows_each_requests_prefix(tmp_path: Path) -> None:
    with open_tracer(tmp_path) as tracer:
        known = [tracer.add_request(request(0, [5] * 32)), tracer.add_request(request(1, [5] * 32))]
        tracer.put(captures(1, prefixes=tracer.prefixes(["r0", "r1"]))[0])
    keys = [
        (line["prefix"]["prefix_key"], line["prefix"]["prefix_cached_blocks"])
        for line in RunReader(tmp_path).steps()
    ]
    assert keys == [(prefix.key, prefix.num_cached_blocks) for prefix in known for _ in range(2)]
    assert known[1].num_cached_blocks == 2


def test_an_exception_leaves_an_incomplete_run(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), open_tracer(tmp_path) as tracer:
        tracer.put(captures(1)[0])
        raise KeyError("mine")
    run = RunReader(tmp_path)
    assert (run.state, run.manifest["error"]) == ("incomplete", "ended by KeyError")
    assert len(list(run.steps())) == 4
    assert run.summary()["state"] == "incomplete"


def test_a_broken_capture_ends_the_run_at_the_next_put(tmp_path: Path) -> None:
    good, bad, late = captures(3)
    bad.positions[0, 0, 0] = 4000
    tracer = open_tracer(tmp_path)
    released = []
    tracer.put(good)
    tracer.put(captures(1, positions=bad.positions, release=lambda: released.append(1))[0])
    with pytest.raises(
        TraceWriterError, match="request 0 of the step, layer 0: a selected position lies in the future"
    ):
        for _ in range(1000):
            tracer.put(late)
    with pytest.raises(TraceWriterError):
        tracer.close()
    tracer.close()  # closed already
    assert released == [1]
    run = RunReader(tmp_path)
    assert run.state == "incomplete"
    assert "lies in the future" in run.manifest["error"]
    assert [line["step_idx"] for line in run.steps()] == [0] * 4


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    class FullDisk:
        def write_step(self, step: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trace_steps.jsonl")

        def write_request(self, record: object) -> None: ...

        def close(self, state: str) -> None: ...

    config = config_for(tmp_path)
    tracer = Tracer(config, RUN, secret=SECRET, sinks=(FullDisk(),))
    with (
        pytest.raises(UserError, match=r"cannot write the trace: trace_steps.jsonl: No space left on device"),
        tracer,
    ):
        tracer.put(captures(1)[0])
    assert RunReader(tmp_path).manifest["state"] == "incomplete"


def test_a_full_queue_makes_the_model_wait(tmp_path: Path) -> None:
    gate = threading.Event()
    steps = captures(6, wait=gate.wait)
    with open_tracer(tmp_path, queue_steps=2) as tracer:
        feeder = threading.Thread(target=lambda: [tracer.put(step) for step in steps])
        feeder.start()
        feeder.join(timeout=0.2)
        assert feeder.is_alive()
        gate.set()
        feeder.join()
    assert [line["step_idx"] for line in RunReader(tmp_path).steps()][::4] == list(range(6))


def test_a_killed_run_is_readable_and_incomplete(tmp_path: Path) -> None:
    program = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT / "inference")!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_tracer import captures, open_tracer
tracer = open_tracer(Path({str(tmp_path)!r}))
for capture in captures(5):
    tracer.put(capture)
path = Path({str(tmp_path)!r}) / "trace_steps.jsonl"
while path.read_bytes().count(b"\\n") < 20:
    time.sleep(0.01)
print("written", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert RunReader(tmp_path).state == "running"
    process.kill()
    process.wait()
    process.stdout.close()
    run = RunReader(tmp_path)
    assert (run.manifest["state"], run.state) == ("running", "incomplete")
    assert len(list(run.steps())) == 20

    assert run.summary()["state"] == "running"
    (tmp_path / "trace_steps.jsonl").unlink()  # killed before the first file was made
    assert (run.state, list(run.steps())) == ("incomplete", [])


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    with open_tracer(tmp_path) as tracer:
        tracer.put(captures(1)[0])
    path = tmp_path / "trace_steps.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[1])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(RunReader(tmp_path).steps())


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: cannot read it: No such file"):
        RunReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no schema_version"):
        RunReader(tmp_path)


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    with open_tracer(tmp_path):
        pass
    with pytest.raises(UserError, match="never overwritten"):
        open_tracer(tmp_path)


def test_request_ids_are_unique(tmp_path: Path) -> None:
    with open_tracer(tmp_path) as tracer:
        tracer.add_request(request(0))
        with pytest.raises(ValueError, match="r0 was added already"):
            tracer.add_request(request(0))


def test_secrets_on_the_command_line_are_hidden() -> None:
    given = (
        "generate.py --hf-token abc --api-key=abc HF_TOKEN=abc --tokenizer t.json --max-new-tokens 64 "
        "--trace-prefix-key-tokens=256 --password -abc --use-key --seed 1 redis://me:abc@host/0 "
        "redis://:x@abc@host/0"
    )
    shown = (
        "generate.py --hf-token *** --api-key=*** HF_TOKEN=*** --tokenizer t.json --max-new-tokens 64 "
        "--trace-prefix-key-tokens=256 --password *** --use-key --seed 1 redis://***@host/0 "
        "redis://***@host/0"
    )
    assert redact_argv(given.split()) == shown.split()
