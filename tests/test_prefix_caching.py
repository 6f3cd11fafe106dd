"""Prefix caching in the scheduler: what is hit was computed, and nothing else of a run changes.

The first half has no model: a runner keeps, for every slot of the cache, the prefix that was
computed into it, and holds each step against what its table points at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.engine import Engine, serve
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.runner import Step
from dsatrace.engine.scheduler import Admission, Scheduler
from dsatrace.engine.settings import RunSettings
from dsatrace.engine.simulator import TokenSimulator, replay
from dsatrace.workloads.request import Request
from helpers.power import examples
from helpers.simulated_time import TIMES, EveryStep

END = 9


class SlotKeeper(TokenSimulator):
    """Knows for every slot of the cache which tokens were computed there: all up to and with its own."""

    def __init__(self, block_size: int, responses: dict[str, list[int]]) -> None:
        super().__init__(END, replay(responses), TIMES)
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.works: list[tuple[str, int, int]] = []  # request, first position, tokens

    def run(self, step: Step) -> list[list[int]]:
        sampled = super().run(step)
        new = dict(zip((live.request_id for live in step.sampled), sampled, strict=True))
        for live, first_pos, num_tokens, _ in step.work:
            tokens = [*live.tokens, *new.get(live.request_id, [])]
            end = first_pos + num_tokens * step.num_steps
            self.works.append((live.request_id, first_pos, end - first_pos))
            for position in range(end):
                slot = live.block_ids[position // self.block_size], position % self.block_size
                if position >= first_pos:
                    self.slots[slot] = tuple(tokens[: position + 1])
                assert self.slots.get(slot) == tuple(tokens[: position + 1]), (live.request_id, position)
        return sampled


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine and what arrives."""

    requests: list[Request]
    responses: dict[str, list[int]]
    max_batch_size: int
    prefill_chunk: int
    block_size: int
    num_blocks: int
    reserve_answer: bool
    admission: Admission
    abort_at: int | None = None  # steps, then the others start over

    def engine(self, prefix_caching: bool, clock: VirtualClock | None = None) -> Engine:
        scheduler = Scheduler(
            new_pool(self.num_blocks, self.block_size, prefix_caching),
            self.max_batch_size,
            self.prefill_chunk,
            frozenset({END}),
            reserve_answer=self.reserve_answer,
            admission=self.admission,
        )
        runner = SlotKeeper(self.block_size, self.responses)
        return Engine(scheduler, runner, run=RunSettings(clock=clock or VirtualClock()))


TOKENS = st.lists(st.integers(0, 1), max_size=12)


@st.composite
def cases(draw: st.DrawFn, aborts: bool = False) -> Case:
    """Prompts of few heads and few tokens; some go on from an earlier answer."""
    heads = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=3))
    requests, responses, now = [], {}, 0.0
    for i in range(draw(st.integers(1, 10))):
        now += draw(st.sampled_from([0.0, 0.0, 0.001, 0.0111, 0.1]))
        before = draw(st.integers(0, 2 * len(requests)))
        if before < len(requests):
            request_id = requests[before].request_id
            head = [*requests[before].prompt_token_ids, *responses[request_id]]
        else:
            head = draw(st.sampled_from(heads))
        prompt = (*head, *draw(TOKENS))
        stops, num_tokens = draw(st.booleans()), draw(st.integers(1, 14))
        requests.append(Request(f"r{i}", prompt, num_tokens, arrival_s=now, stop_at_eos=stops))
        responses[f"r{i}"] = draw(TOKENS)
    return Case(
        requests,
        responses,
        max_batch_size=draw(st.integers(1, 4)),
        prefill_chunk=draw(st.integers(1, 9)),
        block_size=draw(st.integers(1, 5)),
        num_blocks=draw(st.integers(4, 60)),
        reserve_answer=draw(st.booleans()),
        admission=draw(st.sampled_from(["continuous", "fifo-batch"])),
        abort_at=draw(st.integers(1, 30)) if aborts else None,
    )


def checked(engine: Engine, requests: Iterable[Request], abort_at: int | None = None) -> list[LiveRequest]:
    """Serves the requests and checks the pool after every step."""
    step, scheduler, num_steps = engine.step, engine.scheduler, 0

    def checked_step(next_arrival_ns: int | None = None):
        nonlocal num_steps
        num_steps += 1
        if num_steps == abort_at:
            engine.request_abort()
        oldest = [*scheduler.running, *scheduler.waiting][0]
        num_preemptions = oldest.num_preemptions
        progress = step(next_arrival_ns)
        assert oldest.num_preemptions == num_preemptions, "the oldest gave way"
        held = [live.held for live in scheduler.running if live.held is not None]
        scheduler.tables.pool.check_integrity(held)
        promised = sum(live.num_promised_blocks for live in scheduler.running)
        assert scheduler.tables.num_free == scheduler.pool.num_free - promised >= 0
        return progress

    engine.step = checked_step  # type: ignore[method-assign]
    ended = list(serve(engine, requests))
    engine.step = step  # type: ignore[method-assign]
    assert not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_blocks
    return ended


def answers(ended: list[LiveRequest]) -> dict[str, tuple[str, list[int], int]]:
    return {live.request_id: (live.state, live.answer, live.num_decode_steps) for live in ended}


@settings(max_examples=examples(150), deadline=None)
@given(cases())
def test_what_is_hit_was_computed_and_the_answers_are_the_same(case: Case) -> None:
    cached = checked(case.engine(prefix_caching=True), case.requests)
    plain = checked(case.engine(prefix_caching=False), case.requests)
    assert answers(cached) == answers(plain)
    for live in cached:
        if live.state == "rejected":
            assert live.prefix_hit_tokens is None
            continue
        assert live.prefix_hit_tokens is not None
        assert live.prefix_hit_tokens % case.block_size == 0
        assert live.prefix_hit_tokens < live.prompt_len, "the last token gives the first logits"
        if live.num_preemptions == 0:
            assert live.prefix_hit_tokens + live.num_prefill_tokens == live.prompt_len
    assert all(not live.prefix_hit_tokens and not live.resumed_hit_tokens for live in plain)


@settings(max_examples=examples(75), deadline=None)
@given(cases(aborts=True))
def test_an_abort_at_any_moment_leaves_nothing_that_was_not_computed(case: Case) -> None:
    engine = case.engine(prefix_caching=True)
    checked(engine, [dataclasses.replace(one, arrival_s=0.0) for one in case.requests], case.abort_at)
    now = engine.now_s
    again = checked(engine, [dataclasses.replace(one, arrival_s=now) for one in case.requests])
    assert answers(again) == answers(checked(case.engine(prefix_caching=False), case.requests))


@settings(max_examples=examples(100), deadline=None)
@given(cases())
def test_jumping_over_steps_changes_nothing(case: Case) -> None:
    def facts(clock: VirtualClock) -> dict[str, tuple]:
        return {
            live.request_id: (
                *(live.state, live.answer, live.prefix_hit_tokens, live.resumed_hit_tokens),
                *(live.admitted_s, live.first_token_s, live.finish_s, live.num_preemptions),
            )
            for live in checked(case.engine(True, clock), case.requests)
        }

    assert facts(VirtualClock()) == facts(EveryStep())


@pytest.mark.parametrize("clock", [VirtualClock, EveryStep])
def test_no_jump_goes_past_the_block_that_makes_room_for_the_next(clock: type[VirtualClock]) -> None:
    """The second prompt begins with the first and its answer. It lacks one block until the answer's
    second token fills the third block, which it can share then."""
    answer = [7] * 4
    first = Request("first", tuple(range(10)), 4, stop_at_eos=False)
    second = Request("second", (*range(10), *answer[:2], *range(8)), 1, stop_at_eos=False)
    case = Case([first, second], {"first": answer, "second": [1]}, 2, 100, 4, 5, False, "continuous")
    live = {one.request_id: one for one in checked(case.engine(True, clock()), case.requests)}
    assert live["second"].prefix_hit_tokens == 12
    assert live["second"].admitted_s < live["first"].finish_s


@settings(max_examples=examples(75), deadline=None)
@given(cases())
def test_chunks_end_where_they_end_without_a_cache(case: Case) -> None:
    """On multiples of the chunk size, or with the prompt: a hit moves where they start, no more."""
    engine = case.engine(prefix_caching=True)
    ended = {live.request_id: live for live in checked(engine, case.requests)}
    assert isinstance(engine.runner, SlotKeeper)
    for request_id, first_pos, num_tokens in engine.runner.works:
        live, end = ended[request_id], first_pos + num_tokens
        if end <= live.prompt_len and num_tokens > 1:
            assert end % case.prefill_chunk == 0 or end == live.prompt_len
            assert (end - 1) // case.prefill_chunk == first_pos // case.prefill_chunk


def new_engine(num_blocks: int = 100, batch_size: int = 4, chunk: int = 8, **changes) -> Engine:
    case = Case([], {}, batch_size, chunk, 4, num_blocks, False, "continuous")
    return dataclasses.replace(case, **changes).engine(prefix_caching=True)


def ask(engine: Engine, name: str, prompt: Iterable[int], answer: Iterable[int] = (1,)) -> LiveRequest:
    """Submits a request that will be answered so."""
    assert isinstance(engine.runner, SlotKeeper)
    response = list(answer)
    given = engine.runner.respond
    engine.runner.respond = lambda request: response if request.request_id == name else given(request)
    return engine.submit(Request(name, tuple(prompt), len(response), stop_at_eos=False))


def works(engine: Engine, name: str) -> list[tuple[int, int]]:
    assert isinstance(engine.runner, SlotKeeper)
    return [(first, num) for request_id, first, num in engine.runner.works if request_id == name]


def test_a_batch_of_equal_prompts_is_computed_once() -> None:
    engine = new_engine(batch_size=8)
    live = [ask(engine, f"r{i}", range(21)) for i in range(8)]
    engine.step()
    assert [one.state for one in live] == ["running"] * 8, "all were admitted before anything was computed"
    list(engine.run())
    assert [one.prefix_hit_tokens for one in live] == [0] + [20] * 7
    assert engine.num_prefill_tokens == 21 + 7


def test_a_wholly_cached_prompt_computes_its_last_block_again() -> None:
    engine = new_engine()
    for name in "ab":
        live = ask(engine, name, range(20))
        list(engine.run())
    assert live.prefix_hit_tokens == 16
    assert works(engine, "b") == [(16, 4)]


def test_the_next_turn_hits_the_answer_but_its_last_token() -> None:
    engine = new_engine()
    first = ask(engine, "first", range(6), answer=[7] * 6)
    list(engine.run())
    # 12 tokens, of which the last was never fed back: two full blocks of four, not three.
    second = ask(engine, "second", [*first.tokens, 5, 5])
    list(engine.run())
    assert second.prefix_hit_tokens == 8
    third = ask(engine, "third", [*second.tokens, 5])
    list(engine.run())
    assert third.prefix_hit_tokens == 12


def test_an_abort_in_the_prompt_leaves_what_was_computed() -> None:
    engine = new_engine()
    ask(engine, "gone", range(40))
    engine.step()  # one chunk of 8
    engine.request_abort()
    engine.step()  # and another, after which it is dropped
    live = ask(engine, "next", range(40))
    list(engine.run())
    assert live.prefix_hit_tokens == 16


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    engine = new_engine(num_blocks=5, batch_size=2)
    old = ask(engine, "old", [1] * 4, answer=range(9))
    young = ask(engine, "young", [2] * 8, answer=range(8))
    list(engine.run())
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    # It had filled three blocks when it gave way, and the old one took the last of them.
    assert (young.resumed_tokens, young.resumed_hit_tokens) == (13, 8)
    assert works(engine, "young") == [(0, 8), (8, 4), (8, 4), (12, 3)]
    assert young.num_decode_steps == 7, "the steps of an undisturbed run"
    assert young.prefix_hit_tokens == 0, "what counts is the first time"


def test_shared_blocks_are_counted_once() -> None:
    """Six blocks do not hold two such prompts, but they do when five blocks are the same."""
    engine = new_engine(num_blocks=8)
    first = ask(engine, "first", range(21), answer=[1] * 3)
    second = ask(engine, "second", [*range(20), 50], answer=[1] * 3)
    engine.step()
    assert second.state == "waiting", "nobody knows yet what they will share"
    while first.in_prefill:
        engine.step()
    engine.step()
    assert (first.state, second.state, second.prefix_hit_tokens) == ("running", "running", 20)
    assert first.block_ids[:5] == second.block_ids[:5] and first.block_ids[5] != second.block_ids[5]
    list(engine.run())
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


def test_a_small_cache_forgets_the_tail_of_the_oldest_prefix_first() -> None:
    engine = new_engine(num_blocks=6)
    for name, start in (("a", 0), ("b", 100), ("c", 200)):
        ask(engine, name, range(start, start + 9))
        list(engine.run())
    hits = {}
    for name, start in (("c2", 200), ("a2", 0)):
        live = ask(engine, name, range(start, start + 9))
        list(engine.run())
        hits[name] = live.prefix_hit_tokens
    assert hits == {"c2": 8, "a2": 4}


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_nothing_is_shared_unless_asked_for(prefix_caching: bool) -> None:
    case = Case([], {}, 2, 8, 4, 50, False, "continuous")
    engine = case.engine(prefix_caching)
    for name in "ab":
        live = ask(engine, name, range(20))
        list(engine.run())
    assert (live.prefix_hit_tokens, live.num_prefill_tokens) == ((16, 4) if prefix_caching else (0, 20))
    assert (live.key_chain is not None) == prefix_caching
