"""Every member keeps the contract of `Store`: one suite, and random histories against the plain one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from dsatrace.kv.stores.interface import StoreStats, unit_keys
from helpers.memory_store import MemoryStore
from helpers.stores import (
    MEMBERS,
    REMOTE,
    evict_leased,
    fake_memcache,
    mooncake_master,
    opener_of,
    units,
    valkey_server,
)

__all__ = ["fake_memcache", "mooncake_master", "valkey_server"]

ROW, INDEX_ROW = 656, 132  # bytes; the latter is no multiple of 8
CASES = [(member, ROW) for member in MEMBERS]
CASES += [(member, INDEX_ROW) for member in ("memory", "ram", "mmap", "file", "nixl", "valkey-unix")]


@pytest.fixture(params=MEMBERS)
def member(request):
    return request.param


@pytest.fixture
def opener(member, request, tmp_path):
    return opener_of(member, request, tmp_path)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def store(request, tmp_path):
    name, unit_bytes = request.param
    opened = opener_of(name, request, tmp_path)(unit_bytes, 64)
    yield opened
    opened.close()


def test_what_was_put_is_fetched(store):
    keys, data = unit_keys(3, np.arange(20)), units(20, store.unit_bytes)
    assert store.put(keys, data).all()
    order = np.random.default_rng(1).permutation(20)
    out = np.zeros_like(data)
    hits = store.fetch(keys[order], out)
    assert hits.dtype == bool
    assert hits.all()
    assert (out == data[order]).all()


def test_rows_of_larger_buffers(store):
    keys, pool = unit_keys(0, np.arange(5)), units(30, store.unit_bytes)
    rows = np.array([7, 29, 0, 3, 11])
    assert store.put(keys, pool, rows).all()
    out = np.full_like(pool, 255)
    wanted = np.array([20, 1, 2, 3, 4], dtype=np.int32)
    assert store.fetch(keys, out, wanted).all()
    assert (out[wanted] == pool[rows]).all()
    others = np.setdiff1d(np.arange(30), wanted)
    assert (out[others] == 255).all()


def test_a_key_may_be_fetched_twice_in_a_batch(store):
    keys, data = unit_keys(0, np.arange(3)), units(3, store.unit_bytes)
    store.put(keys, data)
    twice = np.array([2, 0, 2, 1, 2])
    out = np.zeros((5, store.unit_bytes), dtype=np.uint8)
    assert store.fetch(keys[twice], out).all()
    assert (out == data[twice]).all()


def test_unknown_keys_miss_and_layers_are_apart(store):
    data = units(4, store.unit_bytes)
    store.put(unit_keys(1, np.arange(4)), data)
    asked = np.concatenate([unit_keys(1, np.array([3, 4, 0])), unit_keys(2, np.array([0]))])
    out = np.zeros((4, store.unit_bytes), dtype=np.uint8)
    hits = store.fetch(asked, out)
    assert hits.tolist() == [True, False, True, False]
    assert (out[hits] == data[[3, 0]]).all()
    assert store.contains(asked).tolist() == hits.tolist()


def test_a_put_overwrites(store):
    keys = unit_keys(0, np.arange(8))
    store.put(keys, units(8, store.unit_bytes))
    newer = units(3, store.unit_bytes, seed=9)
    assert store.put(keys[[1, 4, 6]], newer).all()
    out = np.zeros((8, store.unit_bytes), dtype=np.uint8)
    assert store.fetch(keys, out).all()
    assert (out[[1, 4, 6]] == newer).all()


def test_a_full_store_says_what_it_kept(opener):
    store = opener(ROW, 4)
    keys, data = unit_keys(0, np.arange(6)), units(6, ROW)
    assert store.put(keys, data).tolist() == [True] * 4 + [False] * 2
    assert store.contains(keys).tolist() == [True] * 4 + [False] * 2
    assert store.put(keys[:1], data[5:]).all()  # an old key needs no room
    assert evict_leased(store, keys[1:2]).all()
    assert store.put(keys[4:], data[4:]).tolist() == [True, False]
    out = np.zeros_like(data)
    assert store.fetch(keys, out).tolist() == [True, False, True, True, True, False]
    assert (out[0] == data[5]).all()
    store.close()


def test_evicted_units_are_gone(store):
    keys, data = unit_keys(0, np.arange(6)), units(6, store.unit_bytes)
    store.put(keys, data)
    assert evict_leased(store, keys[2:4]).all()
    assert store.contains(keys).tolist() == [True, True, False, False, True, True]
    assert not store.evict(keys[2:4]).any()
    out = np.zeros_like(data)
    hits = store.fetch(keys, out)
    assert hits.tolist() == [True, True, False, False, True, True]
    assert (out[hits] == data[hits]).all()


def test_empty_batches(store):
    none, nothing = np.empty(0, dtype=np.uint64), np.empty((0, store.unit_bytes), dtype=np.uint8)
    answers = (store.put(none, nothing), store.fetch(none, nothing), store.contains(none), store.evict(none))
    for answer in answers:
        assert answer.shape == (0,)
        assert answer.dtype == bool


def test_what_is_counted(store):
    keys, data = unit_keys(0, np.arange(10)), units(10, store.unit_bytes)
    before = store.stats()
    store.put(keys, data)
    store.fetch(
        np.concatenate([keys, unit_keys(1, np.arange(5))]), np.zeros((15, store.unit_bytes), np.uint8)
    )
    done = store.stats() - before
    assert (done.write_batches, done.put_units, done.stored_units) == (1, 10, 10)
    assert (done.read_batches, done.requested_units, done.hit_units, done.missed_units) == (1, 15, 10, 5)
    assert done.bytes_useful == 10 * store.unit_bytes
    assert done.bytes_read >= done.bytes_useful
    assert done.bytes_written >= 10 * store.unit_bytes
    assert 1 <= done.read_ops <= 10
    assert 1 <= done.write_ops <= 10
    assert done.corrupt_units == done.errors == done.timeouts == done.evicted_units == 0
    if done.latency_kind != "none":
        assert done.read_us > 0
        assert done.write_us > 0


def test_a_batch_that_is_wrong_changes_nothing(store):
    keys, data = unit_keys(0, np.arange(3)), units(3, store.unit_bytes)
    assert store.put(keys, data).all()
    before = store.stats()
    odd = np.zeros(3 * store.unit_bytes + 1, dtype=np.uint8)[1:].reshape(3, store.unit_bytes)
    bad_fetches = (
        (keys.astype(np.int64), data, None),
        (keys, data[:2], None),
        (keys, np.zeros((3, store.unit_bytes + 8), np.uint8), None),
        (keys, data.astype(np.int8), None),
        (keys, np.zeros((store.unit_bytes, 3), np.uint8).T, None),
        (keys, odd, None),
        (keys, data, np.array([0, 1, 3])),
        (keys, data, np.array([0, 1, -1])),
        (keys, data, np.array([0, 1, 1])),
        (keys, data, np.array([0.0, 1.0, 2.0])),
    )
    for batch in bad_fetches:
        with pytest.raises(ValueError):
            store.fetch(*batch)
    with pytest.raises(ValueError, match="twice"):
        store.put(keys[[0, 1, 0]], data)
    with pytest.raises(ValueError, match="twice"):
        store.evict(keys[[0, 1, 0]])
    assert store.stats() == before
    assert store.fetch(keys, np.zeros_like(data)).all()


def test_a_closed_store_says_so(opener):
    store = opener(ROW, 4)
    keys, data = unit_keys(0, np.arange(2)), units(2, ROW)
    store.put(keys, data)
    store.close()
    store.close()
    for call, *arguments in ((store.put, keys, data), (store.fetch, keys, data), (store.contains, keys)):
        with pytest.raises(ValueError, match="closed"):
            call(*arguments)


def test_registered_memory_is_used_alike(opener):
    store = opener(ROW, 64)
    pool = units(40, ROW)
    store.register(pool)
    keys = unit_keys(0, np.arange(10))
    expected = pool[:10].copy()
    assert store.put(keys, pool, np.arange(10)).all()
    assert store.fetch(keys, pool, np.arange(30, 40)).all()
    assert (pool[30:] == expected).all()
    store.close()


def test_threads_take_turns(store):
    """Four threads with keys of their own: each sees only its own bytes, and the counts add up."""
    wrong: list[int] = []

    def work(layer: int) -> None:
        keys, out = unit_keys(layer, np.arange(8)), np.zeros((8, store.unit_bytes), dtype=np.uint8)
        for turn in range(5):
            data = units(8, store.unit_bytes, seed=100 * layer + turn)
            if not store.put(keys, data).all() or not store.fetch(keys, out).all() or (out != data).any():
                wrong.append(layer)

    before = store.stats()
    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    done = store.stats() - before
    assert done.hit_units == done.stored_units == 4 * 5 * 8


@pytest.mark.parametrize("member", REMOTE, indirect=True)
def test_two_runs_on_one_store_do_not_meet(member, opener):
    first, second = opener(ROW), opener(ROW)
    keys = unit_keys(0, np.arange(5))
    mine, other = units(5, ROW, seed=1), units(5, ROW, seed=2)
    first.put(keys, mine)
    out = np.zeros_like(mine)
    assert not second.contains(keys).any()
    assert not second.fetch(keys, out).any()
    second.put(keys, other)
    assert first.fetch(keys, out).all()
    assert (out == mine).all()
    second.close()
    hits = first.fetch(keys, out)  # a pool may lose what lay in the memory that the second lent it
    assert (out[hits] == mine[hits]).all()
    first.close()


IDS = st.lists(st.integers(0, 11), unique=True, max_size=12)


@pytest.mark.parametrize(("member", "unit_bytes"), CASES)
def test_random_histories_equal_the_plain_members(member, unit_bytes, request, tmp_path):
    """Puts, fetches and evictions in any order: the same hits, bytes and counts as the dictionary."""
    store = opener_of(member, request, tmp_path)(unit_bytes, 8)

    class History(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            evict_leased(store, unit_keys(5, np.arange(12)))
            self.plain = MemoryStore(unit_bytes, 8)
            self.before = store.stats()

        @rule(ids=IDS, seed=st.integers(0, 1 << 30))
        def put(self, ids: list[int], seed: int) -> None:
            keys, data = unit_keys(5, np.array(ids, dtype=int)), units(len(ids), unit_bytes, seed)
            assert store.put(keys, data).tolist() == self.plain.put(keys, data).tolist()

        @rule(ids=IDS, data=st.data())
        def fetch(self, ids: list[int], data: st.DataObject) -> None:
            keys = unit_keys(5, np.array(ids, dtype=int))
            rows = np.array(data.draw(st.permutations(range(12))))[: len(ids)]
            out, plain_out = np.zeros((2, 12, unit_bytes), dtype=np.uint8)
            hits = store.fetch(keys, out, rows)
            assert hits.tolist() == self.plain.fetch(keys, plain_out, rows).tolist()
            assert (out[rows[hits]] == plain_out[rows[hits]]).all()

        @rule(ids=IDS)
        def evict(self, ids: list[int]) -> None:
            keys = unit_keys(5, np.array(ids, dtype=int))
            assert evict_leased(store, keys).tolist() == self.plain.evict(keys).tolist()

        @invariant()
        def holds_the_same(self) -> None:
            keys = unit_keys(5, np.arange(12))
            assert store.contains(keys).tolist() == self.plain.contains(keys).tolist()

        @invariant()
        def counts_the_same(self) -> None:
            assert counted(store.stats() - self.before) == counted(self.plain.stats())

    profile = settings(
        max_examples=10 if member in REMOTE else 30,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(History, settings=profile)
    finally:
        store.close()


def counted(stats: StoreStats) -> tuple[int, ...]:
    """What every member counts alike; operations, padding and time differ."""
    units = (stats.requested_units, stats.hit_units, stats.missed_units, stats.corrupt_units)
    puts = (stats.put_units, stats.stored_units, stats.evicted_units)
    return (*units, *puts, stats.read_batches, stats.bytes_useful, stats.errors)
