"""Serving over time: batches worked out by hand, clocks, lazy pulling, abort, the trace of what happened."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dsatrace.engine.clock import MAX_SLEEP_NS, RealClock, VirtualClock, to_ns
from dsatrace.engine.engine import Engine, Word, serve
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import StepTime, open_simulator
from dsatrace.errors import UserError
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.workloads.request import Request

END = 0
PER_STEP = StepTime(step_ns=10_000_000, prefill_token_ns=1_000_000, decode_token_ns=0, context_token_ns=0)
"""A step takes 10 ms, a prompt token 1 ms more."""


def simulator(batch_size: int = 2, max_seq_len: int = 1000, **run: Any):
    settings = EngineSettings(max_batch_size=batch_size, max_seq_len=max_seq_len)
    return open_simulator(settings, RunSettings(stop_tokens=frozenset({END}), **run), step_time=PER_STEP)


def request(name: str, arrival_s: float, num_tokens: int, prompt_len: int = 5) -> Request:
    return Request(name, (1,) * prompt_len, num_tokens, arrival_s=arrival_s, stop_at_eos=False)


ARRIVALS = [
    request("a", 0.0, 3),
    request("b", 0.0, 1),
    request("c", 0.01, 2),
    request("d", 0.02, 2),
    request("e", 0.5, 2),
    request("f", 0.505, 2),
]


def times(engine: Engine, requests: list[Request]) -> dict[str, tuple[float, float, float]]:
    """Seconds of admission, first token and finish."""
    served = {live.request_id: live for live in serve(engine, requests)}
    assert set(served) == {one.request_id for one in requests}
    return {
        name: (live.admitted_s, live.first_token_s, live.finish_s) for name, live in sorted(served.items())
    }


def test_fifo_batches_by_hand():
    """Batch {a, b}: two prompts of 15 ms, two decode steps of 10. {c, d} waits for its end. The idle
    engine then takes e alone, without waiting for f, which comes 5 ms later and must wait for e.
    """
    with simulator(admission="fifo-batch") as engine:
        assert times(engine, ARRIVALS) == {
            "a": (0.0, 0.015, 0.05),
            "b": (0.0, 0.03, 0.03),
            "c": (0.05, 0.065, 0.09),
            "d": (0.05, 0.08, 0.09),
            "e": (0.5, 0.515, 0.525),
            "f": (0.525, 0.54, 0.55),
        }


def test_continuous_admission_by_hand():
    """c takes b's slot as soon as b has ended, d those of a and c; f that next to e.

    Two prompts, a batch's worth, have gone before: so a decodes once before the prompt of c.
    """
    with simulator(admission="continuous") as engine:
        assert times(engine, ARRIVALS) == {
            "a": (0.0, 0.015, 0.065),
            "b": (0.0, 0.03, 0.03),
            "c": (0.03, 0.055, 0.065),
            "d": (0.065, 0.08, 0.09),
            "e": (0.5, 0.515, 0.54),
            "f": (0.515, 0.53, 0.54),
        }


def test_no_rounding_error_admits_a_request_before_it_arrives():
    at = [0.23270000000000002, *(day * 86_400 / 7 for day in range(1, 99))]
    assert any(to_ns(time_s) / 1e9 < time_s for time_s in at), "times that the clock rounds down"
    with simulator() as engine:
        served = list(serve(engine, [request(f"{i}", time_s, 1) for i, time_s in enumerate(at)]))
    assert len(served) == len(at)
    assert all(live.request.arrival_s <= live.admitted_s for live in served)
    assert [live.request.arrival_s for live in served] == pytest.approx(at, abs=1e-9)


def test_gaps_take_no_time_on_a_virtual_clock():
    started = time.perf_counter()
    with simulator() as engine:
        (live,) = serve(engine, [request("a", 86_400.0, 2)])
    assert (live.admitted_s, live.finish_s) == (86_400.0, 86_400.025)
    assert time.perf_counter() - started < 86_400 / 100


def test_a_real_clock_sleeps_for_arrivals_and_for_modelled_steps():
    started = time.perf_counter()
    with simulator(clock=RealClock()) as engine:
        (live,) = serve(engine, [request("a", 0.15, 3)])
    elapsed = time.perf_counter() - started
    assert 0.15 <= live.admitted_s < live.first_token_s < live.finish_s <= elapsed
    assert live.first_token_s - live.admitted_s >= 0.015
    assert live.finish_s - live.first_token_s >= 0.02


def test_a_real_clock_sleeps_briefly_and_resumes():
    started = time.perf_counter()
    clock = RealClock(start_s=100.0)
    clock.wait_until(to_ns(1e6))
    elapsed = time.perf_counter() - started
    assert MAX_SLEEP_NS / 1e9 <= clock.now_ns / 1e9 - 100 <= elapsed < 1e6 / 100
    started = time.perf_counter()
    clock.start()
    assert 0 <= clock.now_ns / 1e9 - 100 <= time.perf_counter() - started
    with simulator(clock=VirtualClock(start_s=7.0)) as engine:
        (live,) = serve(engine, [request("a", 0.0, 1)])
    assert live.finish_s == 7.015


def test_requests_are_pulled_when_there_is_room_for_them():
    """All of an endless source have arrived; at most two batches wait, and one request has been looked at."""
    pulled = itertools.count()

    def source() -> Iterator[Request]:
        while True:
            yield request(f"r{next(pulled)}", 0.0, 3)

    with simulator(batch_size=4) as engine:
        ended = list(itertools.islice(serve(engine, source()), 50))
        assert len(engine.scheduler.waiting) <= 8
    assert [live.request_id for live in ended] == [f"r{i}" for i in range(50)]
    assert next(pulled) <= 50 + 4 + 8 + 1


def test_nothing_is_pulled_before_it_is_needed():
    """What the source does on the way, such as skipping, happens between the requests around it."""
    log: list[str] = []

    class Tracer:
        def add_request(self, request: Request) -> None:
            log.append(f"add {request.request_id}")

        def skip_request(self, request: Request) -> None:
            log.append(f"skip {request.request_id}")

        def finish_request(self, request: Request, facts: RequestFacts) -> None:
            log.append(f"finish {request.request_id}")

    with simulator(batch_size=1) as engine:
        engine.tracer = Tracer()  # type: ignore[assignment]

        def source() -> Iterator[Request]:
            yield request("a", 0.0, 1)
            engine.skip(request("b", 0.0, 1))
            yield request("c", 0.0, 1)

        list(serve(engine, source()))
    assert log == ["add a", "skip b", "add c", "finish a", "finish c"]


def test_requests_out_of_order_are_a_users_mistake():
    with (
        simulator() as engine,
        pytest.raises(UserError, match=r"request b arrives at 1.0 s, before request a"),
    ):
        list(serve(engine, [request("a", 2.0, 1), request("b", 1.0, 1)]))


def test_a_rejected_request_does_not_end_the_run():
    arrivals = [request("a", 0.0, 2), request("long", 0.001, 90, prompt_len=20), request("b", 0.1, 2)]
    with simulator(max_seq_len=100) as engine:
        served = {live.request_id: live for live in serve(engine, arrivals)}
    assert {name: live.state for name, live in served.items()} == {
        "a": "length",
        "long": "rejected",
        "b": "length",
    }
    assert "prompt of 20 tokens and 90 new ones exceed --max-seq-len 100" in served["long"].error


@pytest.mark.parametrize("when", ["running", "waiting for an arrival"])
def test_an_abort_ends_the_run_after_the_current_step(when):
    pulled = []

    def source() -> Iterator[Request]:
        for i in range(100):
            pulled.append(i)
            yield request(f"r{i}", 0.0 if i < 8 else 1e9, 3)

    with simulator() as engine:
        served = []
        for live in serve(engine, source()):
            served.append(live)
            if len(served) == (1 if when == "running" else 8):
                engine.request_abort()
        assert not engine.scheduler.has_work
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    states = [live.state for live in served]
    if when == "running":  # r0 and r1 end in one step; two more had been admitted and then had their step
        assert states[:2] == ["length"] * 2
        assert set(states[2:]) == {"aborted"}
        assert len({live.request_id for live in served}) == len(served) < len(pulled)
        assert all(live.finish_s is not None for live in served[2:] if live.admitted_s is not None)
    else:
        assert states == ["length"] * 8
    assert len(pulled) <= 9


def test_every_rank_follows_rank_0():
    """Another rank's tokens, time and wish to stop count for nothing."""

    class FollowsRank0:
        def agree(self, word: Word) -> Word:
            if not word.tokens:
                return Word(False, max(word.now_ns, to_ns(5.0)), [])
            return Word(len(words) == 3, word.now_ns + 1, words.append(word) or [[8] for _ in word.tokens])

    words: list[Word] = []
    with simulator() as engine:
        engine.ranks = FollowsRank0()
        engine.request_abort()
        served = list(serve(engine, [request("a", 1.0, 10), request("b", 1e9, 2)]))
    (live,) = served
    assert all(word.abort for word in words), "it goes on wishing"
    assert set(live.answer) == {8}
    assert live.admitted_s == 5.0
    assert live.state == "aborted"


def test_the_judge_and_the_tracer_hear_how_each_request_ended():
    lines: dict[str, dict[str, Any]] = {}

    class Tracer:
        def add_request(self, request: Request) -> None:
            lines[request.request_id] = {}

        def finish_request(self, request: Request, facts: RequestFacts) -> None:
            names = (field.name for field in dataclasses.fields(RequestFacts))
            lines[request.request_id] = {name: getattr(facts, name) for name in names}

    arrivals = [request("a", 0.0, 3), request("long", 0.0, 10, prompt_len=500), request("b", 0.5, 3)]
    with simulator(batch_size=1, max_seq_len=100, judge=lambda live: live.num_answered / 4) as engine:
        engine.tracer = Tracer()  # type: ignore[assignment]
        for live in serve(engine, arrivals):
            if live.request_id == "a":
                assert live.score == 0.75
                engine.request_abort()
    common: dict[str, Any] = {"num_preemptions": 0, "num_recomputes": 0, "text": None}
    common |= {"answer_tokens": None, "text_past_answer": None}
    common |= {"prompt_token_ids": None, "output_token_ids": None}
    assert lines["a"] == common | {
        "prefix_hit_tokens": 0,
        "num_prefill_tokens": 5,
        "prefill_s": 0.015,
        "num_output_tokens": 3,
        "admitted_s": 0.0,
        "first_token_s": 0.015,
        "finish_s": 0.035,
        "state": "length",
        "error": None,
        "score": 0.75,
    }
    error = lines["long"].pop("error")
    assert "500 tokens" in error
    assert lines["long"] == common | {
        "prefix_hit_tokens": None,
        "num_prefill_tokens": 0,
        "prefill_s": 0.0,
        "num_output_tokens": 0,
        "admitted_s": None,
        "first_token_s": None,
        "finish_s": None,
        "state": "rejected",
        "score": None,
    }
    assert "b" not in lines, "nothing is announced that was never pulled"


def test_arrivals_centuries_away_do_not_overflow():
    far = dataclasses.replace(request("a", 0.0, 2), arrival_s=1e10)
    with simulator() as engine:
        (live,) = serve(engine, [far])
    assert live.finish_s == pytest.approx(1e10 + 0.025, abs=1e-5)
