"""A stack of stores against a dictionary, whatever its stores do, and against a plain write-back cache."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store, unit_keys
from dsatrace.kv.stores.opening import open_store
from dsatrace.kv.tiers.residency import TIER_POLICIES
from dsatrace.kv.tiers.stack import LOCAL, LOST, REMOTE, TierStack
from dsatrace.schema import TIER_NAMES
from helpers.flaky_store import FlakyStore
from helpers.memory_store import MemoryStore
from helpers.power import examples
from helpers.stores import opener_of, valkey, valkey_server

__all__ = ["valkey_server"]

U = 16  # bytes
NUM_LAYERS, UNITS_PER_LAYER = 2, 5
Action = tuple[str, int, list[int]]


def histories(max_size: int = 40) -> st.SearchStrategy[list[Action]]:
    units = st.lists(st.integers(0, UNITS_PER_LAYER - 1), max_size=UNITS_PER_LAYER, unique=True)
    names = st.sampled_from(["put", "put", "fetch", "fetch", "drop"])
    return st.lists(st.tuples(names, st.integers(0, NUM_LAYERS - 1), units), max_size=max_size)


def stack_of(local: Store | None, remote: Store | None, policy: str = "lru") -> TierStack:
    return TierStack(local, remote, num_layers=NUM_LAYERS, units_per_layer=UNITS_PER_LAYER, policy=policy)


class Checked:
    """A stack beside a dictionary of what was stored last; every byte that comes back is compared."""

    def __init__(self, stack: TierStack) -> None:
        self.stack = stack
        self.truth: dict[tuple[int, int], bytes] = {}
        self.version = 0

    def rows_of(self, num_units: int) -> np.ndarray:
        return 1 + 3 * np.arange(num_units)

    def put(self, layer_id: int, units: list[int]) -> np.ndarray:
        self.version += 1
        rows = self.rows_of(len(units))
        data = np.zeros((3 * len(units) + 2, self.stack.unit_bytes), dtype=np.uint8)
        for row, unit in zip(rows, units, strict=True):
            data[row, :8] = np.array([self.version << 16 | layer_id << 8 | unit]).view(np.uint8)
        stored = self.stack.put(layer_id, np.array(units, dtype=np.int64), data, rows)
        assert stored.shape == (len(units),)
        assert stored.dtype == bool
        for row, unit, is_stored in zip(rows, units, stored, strict=True):
            self.truth.pop((layer_id, unit), None)
            if is_stored:
                self.truth[layer_id, unit] = data[row].tobytes()
        return stored

    def fetch(self, layer_id: int, units: list[int]) -> np.ndarray:
        rows = self.rows_of(len(units))
        out = np.full((3 * len(units) + 2, self.stack.unit_bytes), 77, dtype=np.uint8)
        tiers = self.stack.fetch(layer_id, np.array(units, dtype=np.int64), out, rows)
        assert tiers.shape == (len(units),)
        assert tiers.dtype == np.int8
        for row, unit, tier in zip(rows, units, tiers, strict=True):
            if tier != LOST:
                assert out[row].tobytes() == self.truth[layer_id, unit]
        assert (np.delete(out, rows, axis=0) == 77).all()
        return tiers

    def drop(self, layer_id: int, units: list[int]) -> None:
        self.stack.drop(layer_id, np.array(units, dtype=np.int64))
        for unit in units:
            self.truth.pop((layer_id, unit), None)

    def is_held_by(self, store: MemoryStore, layer_id: int, unit: int) -> bool:
        """Whether the store has the unit's current version."""
        key = int(unit_keys(layer_id, np.array([unit]))[0])
        return store._open_units().get(key) == self.truth[layer_id, unit]


def members(local_capacity: int | None, remote_capacity: int | None) -> tuple[MemoryStore | None, ...]:
    """0 units: no such store."""
    return tuple(
        MemoryStore(U, capacity) if capacity != 0 else None for capacity in (local_capacity, remote_capacity)
    )


@settings(max_examples=examples(200), deadline=None)
@given(
    st.sampled_from([(c, None) for c in (0, 1, 2, 3, 4, 7, 10, None)] + [(10, 0), (None, 0)]),
    st.sampled_from(TIER_POLICIES),
    histories(),
)
def test_what_was_put_last_is_what_is_fetched(capacities, policy: str, history: list[Action]) -> None:
    """Nothing fails and all units fit somewhere: none is ever lost, at any capacity of the local pool."""
    stack = stack_of(*members(*capacities), policy)
    checked = Checked(stack)
    for action, layer_id, units in history:
        if action == "put":
            assert checked.put(layer_id, units).all()
        elif action == "drop":
            checked.drop(layer_id, units)
        else:
            tiers = checked.fetch(layer_id, units)
            assert (tiers != LOST).tolist() == [(layer_id, unit) in checked.truth for unit in units]
    assert stack.last_error is None
    everything = np.concatenate([unit_keys(i, np.arange(UNITS_PER_LAYER)) for i in range(NUM_LAYERS)])
    held = [(key >> 48, key & 0xFF) for key in everything.tolist()]
    holds = [store.contains(everything) for store in stack._stores.values()]
    assert np.any(holds, axis=0).tolist() == [unit in checked.truth for unit in held]


def check_room(stack: TierStack) -> None:
    """Victims are chosen among exactly the units that the local pool is known to hold."""
    if stack._residency is not None:
        here = stack._residency.is_resident(np.arange(NUM_LAYERS * UNITS_PER_LAYER))
        assert here.tolist() == stack._is_current[LOCAL].tolist()


@settings(max_examples=examples(300), deadline=None)
@given(
    st.sampled_from([(c, r) for c in (0, 1, 2, 4, None) for r in (0, 3, None) if (c, r) != (0, 0)]),
    st.sampled_from(TIER_POLICIES),
    histories(60),
    st.integers(0, 2**32),
    st.sampled_from([(0.3, 0.0), (0.0, 0.3), (0.1, 0.1), (0.5, 0.5)]),
)
def test_whatever_the_stores_do_no_byte_is_wrong(capacities, policy, history, seed, rates) -> None:
    rng = random.Random(seed)
    local, remote = (
        FlakyStore(U, capacity, rng, rate) if capacity != 0 else None
        for capacity, rate in zip(capacities, rates, strict=True)
    )
    stack = stack_of(local, remote, policy)
    checked = Checked(stack)
    stores = [store for store in (local, remote) if store is not None]
    for action, layer_id, units in history:
        errors_before = sum(store.num_errors for store in stores)
        if action == "put":
            checked.put(layer_id, units)
        elif action == "drop":
            checked.drop(layer_id, units)
        else:
            tiers = checked.fetch(layer_id, units)
            failed = sum(store.num_errors for store in stores) > errors_before
            for unit in np.array(units, dtype=np.int64)[tiers == LOST].tolist():
                if (layer_id, unit) in checked.truth and not failed:
                    assert not any(checked.is_held_by(store, layer_id, unit) for store in stores)
        check_room(stack)
        num_errors = sum(store.num_errors for store in stores)
        assert (stack.last_error is None) == (num_errors == errors_before)
    for store in stores:
        store.rate = 0.0  # they have recovered: what any of them holds is given
    for layer_id, unit in list(checked.truth):
        held = any(checked.is_held_by(store, layer_id, unit) for store in stores)
        assert (checked.fetch(layer_id, [unit])[0] != LOST) == held


class PlainWriteBack:
    """Which tier gives what, and what is written back: an LRU cache in the fewest words."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.dirty: OrderedDict[tuple[int, int], bool] = OrderedDict()  # of the units in the local pool
        self.remote: set[tuple[int, int]] = set()
        self.num_written_back = self.num_promoted = self.num_direct = self.num_into_local = 0

    def admit(self, units: list[tuple[int, int]]) -> list[tuple[int, int]]:
        room = self.capacity - sum(unit in self.dirty for unit in units)
        fits = [unit for unit in units if unit in self.dirty or (room := room - 1) >= 0]
        for unit in fits:
            if unit in self.dirty:
                self.dirty.move_to_end(unit)
        while len(self.dirty.keys() | set(fits)) > self.capacity:
            victim, dirty = self.dirty.popitem(last=False)
            self.num_written_back += dirty
            self.remote.add(victim)
        for unit in fits:
            self.dirty.setdefault(unit, False)
            self.dirty.move_to_end(unit)
        return fits

    def put(self, units: list[tuple[int, int]]) -> None:
        self.remote.difference_update(units)
        fits = self.admit(units)
        self.dirty.update(dict.fromkeys(fits, True))
        self.num_into_local += len(fits)
        self.num_direct += len(units) - len(fits)
        self.remote.update(set(units) - set(fits))

    def fetch(self, units: list[tuple[int, int]]) -> list[int]:
        tiers = [LOCAL if u in self.dirty else REMOTE if u in self.remote else LOST for u in units]
        known = [unit for unit, tier in zip(units, tiers, strict=True) if tier != LOST]
        before = set(self.dirty)
        self.num_promoted += len(set(self.admit(known)) - before)
        return tiers

    def drop(self, units: list[tuple[int, int]]) -> None:
        for unit in units:
            self.dirty.pop(unit, None)
        self.remote.difference_update(units)


@settings(max_examples=examples(150), deadline=None)
@given(st.sampled_from([1, 2, 3, 5, 9, 10]), histories())
def test_it_is_a_write_back_cache_and_its_counts_add_up(capacity: int, history: list[Action]) -> None:
    stack = stack_of(MemoryStore(U, capacity), MemoryStore(U))
    checked, plain = Checked(stack), PlainWriteBack(capacity)
    num_given = {LOCAL: 0, REMOTE: 0, LOST: 0}
    for action, layer_id, units in history:
        _, local, remote = stack.stats()
        written_back = plain.num_written_back
        names = [(layer_id, unit) for unit in units]
        if action == "put":
            checked.put(layer_id, units)
            plain.put(names)
        elif action == "drop":
            checked.drop(layer_id, units)
            plain.drop(names)
        else:
            tiers = checked.fetch(layer_id, units).tolist()
            assert tiers == plain.fetch(names)
            for tier in tiers:
                num_given[tier] += 1
            did_write_back = plain.num_written_back > written_back
            _, local_after, remote_after = stack.stats()
            assert (local_after - local).read_batches == (LOCAL in tiers) + did_write_back
            assert (remote_after - remote).read_batches == (REMOTE in tiers)
            assert (remote_after - remote).write_batches == did_write_back
            assert (local_after - local).write_batches <= 1
    hbm, local, remote = stack.stats()
    assert hbm is None
    assert local.hit_units == num_given[LOCAL] + plain.num_written_back
    assert remote.hit_units == num_given[REMOTE]
    assert local.bytes_read + remote.bytes_read == U * (
        num_given[LOCAL] + num_given[REMOTE] + plain.num_written_back
    )
    assert remote.stored_units == plain.num_written_back + plain.num_direct
    assert local.stored_units == plain.num_into_local + plain.num_promoted
    assert (local.missed_units, remote.missed_units) == (0, 0)  # no store is asked for a unit that it lacks


def test_a_victim_that_cannot_be_written_back_stays() -> None:
    rng = random.Random(0)
    local, remote = FlakyStore(U, 2, rng, 0.0), FlakyStore(U, None, rng, 0.0)
    checked = Checked(stack_of(local, remote))
    assert checked.put(0, [0, 1]).all()
    remote.rate = 1.0
    assert checked.put(0, [2]).tolist() == [False]  # nor has the newcomer any place to go to
    assert str(checked.stack.last_error) == "failure 2"  # the write-back, and the newcomer
    assert checked.fetch(0, [0, 1, 2]).tolist() == [LOCAL, LOCAL, LOST]
    remote.rate = 0.0
    assert checked.put(0, [2]).all()
    assert sorted(checked.fetch(0, [0, 1, 2]).tolist()) == [LOCAL, LOCAL, REMOTE]


def test_a_victim_that_stays_costs_one_newcomer() -> None:
    a, b, c, d = range(4)
    checked = Checked(stack_of(MemoryStore(U, 2), MemoryStore(U, 3)))
    for unit in (c, d, a, b):
        checked.put(0, [unit])
    assert checked.fetch(0, [c]).tolist() == [REMOTE]  # a goes, and the remote pool is full: c, d, a
    assert checked.fetch(0, [d, a]).tolist() == [REMOTE, REMOTE]  # b cannot go for d, c goes for a
    assert checked.fetch(0, [a, b]).tolist() == [LOCAL, LOCAL]
    assert checked.fetch(0, [c, d]).tolist() == [REMOTE, REMOTE]


def test_an_older_version_is_never_given() -> None:
    local, remote = MemoryStore(U, 1), MemoryStore(U)
    checked = Checked(stack_of(local, remote))
    checked.put(1, [3])
    checked.put(1, [4])  # unit 3 is written back
    assert checked.fetch(1, [3]).tolist() == [REMOTE]
    checked.put(1, [3])  # newer, in the local pool alone
    assert remote.contains(unit_keys(1, np.array([3]))).all()
    local.evict(unit_keys(1, np.array([3])))
    assert checked.fetch(1, [3]).tolist() == [LOST]
    assert checked.put(1, [3]).all()
    assert checked.fetch(1, [3]).tolist() == [LOCAL]


def test_a_lost_clean_unit_comes_from_the_remote_pool() -> None:
    local, remote = MemoryStore(U, 1), MemoryStore(U)
    checked = Checked(stack_of(local, remote))
    checked.put(0, [0])
    checked.put(0, [1])
    assert checked.fetch(0, [0]).tolist() == [REMOTE]
    assert checked.fetch(0, [0]).tolist() == [LOCAL]
    local.evict(unit_keys(0, np.array([0])))
    assert checked.fetch(0, [0]).tolist() == [REMOTE]
    assert checked.fetch(0, [0]).tolist() == [LOCAL]


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(ValueError, match="one or two stores"):
        stack_of(None, None)
    with pytest.raises(ValueError, match=r"one size, not \[16, 32\]"):
        stack_of(MemoryStore(16), MemoryStore(32))
    with pytest.raises(UserError, match="--tier-policy opt"):
        stack_of(MemoryStore(U), MemoryStore(U), "opt")
    stack, buffer = stack_of(MemoryStore(U, 4), MemoryStore(U)), np.zeros((4, U), dtype=np.uint8)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("layer 2 of 2", lambda: stack.drop(2, np.array([0]))),
        (r"units 0\.\.5 of a layer that has 5", lambda: stack.drop(0, np.array([0, 5]))),
        ("a unit twice", lambda: stack.put(0, np.array([1, 1]), buffer, np.array([0, 1]))),
        ("a row twice", lambda: stack.fetch(0, np.array([1, 2]), buffer, np.array([0, 0]))),
        ("outside the buffer's 4", lambda: stack.fetch(0, np.array([1]), buffer, np.array([4]))),
    ]
    for words, call in calls:
        with pytest.raises(ValueError, match=words):
            call()
    stack.close()
    stack.close()
    with pytest.raises(ValueError, match="closed"):
        stack.put(0, np.array([1]), buffer, np.array([0]))


def at_random(checked: Checked, num_calls: int, seed: int = 0) -> dict[int, int]:
    """Calls of many units; whatever is held is given. Returns how many units each tier gave."""
    rng = np.random.default_rng(seed)
    given_by = {LOCAL: 0, REMOTE: 0, LOST: 0}
    for _ in range(num_calls):
        layer_id = int(rng.integers(NUM_LAYERS))
        units = rng.permutation(UNITS_PER_LAYER)[: rng.integers(1, UNITS_PER_LAYER + 1)].tolist()
        action = rng.choice(["put", "fetch", "fetch", "drop"], p=[0.4, 0.3, 0.25, 0.05])
        if action == "put":
            assert checked.put(layer_id, units).all()
        elif action == "drop":
            checked.drop(layer_id, units[:1])
        else:
            tiers = checked.fetch(layer_id, units)
            assert (tiers != LOST).tolist() == [(layer_id, unit) in checked.truth for unit in units]
            for tier in tiers.tolist():
                given_by[tier] += 1
    return given_by


@pytest.mark.parametrize("remote", ["valkey-unix", "memory"])
@pytest.mark.parametrize("local", ["ram", "mmap", "file", "sim"])
def test_real_members(local: str, remote: str, request: pytest.FixtureRequest, tmp_path) -> None:
    unit_bytes = 656
    remote_store = opener_of(remote, request, tmp_path)(unit_bytes)
    stack = stack_of(opener_of(local, request, tmp_path)(unit_bytes, 3), remote_store)
    stack.register(np.zeros((8, unit_bytes), dtype=np.uint8))
    given_by = at_random(Checked(stack), 200)
    assert min(given_by[LOCAL], given_by[REMOTE]) > 20
    stats = dict(zip(TIER_NAMES, stack.stats(), strict=True))
    assert stats["local_pool"].latency_kind == ("modelled" if local == "sim" else "measured")
    for tier in ("local_pool", "remote_pool"):
        assert stats[tier].errors == stats[tier].corrupt_units == 0
        assert stats[tier].bytes_useful == stats[tier].hit_units * unit_bytes
    assert stack.last_error is None
    stack.close()


def test_a_server_that_goes_away_costs_its_own_units(tmp_path) -> None:
    with valkey() as server:
        stack = stack_of(open_store("ram", 656, 3), open_store(server.unix, 656, timeout_s=2))
        checked = Checked(stack)
        assert checked.put(0, [0, 1, 2]).all()
        assert checked.put(0, [3, 4]).all()  # 0 and 1 are written back
    assert checked.fetch(0, [0, 1, 2, 3, 4]).tolist() == [LOST, LOST, LOCAL, LOCAL, LOCAL]
    assert stack.last_error is not None
    assert stack.last_error.kind == "connection"
    assert not checked.put(1, [0]).any()
    assert checked.fetch(0, [2, 3, 4]).tolist() == [LOCAL] * 3
    assert checked.put(0, [2, 3, 4]).all()  # over older versions: nothing has to go
    assert checked.fetch(0, [2, 3, 4]).tolist() == [LOCAL] * 3
    checked.drop(0, [0, 1, 2, 3, 4])
    assert checked.fetch(0, [2]).tolist() == [LOST]
    _, local, remote = stack.stats()
    assert (local.errors, remote.errors > 0) == (0, True)
    stack.close()
