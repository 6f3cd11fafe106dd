"""A writer that is slow or fails: what the model thread waits for, what is lost, what is counted."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.engine import Engine
from dsatrace.engine.scheduler import Scheduler
from dsatrace.errors import UserError
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.sampler import Sampler
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.summary import Summary
from dsatrace.trace.tracer import Tracer
from dsatrace.trace.writer import open_sinks
from dsatrace.workloads.request import Request
from helpers.models import SMALL, random_model, random_tokens
from helpers.trace_samples import LAYOUT, RUN, SECRET, SampleRequest, config_for, sample_capture

BLOCK, NEW_TOKENS = 16, 12


class FailsAt:
    """The files of a run, on a disk that is full when step `fails_at` comes."""

    def __init__(self, config: Any, fails_at: int) -> None:
        self.sinks = open_sinks(config.out, config, Summary(config.compared_block_sizes))
        self.left = fails_at

    def write_step(self, step: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "trace_steps.jsonl")
        for sink in self.sinks:
            sink.write_step(step)

    def write_request(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write_request(record)

    def close(self, state: str) -> None:
        for sink in self.sinks:
            sink.close(state)


def generate(model: Any, tracer: Tracer | None) -> dict[str, list[int]]:
    pool = new_pool(64, BLOCK, prefix_caching=False)
    runner = ModelRunner(
        model, model.new_cache(pool.blocks.num_blocks, BLOCK), Sampler(seed=3), tracer=tracer
    )
    engine = Engine(Scheduler(pool, 8, 32, frozenset()), runner, tracer)
    live = [
        engine.submit(Request(f"r{i}", tuple(random_tokens(40 + 9 * i, SMALL, i)), NEW_TOKENS, 0.7))
        for i in range(2)
    ]
    tokens: dict[str, list[int]] = {one.request.request_id: [] for one in live}
    try:
        for request, token in engine.run():
            tokens[request.request.request_id].append(token)
    except UserError as error:
        assert "No space left" in str(error)
    return tokens


def failing_tracer(folder: Path, fails_at: int, **changes: Any) -> Tracer:
    config = config_for(folder, **changes)
    folder.mkdir()
    run = dataclasses.replace(RUN, layouts=(LAYOUT,))
    sink = FailsAt(dataclasses.replace(config, out=folder.with_name(f"{folder.name}_files")), fails_at)
    return Tracer(config, run, secret=SECRET, sinks=(sink,))


@pytest.mark.parametrize("fails_at", [0, 1, 5])
@pytest.mark.parametrize("policy", ["block", "drop"])
def test_a_failing_writer_changes_no_token(tmp_path: Path, fails_at: int, policy: str) -> None:
    model = random_model(SMALL)
    untraced = generate(model, None)
    for on_error in ("stop", "continue"):
        (tmp_path / f"{on_error}_files").mkdir()
        tracer = failing_tracer(
            tmp_path / on_error, fails_at, on_error=on_error, queue_policy=policy, queue_steps=1
        )
        tokens = generate(model, tracer)
        if on_error == "continue":
            tracer.close()
            assert tokens == untraced
        else:
            with pytest.raises(UserError, match="No space left"):
                tracer.close()
            assert all(untraced[name][: len(mine)] == mine for name, mine in tokens.items())
        manifest = RunReader(tmp_path / on_error).manifest
        assert manifest["state"] == "incomplete"
        assert "No space left" in manifest["error"]


def test_continue_counts_losses_and_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = threading.Event()
    rng = np.random.default_rng(0)
    released: list[int] = []
    tracer = Tracer(config_for(tmp_path, on_error="continue"), RUN, secret=SECRET)
    for i in range(6):
        capture = sample_capture(
            rng, [50], step_idx=i, wait=gate.wait, release=lambda i=i: released.append(i)
        )
        if i == 2:
            capture.positions[0, 0, 0] = 400  # not one a model can have chosen
        tracer.put(capture)
    gate.set()
    while tracer._writer.error is None:
        gate.wait(0.01)
    assert not tracer.accepts
    tracer.drop_step()  # as the runner does then
    tracer.put(sample_capture(rng, [50], release=lambda: released.append(6)))
    tracer.close()

    assert capsys.readouterr().err.splitlines() == [
        "warning: the trace writer failed: request 0 of the step, layer 0: a selected position lies in the "
        "future; the run goes on untraced"
    ]
    assert sorted(released) == list(range(7))
    run = RunReader(tmp_path)
    assert run.state == "incomplete"
    assert [line["step_idx"] for line in run.steps()] == [0, 0, 1, 1]
    summary = run.summary()
    assert (summary["counts"]["steps"], summary["dropped_steps"]) == (2, 6)


def test_drop_never_waits_and_counts(tmp_path: Path) -> None:
    gate = threading.Event()
    rng = np.random.default_rng(0)
    released: list[int] = []
    request = SampleRequest("r0", [1] * 40)
    with Tracer(config_for(tmp_path, queue_policy="drop", queue_steps=2), RUN, secret=SECRET) as tracer:
        tracer.add_request(request)
        for i in range(9):  # the writer holds one at the gate, two wait; were one to wait, this would hang
            capture = sample_capture(
                rng, [50 + i], step_idx=i, wait=gate.wait, release=lambda i=i: released.append(i)
            )
            tracer.put(capture)
            while i == 0 and tracer._writer._queue.qsize():
                gate.wait(0.01)
        assert released == [3, 4, 5, 6, 7, 8]
        tracer.finish_request(
            request, RequestFacts(num_output_tokens=9, state="stop")
        )  # a line is never dropped
        gate.set()
    run = RunReader(tmp_path)
    assert run.state == "complete"
    assert [line["step_idx"] for line in run.steps()][::2] == [0, 1, 2]
    assert (run.summary()["counts"]["steps"], run.summary()["dropped_steps"]) == (3, 6)
    assert [record["request_id"] for record in run.requests()] == ["r0"]
    assert run.manifest["trace"]["queue_policy"] == "drop"


def test_the_runner_drops_when_no_slot_is_free(tmp_path: Path) -> None:
    """Nobody writes, so the ring runs dry: the tokens come all the same."""
    model = random_model(SMALL)
    untraced = generate(model, None)
    gate = threading.Event()

    class Waits:
        def write_step(self, step: Any) -> None:
            gate.wait()

        def write_request(self, record: Mapping[str, Any]) -> None: ...

        def close(self, state: str) -> None: ...

    config = config_for(tmp_path, queue_policy="drop", queue_steps=1)
    tracer = Tracer(config, RUN, secret=SECRET, sinks=(Waits(),))
    assert generate(model, tracer) == untraced
    cost = tracer._writer.cost
    num_steps = NEW_TOKENS - 1  # the first token comes from the prefill; both requests share the steps
    assert cost.traced_steps in (1, 2)
    assert cost.traced_steps + cost.dropped_steps >= num_steps
    gate.set()
    tracer.close()
