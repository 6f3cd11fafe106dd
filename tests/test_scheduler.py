"""Scheduling without a model: admission, growth, preemption, batches, rejection; nobody starves."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import serve
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Admission, Scheduler
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.engine.simulator import open_simulator, replay
from dsatrace.workloads.request import Request
from helpers.simulated_time import TIMES, EveryStep

END = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine and what arrives; `responses` hold what each request should be answered."""

    requests: list[Request]
    responses: dict[str, list[int]]
    max_batch_size: int
    prefill_chunk: int
    block_size: int
    num_blocks: int
    max_seq_len: int
    admission: Admission

    def expected(self, request: Request) -> list[int]:
        answer = [*self.responses[request.request_id], END]
        if request.stop_at_eos:
            return answer[: min(answer.index(END) + 1, request.max_new_tokens)]
        return [*itertools.islice(itertools.cycle(answer[:-1] or answer), request.max_new_tokens)]

    def fits(self, request: Request) -> bool:
        held = len(request.prompt_token_ids) + request.max_new_tokens - 1
        return held <= min(self.num_blocks * self.block_size, self.max_seq_len)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = st.tuples(st.integers(1, 24), st.integers(1, 20))
    shapes = draw(st.lists(st.tuples(lengths, st.lists(st.integers(0, 5), max_size=24)), max_size=12))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.001, 0.0111, 0.1]), min_size=12, max_size=12))
    requests, responses, now = [], {}, 0.0
    for i, ((prompt_len, max_new_tokens), response) in enumerate(shapes):
        now += gaps[i]
        prompt, stops = (i + 1,) * prompt_len, draw(st.booleans())
        requests.append(Request(f"r{i}", prompt, max_new_tokens, arrival_s=now, stop_at_eos=stops))
        responses[f"r{i}"] = response
    return Case(
        requests,
        responses,
        max_batch_size=draw(st.integers(1, 4)),
        prefill_chunk=draw(st.integers(1, 9)),
        block_size=draw(st.integers(1, 5)),
        num_blocks=draw(st.integers(1, 16)),
        max_seq_len=draw(st.sampled_from([20, 1000])),
        admission=draw(st.sampled_from(["continuous", "fifo-batch"])),
    )


def run(case: Case, clock: VirtualClock) -> list[LiveRequest]:
    """Serves the case and checks what must hold at every step."""
    engine_settings = EngineSettings(
        max_seq_len=case.max_seq_len,
        max_batch_size=case.max_batch_size,
        prefill_chunk=case.prefill_chunk,
        cache_block_size=case.block_size,
        cache_blocks=case.num_blocks,
    )
    run_settings = RunSettings(stop_tokens=frozenset({END}), admission=case.admission, clock=clock)
    with open_simulator(engine_settings, run_settings, replay(case.responses), TIMES) as engine:
        scheduler, step = engine.scheduler, engine.step
        order = {request.request_id: i for i, request in enumerate(case.requests)}

        def checked_step(next_arrival_ns: int | None = None):
            oldest = [*scheduler.running, *scheduler.waiting][0]
            before = oldest.num_computed, oldest.num_preemptions
            progress = step(next_arrival_ns)
            scheduler.pool.check_integrity()
            queue = [order[live.request_id] for live in [*scheduler.running, *scheduler.waiting]]
            assert queue == sorted(queue)
            assert len(scheduler.running) <= case.max_batch_size
            held = [block for live in scheduler.running for block in live.block_ids]
            assert len(set(held)) == len(held) == case.num_blocks - scheduler.pool.num_free
            for live in scheduler.running:
                assert len(live.block_ids) * case.block_size >= live.num_computed
            assert oldest.num_preemptions == before[1], "the oldest gave way"
            # It computes, unless short prompts of others come first, which are few.
            waits[0] = 0 if oldest.ended or oldest.num_computed > before[0] else waits[0] + 1
            assert waits[0] <= case.max_batch_size * 24, "the oldest starves"
            return progress

        waits = [0]
        engine.step = checked_step  # type: ignore[method-assign]
        served = list(serve(engine, iter(case.requests)))
        assert scheduler.pool.num_free == case.num_blocks
        assert not scheduler.has_work
    return served


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_request_is_served_once_and_as_recorded(case: Case):
    served = run(case, VirtualClock())
    assert sorted(live.request_id for live in served) == sorted(r.request_id for r in case.requests)
    admitted = []
    for live in served:
        if not case.fits(live.request):
            assert (live.state, live.answer, live.admitted_s) == ("rejected", [], None)
            assert live.error and str(live.prompt_len) in live.error and "\n" not in live.error
            continue
        assert live.answer == case.expected(live.request)
        stopped = live.request.stop_at_eos and live.answer[-1] == END
        assert live.state == ("stop" if stopped else "length")
        assert live.num_decode_steps == len(live.answer) - 1
        assert live.error is None
        assert live.request.arrival_s <= live.admitted_s + 1e-9
        assert live.admitted_s < live.first_token_s <= live.finish_s
        admitted.append((int(live.request_id[1:]), live.admitted_s))
    times = [at for _, at in sorted(admitted)]
    assert times == sorted(times), "first come, first served"


def facts(live: LiveRequest) -> tuple:
    times = live.admitted_s, live.first_token_s, live.finish_s
    return live.request_id, live.state, live.answer, times, live.num_preemptions, live.num_decode_steps


@settings(max_examples=150, deadline=None)
@given(cases())
def test_jumping_over_steps_changes_nothing(case: Case):
    jumped, stepped = (
        # When a rejection is heard of differs: arrivals are looked at between steps.
        sorted(map(facts, run(case, clock)), key=lambda fact: (fact[1] == "rejected", fact[3][2] or 0.0))
        for clock in (VirtualClock(), EveryStep())
    )
    assert jumped == stepped


def new_scheduler(num_blocks: int, batch_size: int = 4, chunk: int = 100, **kwargs) -> Scheduler:
    return Scheduler(new_pool(num_blocks, 4, False), batch_size, chunk, **kwargs)


def advance(scheduler: Scheduler, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        step = scheduler.schedule(now=0.0)
        scheduler.commit(step, [[7] for _ in step.sampled], now=0.0)


def test_tables_grow_and_the_last_admitted_gives_way():
    scheduler = new_scheduler(num_blocks=4)
    old, young = scheduler.add(Request("old", (1,) * 4, 8)), scheduler.add(Request("young", (1,) * 4, 8))
    advance(scheduler, 2)  # both prompts
    assert (len(old.block_ids), len(young.block_ids)) == (1, 1)
    advance(scheduler)  # the first decode token of each starts its second block: the pool is full
    assert (old.num_computed, young.num_computed, scheduler.pool.num_free) == (5, 5, 0)
    advance(scheduler, 3)
    assert (old.num_computed, young.num_computed) == (8, 8)
    advance(scheduler)
    assert (young.state, young.num_computed, young.block_ids, young.num_preemptions) == ("waiting", 0, [], 1)
    assert (old.state, len(old.block_ids), old.num_preemptions) == ("running", 3, 0)
    assert young.num_answered == 5, "what it has generated stays"
    assert list(scheduler.waiting) == [young]


def test_a_preempted_request_recomputes_all_but_its_last_token():
    scheduler = new_scheduler(num_blocks=5, chunk=6)
    scheduler.add(Request("old", (1,) * 4, 9))
    young = scheduler.add(Request("young", (1,) * 8, 6))
    works = []
    while scheduler.has_work:
        step = scheduler.schedule(now=0.0)
        works += [(w.first_pos, w.num_tokens, w.wants_logits) for w in step.work if w.live is young]
        scheduler.commit(step, [[7] for _ in step.sampled], now=0.0)
    assert young.num_preemptions == 1
    again = works.index((0, 6, False), 1)
    assert works[:2] == [(0, 6, False), (6, 2, True)]
    assert works[again:] == [(0, 6, False), (6, 6, False), (12, 1, True)]
    assert sum(wants_logits for *_, wants_logits in works) == 6  # one for each of its tokens
    assert young.num_decode_steps == 5


def test_a_reserved_answer_never_gives_way():
    scheduler = new_scheduler(num_blocks=4, reserve_answer=True)
    live = [scheduler.add(Request(name, (1,) * 4, 8)) for name in "ab"]
    advance(scheduler)
    assert [one.state for one in live] == ["running", "waiting"]  # each will hold 3 blocks
    assert live[0].block_ids == [0, 1, 2]
    advance(scheduler, 15)
    assert [(one.state, one.num_preemptions) for one in live] == [("length", 0)] * 2


def test_reserved_blocks_lie_side_by_side_when_they_are_used_again():
    scheduler = new_scheduler(num_blocks=6, batch_size=2, reserve_answer=True)
    tables = []
    for i in range(6):
        live = scheduler.add(Request(f"r{i}", (1,) * 4, 8))
        advance(scheduler)
        tables.append(live.block_ids)
        advance(scheduler, 7)
    assert all(table == list(range(table[0], table[0] + 3)) for table in tables)


def test_those_who_decode_get_their_turn_between_short_prompts():
    """Requests of one token follow one another without end; the long one is served all the same."""
    scheduler = new_scheduler(num_blocks=100, batch_size=3)
    long = scheduler.add(Request("long", (1,) * 4, 50))
    for i in range(1000):
        scheduler.add(Request(f"short {i}", (1,), 1))
    num_steps = 0
    while not long.ended:
        advance(scheduler)
        num_steps += 1
    assert num_steps == 1 + 2 + 1 + 48 * 4  # after the first batch, three prompts between two decode steps
    assert scheduler.waiting, "there was always somebody who could have come first"


@pytest.mark.parametrize("reserve", [False, True])
def test_a_batch_takes_nobody_until_all_its_members_ended(reserve):
    scheduler = new_scheduler(num_blocks=100, batch_size=2, admission="fifo-batch", reserve_answer=reserve)
    live = [scheduler.add(Request(name, (1,), new)) for name, new in (("a", 2), ("b", 4), ("c", 1))]
    assert not scheduler.admits_newcomers
    advance(scheduler, 3)
    assert [one.state for one in live] == ["length", "running", "waiting"]
    advance(scheduler, 2)
    assert [one.state for one in live] == ["length", "length", "waiting"]
    advance(scheduler)
    assert live[2].state == "length"
    assert scheduler.admits_newcomers


def test_a_preempted_member_comes_back_before_the_batch_is_over():
    scheduler = new_scheduler(num_blocks=4, batch_size=2, admission="fifo-batch")
    old, young, next_ = (scheduler.add(Request(name, (1,) * 4, 10)) for name in ("old", "young", "next"))
    while not old.ended:
        advance(scheduler)
        assert next_.admitted_s is None
    assert young.num_preemptions > 0
    while not young.ended:
        assert next_.admitted_s is None
        advance(scheduler)
    advance(scheduler)
    assert next_.state == "running"


@pytest.mark.parametrize(
    ("max_seq_len", "says"),
    [
        (
            None,
            "do not fit the KV cache of 16 tokens; shorten the prompt, lower --max-new-tokens or raise --c",
        ),
        (12, "exceed --max-seq-len 12; shorten the prompt, lower --max-new-tokens or raise --max-seq-len"),
    ],
)
def test_what_can_never_fit_is_rejected_with_its_numbers(max_seq_len, says):
    scheduler = new_scheduler(num_blocks=4, max_seq_len=max_seq_len)
    limit = max_seq_len or 16
    assert scheduler.add(Request("fits", (1,) * 10, limit - 9)).state == "waiting"
    live = scheduler.add(Request("r1", (1,) * 10, limit - 8))
    assert live.state == "rejected"
    assert live.error is not None
    assert live.error.startswith(f"request r1: prompt of 10 tokens and {limit - 8} new ones {says}")
    assert len(scheduler.waiting) == 1
