"""The token simulator: what it answers, that it needs no torch, and that jumping changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import INFERENCE
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import serve
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import StepTime, open_simulator, replay
from dsatrace.errors import UserError
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.reader import RunReader
from dsatrace.workloads.request import Request
from helpers.waiting import until

END = 0
HELLO = tuple(b"Hello world")


def simulator(**how):
    return open_simulator(EngineSettings(max_seq_len=64), RunSettings(stop_tokens=frozenset({END})), **how)


def test_hello_world_in_gives_hello_world_out():
    with simulator() as engine:
        live = engine.submit(Request("r0", HELLO, max_new_tokens=32))
        answer = [token for _, token in engine.run()]
    assert bytes(answer[:-1]).decode() == "Hello world"
    assert (answer[-1], live.state, live.answer) == (END, "stop", answer)


def test_a_long_runs_summary_keeps_up(tmp_path):
    run = RunSettings(
        stop_tokens=frozenset({END}), trace=TraceConfig(tmp_path / "run", summary_interval_s=1e-9)
    )
    seen = []
    with open_simulator(EngineSettings(max_seq_len=64), run) as engine:
        for number, _ in enumerate(serve(engine, (Request(f"r{i}", HELLO, i + 1) for i in range(3))), 1):
            until(lambda number=number: RunReader(tmp_path / "run").summary()["counts"]["requests"] >= number)
            summary = RunReader(tmp_path / "run").summary()
            seen.append((summary["state"], summary["counts"]["requests"]))
    assert seen == [("running", 1), ("running", 2), ("running", 3)]
    assert RunReader(tmp_path / "run").summary()["state"] == "complete"


def test_an_answer_may_be_cut_by_its_length():
    with simulator() as engine:
        (live,) = serve(engine, [Request("r0", HELLO, max_new_tokens=5)])
    assert (bytes(live.answer).decode(), live.state) == ("Hello", "length")


def test_recorded_responses_are_replayed_up_to_their_end_token():
    requests = [Request("a", (7,), 10), Request("b", (7,), 10), Request("c", (7,), 10)]
    responses = {"a": [5, 6, END, 9], "b": [], "c": range(1, 30)}
    with simulator(respond=replay(responses)) as engine:
        live = {one.request_id: one for one in serve(engine, requests)}
    assert live["a"].answer == [5, 6, END]
    assert live["b"].answer == [END]
    assert (live["c"].answer, live["c"].state) == (list(range(1, 11)), "length")


def test_a_missing_recording_is_one_line():
    with simulator(respond=replay({})) as engine:
        engine.submit(Request("r7", (1,), 2))
        with pytest.raises(UserError, match="request r7: no recorded response"):
            engine.step()


def test_who_does_not_stop_is_answered_over_and_over():
    responses = {"a": [5, END, 6], "b": []}
    requests = [Request(name, (7,), 7, stop_at_eos=False) for name in "ab"]
    with simulator(respond=replay(responses)) as engine:
        live = list(serve(engine, requests))
    assert [one.answer for one in live] == [[5, END, 6, 5, END, 6, 5], [END] * 7]
    assert {one.state for one in live} == {"length"}


def test_the_modelled_time_of_many_steps_is_the_sum_of_single_ones():
    model = StepTime(step_ns=1000, prefill_token_ns=10, decode_token_ns=100, context_token_ns=1)
    with simulator(step_time=model) as engine:
        for name in "ab":
            engine.submit(Request(name, (1,) * 4, 9))
        for num_prompts in (1, 2):
            engine.step()
            assert engine.clock.now_ns == num_prompts * (1000 + 4 * 10)
        step = engine.scheduler.schedule(engine.now_s)
    single = [1000 + 2 * 100 + 2 * context for context in range(5, 12)]  # each sees 5, then 6, ...
    for num_steps in range(1, 8):
        assert model.of(step, num_steps) == sum(single[:num_steps])


@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), True])
def test_a_step_time_is_a_number_of_nanoseconds(value):
    with pytest.raises(UserError, match=r"step_ns .*whole number of nanoseconds"):
        StepTime(step_ns=value)


def test_decode_steps_in_which_nothing_happens_are_one_step():
    calls = []

    class Watched(VirtualClock):
        def advance(self, step_ns: int) -> None:
            calls.append(step_ns)
            super().advance(step_ns)

    with open_simulator(
        EngineSettings(), RunSettings(stop_tokens=frozenset({END}), clock=Watched())
    ) as engine:
        (live,) = serve(engine, [Request("r0", (1,) * 1000, 2000)])
    assert live.num_decode_steps == live.num_answered - 1 == 1000
    assert len(calls) == 4 + 1  # chunks of 256 tokens, and one jump


NO_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
from dsatrace.commands.arguments import add_engine_arguments
from dsatrace.engine.engine import serve
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import open_simulator
from dsatrace.workloads.request import Request

with open_simulator(EngineSettings(), RunSettings(stop_tokens=frozenset({0}))) as engine:
    for live in serve(engine, [Request("r0", tuple(b"Hello world"), 32)]):
        print(bytes(live.answer[:-1]).decode(), live.state)
assert not [name for name in sys.modules if name.startswith("torch.")]
"""


def test_the_simulator_runs_where_torch_cannot_be_imported():
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH],
        env={"PYTHONPATH": str(INFERENCE)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("Hello world stop\n", "")
