"""The residency map against an ordered dictionary, and who asked for which units."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.kv.fetches import FetchCounters, SelectedUnits, layer_fetch, num_runs
from dsatrace.kv.residency import ABSENT, Residency

NUM_UNITS = 12


class PlainResidency:
    """The same in the fewest words: unit -> dirty, least recently used first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.units: OrderedDict[int, bool] = OrderedDict()

    def admit(self, units: list[int]) -> tuple[list[int], list[tuple[int, bool]]]:
        missing = [unit for unit in units if unit not in self.units]
        for unit in units:
            if unit in self.units:
                self.units.move_to_end(unit)
        num_victims = max(0, len(self.units) + len(missing) - self.num_slots)
        victims = [self.units.popitem(last=False) for _ in range(num_victims)]
        for unit in units:
            self.units[unit] = self.units.get(unit, False)
            self.units.move_to_end(unit)
        return missing, victims


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int]]]]:
    num_slots = draw(st.integers(1, 6))
    unit_lists = st.lists(st.integers(0, NUM_UNITS - 1), max_size=num_slots, unique=True)
    actions = st.tuples(st.sampled_from(["admit", "admit", "write", "drop"]), unit_lists)
    return num_slots, draw(st.lists(actions, max_size=30))


@settings(max_examples=300, deadline=None)
@given(histories())
def test_it_is_lru_and_never_evicts_what_it_was_asked_for(history) -> None:
    num_slots, actions = history
    residency, plain = Residency(NUM_UNITS, num_slots), PlainResidency(num_slots)
    memory: dict[int, int] = {}  # slot -> the unit whose bytes lie there, carried out by the moves
    for action, wanted in actions:
        units = np.array(wanted, dtype=np.int64)
        if action == "drop":
            residency.drop(units)
            for unit in wanted:
                plain.units.pop(unit, None)
            continue
        moves = residency.admit(units)
        missing, victims = plain.admit(wanted)
        assert moves.units.tolist() == missing
        assert list(zip(moves.victims.tolist(), moves.victim_dirty.tolist(), strict=True)) == victims
        assert [memory[slot] for slot in moves.victim_slots.tolist()] == moves.victims.tolist()
        assert len(set(moves.slots.tolist())) == len(missing)
        memory.update(zip(moves.slots.tolist(), missing, strict=True))
        if action == "write":
            residency.mark_dirty(units)
            plain.units.update(dict.fromkeys(wanted, True))
        assert residency.is_resident(units).all()
        resident = np.flatnonzero(residency.slot_of != ABSENT)
        assert set(resident.tolist()) == plain.units.keys()
        assert residency.is_dirty(resident).tolist() == [plain.units[unit] for unit in resident.tolist()]
        assert [memory[slot] for slot in residency.slot_of[resident].tolist()] == resident.tolist()
        assert (residency.unit_of[residency.slot_of[resident]] == resident).all()


def test_a_residency_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 unit and 1 slot"):
        Residency(4, 0)


@st.composite
def selections(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Slots `(N, K)` of rows of up to three requests, distinct in a row; -1 behind them."""
    num_requests = draw(st.integers(1, 3))
    owners = sorted(draw(st.lists(st.integers(0, num_requests - 1), min_size=1, max_size=5)))
    slots = np.full((len(owners), 6), -1, dtype=np.int64)
    for row in slots:
        chosen = draw(st.lists(st.integers(0, 30), max_size=6, unique=True))
        row[: len(chosen)] = chosen
    return slots, np.array(owners, dtype=np.int64), num_requests


@settings(max_examples=300, deadline=None)
@given(selections(), st.sampled_from([1, 4]), st.sets(st.integers(0, 30)))
def test_who_is_charged_for_what(selection, unit_tokens: int, resident: set[int]) -> None:
    slots, owners, num_requests = selection
    selected = SelectedUnits.of(slots, owners, num_requests, unit_tokens)
    missed = np.array([unit not in resident for unit in selected.units.tolist()], dtype=bool)
    fetch = layer_fetch(5, selected, missed)
    charged_units: set[int] = set()
    charged_tokens: set[int] = set()
    for request in range(num_requests):
        tokens = {slot for slot in slots[owners == request].ravel().tolist() if slot >= 0}
        units = {token // unit_tokens for token in tokens}
        lacking = units - resident
        assert fetch.requested_tokens[request] == len(tokens)
        assert fetch.requested_units[request] == len(units)
        assert fetch.missed_units[request] == len(lacking)
        assert fetch.missed_tokens[request] == sum(token // unit_tokens in lacking for token in tokens)
        assert fetch.charged_units[request] == len(lacking - charged_units)
        new = {token for token in tokens - charged_tokens if token // unit_tokens in lacking}
        assert fetch.charged_tokens[request] == len(new)
        charged_units |= lacking
        charged_tokens |= new
    assert fetch.num_missed == len(charged_units) == fetch.charged_units.sum()
    assert set(selected.units.tolist()) == {
        slot // unit_tokens for slot in slots.ravel().tolist() if slot >= 0
    }
    assert (fetch.hit_units + fetch.missed_units == fetch.requested_units).all()


def test_runs_and_sums() -> None:
    assert num_runs(np.array([7, 3, 4, 9, 8])) == 2
    assert num_runs(np.array([], dtype=np.int64)) == 0
    once = FetchCounters(requested_units=5, missed_units=2, bytes_read=64)
    assert once + once - once == once
    assert (once + once).hit_units == 6
