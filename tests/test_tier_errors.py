"""A tier loses blocks: who held them is computed again or fails, and nothing else of a run changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import NS_PER_S, VirtualClock
from dsatrace.engine.engine import Engine
from dsatrace.engine.runner import BlocksLost, OnTierError, Step
from dsatrace.engine.scheduler import MAX_RECOMPUTES, Scheduler
from dsatrace.engine.settings import RunSettings
from dsatrace.workloads.request import Request
from helpers.power import examples
from helpers.simulated_time import TIMES, EveryStep
from test_prefix_caching import Case, SlotKeeper, answers, cases, checked

CAUSE = "remote_pool redis://10.0.0.1:6379: timeout after 5 s"
TORN = (-1,)
"""In a slot that a forward wrote before it failed."""

Losses = Callable[[int, Step], set[int] | None]
"""The blocks that are lost in a forward, by its number; None: it goes well."""


class LossyKeeper(SlotKeeper):
    """Loses blocks. What it has been told is void it drops, so that nobody ever reads it again."""

    def __init__(self, block_size: int, responses: dict[str, list[int]], losses: Losses) -> None:
        super().__init__(block_size, responses)
        self.losses = losses
        self.engine: Engine
        self.num_forwards = self.num_lost = 0
        self.concerned: set[str] = set()  # who held what was lost

    def run(self, step: Step) -> list[list[int]]:
        lost = self.losses(self.num_forwards, step)
        self.num_forwards += 1
        if lost is None:
            return super().run(step)
        self.num_lost += 1
        for live, first_pos, num_tokens, _ in step.work:
            for position in range(first_pos, first_pos + num_tokens * step.num_steps):
                slot = live.block_ids[position // self.block_size], position % self.block_size
                self.slots[slot] = TORN
        self.drop(lost)
        running = self.engine.scheduler.running
        self.concerned |= {live.request_id for live in running if lost & set(live.block_ids)}
        raise BlocksLost(lost, CAUSE)

    def drop(self, block_ids: set[int]) -> None:
        self.slots = {slot: tokens for slot, tokens in self.slots.items() if slot[0] not in block_ids}

    def on_void(self, block_ids: list[int]) -> None:
        pool = self.engine.scheduler.pool
        assert not any(map(pool.num_users, block_ids)), "somebody still reads it"
        self.drop(set(block_ids))

    def check(self) -> None:
        """What is kept of the cache's content is what somebody uses or may find."""
        pool = self.engine.scheduler.pool
        kept = {block_id for block_id, _ in self.slots}
        assert all(pool.num_users(block) or pool.key_of(block) is not None for block in kept)


def lossy_engine(
    case: Case, losses: Losses, *, prefix_caching: bool = True, on_tier_error: OnTierError = "recompute"
) -> tuple[Engine, LossyKeeper]:
    plain = case.engine(prefix_caching)
    runner = LossyKeeper(case.block_size, case.responses, losses)
    engine = runner.engine = Engine(
        plain.scheduler, runner, run=RunSettings(clock=VirtualClock()), on_tier_error=on_tier_error
    )
    engine.scheduler.pool.on_void = runner.on_void
    commit = engine.scheduler.commit

    def checked_commit(*args):
        tokens = commit(*args)
        runner.check()
        return tokens

    engine.scheduler.commit = checked_commit  # type: ignore[method-assign]
    return engine, runner


@dataclasses.dataclass(frozen=True)
class DrawnLosses:
    """By forward: entries of the step's own tables, as (request, block) counted around, and any blocks."""

    lost: dict[int, tuple[list[tuple[int, int]], list[int]]]

    def __call__(self, forward: int, step: Step) -> set[int] | None:
        if forward not in self.lost:
            return None
        chosen, anywhere = self.lost[forward]
        tables = [work.live.block_ids for work in step.work]
        held = [tables[i % len(tables)] for i, _ in chosen]
        return {table[j % len(table)] for table, (_, j) in zip(held, chosen, strict=True)} | set(anywhere)


def drawn_losses(num_blocks: int, most: int) -> st.SearchStrategy[DrawnLosses]:
    """In up to `most` forwards."""
    of_step = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=2)
    anywhere = st.lists(st.integers(0, num_blocks - 1), max_size=3)
    forwards = st.dictionaries(st.integers(0, 40), st.tuples(of_step, anywhere), max_size=most)
    return forwards.map(DrawnLosses)


@st.composite
def lossy_cases(draw: st.DrawFn, most: int) -> tuple[Case, Losses, bool]:
    case = draw(cases())
    case = dataclasses.replace(case, num_blocks=draw(st.integers(2, 24) | st.just(case.num_blocks)))
    return case, draw(drawn_losses(case.num_blocks, most)), draw(st.booleans())


@settings(max_examples=examples(150), deadline=None)
@given(lossy_cases(most=MAX_RECOMPUTES))
def test_answers_are_those_of_an_undisturbed_run(lossy: tuple[Case, Losses, bool]) -> None:
    """`checked` holds the pool and the order of the requests after every step, `SlotKeeper` that no step
    reads what was not computed, or was computed and lost."""
    case, losses, prefix_caching = lossy
    engine, runner = lossy_engine(case, losses, prefix_caching=prefix_caching)
    ended = checked(engine, case.requests)
    assert answers(ended) == answers(checked(case.engine(prefix_caching), case.requests))
    recomputed = {live.request_id for live in ended if live.num_recomputes}
    assert recomputed >= runner.concerned
    assert all(
        live.num_recomputes <= runner.num_lost and live.error is None
        for live in ended
        if live.tokens_left == 0
    )


@settings(max_examples=examples(100), deadline=None)
@given(lossy_cases(most=40))
def test_who_fails_keeps_its_answer_so_far_and_nobody_starves(lossy: tuple[Case, Losses, bool]) -> None:
    case, losses, prefix_caching = lossy
    undisturbed = answers(checked(case.engine(prefix_caching), case.requests))
    engine, runner = lossy_engine(case, losses, prefix_caching=prefix_caching)
    for live in checked(engine, case.requests):
        state, answer, num_decode_steps = undisturbed[live.request_id]
        if live.state != "failed":
            assert (live.state, live.answer, live.num_decode_steps) == (state, answer, num_decode_steps)
            continue
        assert live.recomputes_in_vain == MAX_RECOMPUTES < runner.num_lost
        assert live.answer == answer[: live.num_answered] != answer
        assert live.error and live.error.endswith(CAUSE)
        assert live.finish_s is not None


@settings(max_examples=examples(75), deadline=None)
@given(lossy_cases(most=5))
def test_with_fail_only_those_end_that_hold_what_was_lost(lossy: tuple[Case, Losses, bool]) -> None:
    case, losses, prefix_caching = lossy
    undisturbed = answers(checked(case.engine(prefix_caching), case.requests))
    engine, runner = lossy_engine(case, losses, prefix_caching=prefix_caching, on_tier_error="fail")
    ended = checked(engine, case.requests)
    failed = {live.request_id for live in ended if live.state == "failed"}
    # Where nobody held them and nobody could find them, the step's own requests end.
    assert failed >= runner.concerned
    for live in ended:
        assert live.num_recomputes == 0
        if live.request_id in failed:
            assert live.error == f"request {live.request_id}: a tier lost its KV: {CAUSE}"
        else:
            assert answers([live])[live.request_id] == undisturbed[live.request_id]


@settings(max_examples=examples(50), deadline=None)
@given(cases(), st.booleans(), st.sampled_from(["own", "all", "nobody's"]))
def test_a_dead_store_ends_every_request(case: Case, prefix_caching: bool, which: str) -> None:
    def losses(forward: int, step: Step) -> set[int]:
        if which == "own":
            return {block for work in step.work for block in work.live.block_ids}
        return set(range(case.num_blocks)) if which == "all" else set()

    engine, runner = lossy_engine(case, losses, prefix_caching=prefix_caching)
    ended = checked(engine, case.requests)
    assert len(ended) == len(case.requests)
    for live in ended:
        if live.state == "rejected":
            continue
        assert (live.state, live.num_recomputes, live.answer) == ("failed", MAX_RECOMPUTES, [])
        assert live.error == (
            f"request {live.request_id}: a tier lost its KV "
            f"(and 3 times more while it was computed again): {CAUSE}"
        )
    assert engine.num_prefill_tokens == engine.num_decode_tokens == 0
    assert runner.num_forwards == runner.num_lost <= (MAX_RECOMPUTES + 1) * len(ended)


def lose_at(*forwards: int, block: Callable[[Step], int]) -> Losses:
    return lambda forward, step: {block(step)} if forward in forwards else None


def serve_two(losses: Losses, num_blocks: int = 20, **kwargs) -> tuple[Engine, LossyKeeper, list]:
    """Two requests of 6 and 10 tokens that run together; blocks of 4, chunks of 8."""
    responses = {"old": [7] * 12, "young": [8] * 12}
    case = Case([], responses, 2, 8, 4, num_blocks, False, "continuous")
    engine, runner = lossy_engine(case, losses, **kwargs)
    live = [
        engine.submit(Request(name, tuple(range(start, start + length)), 12, stop_at_eos=False))
        for name, start, length in (("old", 0, 6), ("young", 100, 10))
    ]
    return engine, runner, live


def test_a_loss_within_a_jump_commits_nothing_of_it() -> None:
    """Forwards 0 to 2 are prompts, the next would be all decode steps at once."""
    engine, runner, (old, young) = serve_two(lose_at(3, block=lambda step: step.work[1].live.block_ids[-1]))
    for _ in range(3):
        engine.step()
    before_ns, decode_s = engine.clock.now_ns, engine.decode_s
    steps: list[Step] = []
    run = runner.run
    runner.run = lambda step: [steps.append(step), run(step)][1]  # type: ignore
    progress = engine.step()
    assert progress.tokens == progress.ended == []
    assert steps[0].num_steps == 11
    took_ns = TIMES.of(steps[0], 11)
    assert engine.clock.now_ns - before_ns == took_ns, "time goes by as the runner models it"
    assert engine.decode_s - decode_s == pytest.approx(took_ns / NS_PER_S)
    assert engine.num_decode_tokens == 0
    assert (old.num_computed, old.num_answered, old.num_decode_steps, old.num_recomputes) == (6, 1, 0, 0)
    assert (young.num_computed, young.num_answered, young.num_decode_steps) == (0, 1, 0)
    assert (young.state, young.block_ids, young.num_recomputes) == ("running", [], 1)
    list(engine.run())
    assert (old.answer, young.answer) == ([7] * 12, [8] * 12)
    assert (old.num_decode_steps, young.num_decode_steps) == (11, 11)
    assert young.num_preemptions == 0


def test_the_prefix_before_a_lost_block_is_kept() -> None:
    engine, runner, (_, young) = serve_two(lose_at(3, block=lambda step: step.work[1].live.block_ids[1]))
    for _ in range(4):
        engine.step()
    list(engine.run())
    assert [work[1:] for work in runner.works if work[0] == "young"][:3] == [(0, 8), (8, 2), (4, 4)]
    assert (young.resumed_tokens, young.resumed_hit_tokens) == (11, 4)


def test_blocks_after_a_lost_one_are_found_again() -> None:
    case = Case([], {name: [1] for name in "abcd"}, 1, 8, 4, 20, False, "continuous")
    lost: list[int] = []
    engine, _ = lossy_engine(case, lambda forward, step: {lost.pop()} if lost else None)
    prompt = tuple(range(17))

    def ask(name: str) -> int | None:
        live = engine.submit(Request(name, prompt, 1, stop_at_eos=False))
        list(engine.run())
        return live.prefix_hit_tokens

    assert [ask("a"), ask("b")] == [0, 16]
    lost.append(1)  # the second of the four cached blocks; the next request has shared it
    assert ask("c") == 16
    assert ask("d") == 16


def test_an_unused_cached_block_may_be_lost() -> None:
    case = Case([], {name: [1] for name in "ab"}, 1, 8, 4, 20, False, "continuous")
    engine, runner = lossy_engine(case, lambda forward, step: {0} if forward == 2 else None)
    for name, start in (("a", 0), ("b", 50)):
        live = engine.submit(Request(name, tuple(range(start, start + 9)), 1, stop_at_eos=False))
        list(engine.run())
    assert runner.num_lost == 1
    assert (live.state, live.num_recomputes) == ("length", 0)
    assert engine.scheduler.pool.key_of(0) is None


def test_the_youngest_gives_way_to_one_that_starts_over() -> None:
    """Nobody else's blocks are lost, but the first has shared some of them and now needs its own."""
    scheduler = Scheduler(new_pool(8, 4, True), 3, 100)
    prompt = (1,) * 12
    live = [scheduler.add(Request(name, (*prompt, i, i), 8)) for i, name in enumerate("abc")]
    while any(one.in_prefill for one in live):
        step = scheduler.schedule(0.0)
        scheduler.commit(step, [[7] for _ in step.sampled], 0.0)
    assert [one.state for one in live] == ["running"] * 3 and scheduler.pool.num_free == 2
    step = scheduler.schedule(0.0)
    own = frozenset(live[0].block_ids[-1:])
    assert scheduler.lose(step, own, 0.0, recompute=True, cause=CAUSE) == []
    assert [one.state for one in live] == ["running", "running", "waiting"]
    assert [one.num_recomputes for one in live] == [1, 0, 0]
    assert [one.num_preemptions for one in live] == [0, 0, 1]
    scheduler.pool.check_integrity()


def test_a_new_token_gives_a_request_its_tries_back() -> None:
    """Lost three times, a token, lost three times: it ends as if nothing had been."""
    attempts: list[int] = []

    def losses(forward: int, step: Step) -> set[int] | None:
        live = step.work[0].live
        if step.is_prefill:
            return None
        attempts.append(live.num_answered)
        return set(live.block_ids) if attempts.count(live.num_answered) <= MAX_RECOMPUTES else None

    case = Case([], {"a": [3, 4, 5, 6]}, 1, 8, 4, 20, False, "continuous")
    engine, _ = lossy_engine(case, losses)
    engine.clock = EveryStep()
    live = engine.submit(Request("a", (1,) * 9, 4, stop_at_eos=False))
    list(engine.run())
    assert (live.state, live.answer) == ("length", [3, 4, 5, 6])
    assert (live.num_recomputes, live.num_decode_steps) == (3 * MAX_RECOMPUTES, 3)


def test_a_failed_forward_takes_its_measured_time() -> None:
    engine, runner, _ = serve_two(lose_at(0, block=lambda step: step.work[0].live.block_ids[0]))
    runner.modelled_ns = lambda step, num_steps: None  # type: ignore
    engine.step()
    assert engine.clock.now_ns > 0
    assert engine.num_prefill_tokens == 0


def test_a_failed_request_is_served_and_not_judged() -> None:
    engine, _, (old, young) = serve_two(
        lose_at(3, block=lambda step: step.work[0].live.block_ids[0]), on_tier_error="fail"
    )
    engine.judge = lambda live: 1.0
    ended = checked(engine, [])  # those submitted
    assert [(one.state, one.score) for one in ended] == [("failed", None), ("length", 1.0)]
    assert ended == [old, young]
    assert old.answer == [7] and old.ended


def test_an_abort_that_was_asked_for_is_heard_behind_a_loss() -> None:
    engine, _, live = serve_two(lose_at(1, block=lambda step: step.work[0].live.block_ids[0]))
    engine.step()
    engine.request_abort()
    progress = engine.step()
    assert progress.aborted and set(progress.ended) == set(live)
    assert [one.state for one in live] == ["aborted", "aborted"]
    assert engine.scheduler.pool.num_free == 20


def test_a_loss_says_its_cause_and_how_much() -> None:
    lost = BlocksLost([3, 17, 3], CAUSE)
    assert lost.block_ids == {3, 17}
    assert str(lost) == f"{CAUSE}; 2 blocks lost"
