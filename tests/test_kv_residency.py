"""The residency map under every policy against dictionaries and the replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.tiers.residency import ABSENT, STAMP_POLICIES, TIER_POLICIES, Moves, Residency, StampOrder
from helpers.plain_cache import plain_simulate
from helpers.plain_order import PlainOrder
from helpers.plain_policies import make_policy
from helpers.power import examples

NUM_UNITS = 12


@dataclasses.dataclass
class Held:
    """What the plain map knows of one unit."""

    entered: int
    used: int
    num_uses: int = 0
    dirty: bool = False


GOES_FIRST: dict[str, Callable[[Held], Any]] = {
    "lru": lambda held: held.used,
    "fifo": lambda held: held.entered,
    "mru": lambda held: -held.used,
    "filo": lambda held: -held.entered,
    "lfu": lambda held: (held.num_uses, held.used),
}
"""The policies that one line describes. The others are held to the registry's replay below."""


class PlainResidency:
    """The same in the fewest words: a dictionary of the units that are here."""

    def __init__(self, num_slots: int, policy: str) -> None:
        self.num_slots = num_slots
        self.goes_first = GOES_FIRST[policy]
        self.units: dict[int, Held] = {}
        self.clock = itertools.count()

    def admit(self, units: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
        missing = [unit for unit in units if unit not in self.units]
        victims = []
        while len(self.units) + len(missing) > self.num_slots:
            others = [unit for unit in self.units if unit not in units]
            victim = min(others, key=lambda unit: self.goes_first(self.units[unit]))
            victims.append((victim, self.units.pop(victim).dirty))
        for unit in units:
            now = next(self.clock)
            if unit in missing:
                self.units[unit] = Held(entered=now, used=now)
            else:
                self.units[unit].used = now
                self.units[unit].num_uses += 1
        return missing, victims


class Carried:
    """A residency whose moves are carried out: checks on each that the map is one and the bytes lie there."""

    def __init__(self, num_slots: int, policy: str) -> None:
        self.residency = Residency(NUM_UNITS, num_slots, policy)
        self.memory: dict[int, int] = {}  # slot -> the unit whose bytes lie there
        self.dirty: dict[int, bool] = {}  # of the units that are here

    def apply(self, action: str, wanted: list[int]) -> Moves | None:
        units, residency = np.array(wanted, dtype=np.int64), self.residency
        if action == "drop":
            residency.drop(units)
            for unit in wanted:
                self.dirty.pop(unit, None)
            return None
        moves = residency.admit(units)
        victims, missing = moves.victims.tolist(), [unit for unit in wanted if unit not in self.dirty]
        assert moves.units.tolist() == missing
        assert len(victims) == max(0, len(self.dirty) + len(missing) - residency.num_slots)
        assert not set(victims) & set(wanted)
        assert moves.victim_dirty.tolist() == [self.dirty.pop(unit) for unit in victims]
        assert [self.memory[slot] for slot in moves.victim_slots.tolist()] == victims
        assert len(set(moves.slots.tolist())) == len(missing)
        assert (moves.slots[len(missing) - len(victims) :] == moves.victim_slots).all()
        self.memory.update(zip(moves.slots.tolist(), missing, strict=True))
        self.dirty.update(dict.fromkeys(missing, False))
        if action == "write":
            residency.mark_dirty(units)
            self.dirty.update(dict.fromkeys(wanted, True))
        return moves

    def check(self) -> None:
        residency = self.residency
        resident = np.flatnonzero(residency.slot_of != ABSENT)
        assert set(resident.tolist()) == self.dirty.keys()
        assert residency._is_dirty[residency.slot_of[resident]].tolist() == [
            self.dirty[unit] for unit in resident.tolist()
        ]
        assert [self.memory[slot] for slot in residency.slot_of[resident].tolist()] == resident.tolist()
        assert (residency.unit_of[residency.slot_of[resident]] == resident).all()
        assert np.count_nonzero(residency.unit_of != ABSENT) == len(resident)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int]]]]:
    num_slots = draw(st.integers(1, 6))
    unit_lists = st.lists(st.integers(0, NUM_UNITS - 1), max_size=num_slots, unique=True)
    actions = st.tuples(st.sampled_from(["admit", "admit", "write", "drop"]), unit_lists)
    return num_slots, draw(st.lists(actions, max_size=30))


EACH_BY_ALL = settings(max_examples=examples(75), deadline=None)
"""To draw a history takes longer than to carry it out: each goes through all policies."""


@EACH_BY_ALL
@given(histories())
def test_every_policy_keeps_the_map(history) -> None:
    for policy in TIER_POLICIES:
        keep_the_map(policy, *history)


def keep_the_map(policy: str, num_slots: int, actions) -> None:
    carried = Carried(num_slots, policy)
    for action, wanted in actions:
        carried.apply(action, wanted)
        carried.check()


@EACH_BY_ALL
@given(histories())
def test_the_victims_are_those_of_a_dictionary(history) -> None:
    for policy in GOES_FIRST:
        compare_with_a_dictionary(policy, *history)


def compare_with_a_dictionary(policy: str, num_slots: int, actions) -> None:
    carried, plain = Carried(num_slots, policy), PlainResidency(num_slots, policy)
    for action, wanted in actions:
        moves = carried.apply(action, wanted)
        if moves is None:
            for unit in wanted:
                plain.units.pop(unit, None)
            continue
        missing, victims = plain.admit(wanted)
        assert moves.units.tolist() == missing
        assert list(zip(moves.victims.tolist(), moves.victim_dirty.tolist(), strict=True)) == victims
        if action == "write":
            for unit in wanted:
                plain.units[unit].dirty = True


@EACH_BY_ALL
@given(histories())
def test_the_fast_orders_equal_the_plain_policies(history) -> None:
    for policy in TIER_POLICIES:
        compare_with_the_plain_policy(policy, *history)


def compare_with_the_plain_policy(policy: str, num_slots: int, actions) -> None:
    fast, plain = Carried(num_slots, policy), Carried(num_slots, policy)
    plain.residency._order = PlainOrder(policy, num_slots, plain.residency.slot_of)
    assert isinstance(fast.residency._order, StampOrder) == (policy in STAMP_POLICIES)
    for action, wanted in actions:
        moves, others = fast.apply(action, wanted), plain.apply(action, wanted)
        if moves is None or others is None:
            assert moves is others
            continue
        for field in dataclasses.fields(Moves):
            assert getattr(moves, field.name).tolist() == getattr(others, field.name).tolist(), field.name


@pytest.mark.parametrize("policy", [name for name in TIER_POLICIES if name != "random"])
def test_the_victims_are_those_of_the_replay(policy: str) -> None:
    """An admission is to a tier what a request is to a cache; a request's blocks are used tail first.

    Not so `random`, whose draw depends on the order in which blocks were pinned.
    """
    rng = np.random.default_rng(5)
    num_units, num_slots = 60, 12
    weights = 1 / np.arange(1, num_units + 1)
    admissions = [
        rng.choice(num_units, rng.integers(1, num_slots), replace=False, p=weights / weights.sum()).tolist()
        for _ in range(400)
    ]
    names = list(dict.fromkeys(unit for units in admissions for unit in reversed(units)))
    stream = AccessStream.of([list(reversed(units)) for units in admissions])
    _, found, evicted = plain_simulate(stream, make_policy(policy, num_slots), stream.lengths)
    residency = Residency(num_units, num_slots, policy)
    victims = []
    for request, units in enumerate(admissions):
        moves = residency.admit(np.array(units))
        assert len(units) - len(moves.units) == found[request]
        victims += [(request, victim) for victim in moves.victims.tolist()]
    assert victims == [(request, names[block]) for request, block in evicted]
    assert len(victims) > 100


def test_random_is_repeatable_and_even() -> None:
    runs = []
    for _ in range(2):
        residency = Residency(1000, 4, "random")
        runs.append([unit for i in range(1000) for unit in residency.admit(np.array([i])).victims.tolist()])
    assert runs[0] == runs[1]
    stays = np.array([i + 4 - unit for i, unit in enumerate(runs[0])])  # admissions until it went
    assert np.mean(stays == 1) == pytest.approx(1 / 4, abs=0.06)
    assert np.mean(stays) == pytest.approx(4, abs=0.5)


def test_tier_policies_are_those_a_unit_can_use() -> None:
    """Those left out look at the future, at workloads or at a block's place in its chain."""
    assert set(POLICIES) - set(TIER_POLICIES) == {"opt", "priority", "wa-lru", "wa-prob", "t-lru"}
    assert set(TIER_POLICIES) <= set(POLICIES)
    with pytest.raises(UserError, match=r"--tier-policy opt: no such policy; use one of lru, fifo, .*random"):
        Residency(4, 2, "opt")


def test_a_residency_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 unit and 1 slot"):
        Residency(4, 0)
