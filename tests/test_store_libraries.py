"""What stores on client libraries do when these fail: Mooncake, NIXL, and a fake of MemCache."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import ModuleType

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import StoreError, StoreSettings, unit_keys
from dsatrace.kv.stores.mooncake import mooncake_store
from dsatrace.kv.stores.opening import open_store
from helpers.stores import (
    DATA,
    KEYS,
    NAMESPACE,
    U,
    fails,
    fake_memcache,
    fetched,
    free_port,
    has_nixl,
    mooncake,
    units,
)
from helpers.waiting import until

__all__ = ["fake_memcache"]


def test_mooncake_without_its_master():
    needed = "pip install mooncake-transfer-engine-non-cuda, apt install libibverbs1"
    pytest.importorskip("mooncake.store", reason=needed, exc_type=ImportError)
    port, begin = free_port(), time.monotonic()
    with pytest.raises(UserError, match=f"mooncake_master --rpc_address=127.0.0.1 --rpc_port={port}"):
        open_store(f"mooncake://127.0.0.1:{port}", U)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (
            "No module named 'mooncake'",
            "; pip install mooncake-transfer-engine-non-cuda and apt install libibverbs1",
        ),
        (
            "libibverbs.so.1: cannot open shared object file: No such file or directory",
            "; apt install libibverbs1",
        ),
    ],
)
def test_mooncake_that_cannot_be_loaded_names_the_remedy(cause, remedy, monkeypatch):
    class Missing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError(cause)

    monkeypatch.setitem(sys.modules, "mooncake", ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.store", Missing("mooncake.store"))
    with pytest.raises(UserError) as caught:
        open_store("mooncake://127.0.0.1:1", U)
    assert str(caught.value) == f"mooncake://127.0.0.1:1: {cause}{remedy}"


def test_mooncake_loses_its_master():
    with mooncake() as master:
        store = open_store(master.spec, U, timeout_s=0.5)
        assert store.put(KEYS, DATA).all()
        master.pause()
        with fails("timeout"):
            fetched(store)
        master.resume()
        time.sleep(0.5)
        assert fetched(store).all()
        master.kill()
        with pytest.raises(StoreError, match="mooncake"):
            fetched(store)
        assert (store.stats().errors, store.stats().timeouts) == (2, 1)
        store.close()


def test_mooncake_keeps_a_leased_unit_and_fills_up():
    with mooncake(segment_mib=16, lease_ms=60_000) as master:
        store = open_store(master.spec, 41_984)
        keys, data = unit_keys(0, np.arange(600)), units(600, 41_984)
        stored = store.put(keys, data)
        assert 0 < stored.sum() < 600
        out = np.zeros_like(data)
        hits = store.fetch(keys, out)
        assert (hits <= stored).all()
        assert hits.any()
        assert (out[hits] == data[hits]).all()
        leased = keys[hits][:5]
        assert not store.evict(leased).any()
        assert store.fetch(leased, out[:5]).all()
        assert store.stats().evicted_units == 0
        store.close()


def test_mooncake_units_that_somebody_else_wrote():
    with mooncake() as master:
        mine, other = (mooncake_store(StoreSettings(master.spec, U, namespace=NAMESPACE)) for _ in range(2))
        mine.put(KEYS, DATA)
        other.put(KEYS[3:4], DATA[4:5])
        assert fetched(mine).tolist() == [key != 3 for key in range(10)]
        assert mine.stats().corrupt_units == 1
        other.close()
        mine.close()


@pytest.fixture
def nixl_medium(tmp_path):
    """A store on NIXL with ten units, and its medium, whose file a test may tamper with."""
    if not has_nixl():
        pytest.skip("no nixl; pip install nixl-cu12")
    store = open_store(f"nixl:{tmp_path}/n", U, 10, timeout_s=0.5)
    assert store.put(KEYS, DATA).all()
    yield store, store._medium
    store.close()


def test_nixl_units_that_somebody_else_wrote(nixl_medium):
    store, medium = nixl_medium
    os.pwrite(medium._fd, bytes([DATA[6, 100] ^ 4]), 6 * U + 100)
    assert np.flatnonzero(~fetched(store)).tolist() == [6]
    assert (store.stats().corrupt_units, store.stats().errors) == (1, 0)
    assert store.put(KEYS[6:7], DATA[6:7]).all()
    assert fetched(store).all()


@pytest.mark.parametrize("is_registered", [False, True])
def test_nixl_with_a_file_that_was_cut_short(nixl_medium, is_registered):
    store, medium = nixl_medium
    out = np.zeros_like(DATA)
    if is_registered:
        store.register(out)
    os.ftruncate(medium._fd, 7 * U + 30)
    with fails("io", "nixl: READ: NIXL_ERR"):
        store.fetch(KEYS, out)
    assert (store.stats().errors, store.stats().hit_units) == (1, 0)
    assert store.fetch(KEYS[:7], out[:7]).all()
    assert (out[:7] == DATA[:7]).all()
    os.ftruncate(medium._fd, 10 * U)  # longer again, by zeros
    assert fetched(store).tolist() == [True] * 7 + [False] * 3
    assert store.stats().corrupt_units == 3
    assert store.put(KEYS, DATA).all()
    assert fetched(store).all()


def test_nixl_on_a_disk_that_takes_no_more(nixl_medium):
    store, medium = nixl_medium
    kept = os.dup(medium._fd)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, medium._fd)
    with fails("io", "nixl: WRITE: NIXL_ERR"):
        store.put(KEYS[:3], units(3, U, seed=5))
    os.dup2(kept, medium._fd)
    assert store.contains(KEYS).tolist() == [False] * 3 + [True] * 7
    assert fetched(store).tolist() == [False] * 3 + [True] * 7
    assert store.put(KEYS, DATA).all()
    assert fetched(store).all()
    for fd in (kept, full):
        os.close(fd)


@pytest.mark.parametrize("is_registered", [False, True])
def test_nixl_transfers_that_do_not_end(nixl_medium, monkeypatch, is_registered):
    """A file cannot be made to hang here, so NIXL's answer is: under way, until it is let go."""
    store, medium = nixl_medium
    out = np.zeros_like(DATA)
    if is_registered:
        store.register(out)
    hang = threading.Event()
    hang.set()
    transfer, check = medium._agent.transfer, medium._agent.check_xfer_state
    monkeypatch.setattr(medium._agent, "transfer", lambda handle: (transfer(handle), "PROC")[1])
    monkeypatch.setattr(
        medium._agent, "check_xfer_state", lambda handle: "PROC" if hang.is_set() else check(handle)
    )
    for cause in (r"no answer within 0\.5 s", "still busy"):  # the second finds the first still under way
        begin = time.monotonic()
        with fails("timeout", cause):
            store.fetch(KEYS, out)
        assert time.monotonic() - begin < 60
        time.sleep(0.3)  # longer than the first two pauses
    assert (store.stats().errors, store.stats().timeouts) == (2, 2)
    hang.clear()
    until(lambda: medium._caller.is_idle)
    assert fetched(store).all()


def test_nixl_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("dsatrace.kv.stores.nixl.PACKAGES", ("nixl_of_nowhere",))
    with pytest.raises(UserError, match="NIXL is not installed; pip install nixl-cu12") as caught:
        open_store(f"nixl:{tmp_path}/n", U, 10)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def memcache(fake_memcache):
    """A store with ten units on the fake of MemCache, and the fake's pool."""
    spec, pool = fake_memcache
    store = open_store(f"{spec}?device=3", U)
    assert store.put(KEYS, DATA).all()
    yield store, pool
    store.close()


def test_memcache_fake_loses_and_alters_units(memcache):
    store, pool = memcache
    assert pool.devices == [3]
    first, second, third, *_ = pool.objects
    del pool.objects[first]
    pool.objects[second] = bytes(U)
    pool.objects[third] = bytes(10)
    assert fetched(store).tolist() == [False] * 3 + [True] * 7
    assert (store.stats().missed_units, store.stats().errors) == (3, 0)
    assert store.stats().corrupt_units == 2
    assert store.put(KEYS, DATA).all()
    assert fetched(store).all()
    assert len(pool.objects) == 10  # the altered ones made room for their new versions


def test_memcache_fake_is_full_or_leased(memcache):
    store, pool = memcache
    pool.most_objects = 12
    newer = units(4, U, seed=4)
    pool.leased = {name for i, name in enumerate(pool.objects) if i == 9}
    assert store.put(KEYS[:4], newer).tolist() == [True, True, False, False]
    out = np.zeros_like(DATA)
    assert store.fetch(KEYS, out).tolist() == [True, True, False, False, *[True] * 6]
    assert (out[:2] == newer[:2]).all()
    assert store.evict(KEYS[8:]).tolist() == [True, False]
    assert store.fetch(KEYS[9:], out[9:]).all()


@pytest.mark.parametrize("is_registered", [False, True])
def test_memcache_fake_breaks_down(memcache, is_registered):
    store, pool = memcache
    out = DATA.copy()
    if is_registered:
        store.register(out)
    pool.is_broken = True
    calls = (
        lambda: store.fetch(KEYS, out),
        lambda: store.put(KEYS, out),
        lambda: store.put(KEYS[:1], out[:1]),
    )
    for call in calls:
        with pytest.raises(StoreError, match="memcache: code -1"):
            call()
    pool.is_broken = False
    assert not fetched(store).any()
    assert store.put(KEYS, DATA).all()
    assert fetched(store).all()


def test_memcache_that_cannot_start(fake_memcache, tmp_path, monkeypatch):
    spec, pool = fake_memcache
    pool.init_code = -1
    with pytest.raises(
        UserError, match=r"code -1\); it needs an Ascend driver, .*untested on hardware"
    ) as caught:
        open_store(spec, U)
    assert "\n" not in str(caught.value)
    config = tmp_path / "other.conf"
    config.write_text(f"ock.mmc.meta_service_url = tcp://127.0.0.1:{free_port()}\n")
    with pytest.raises(UserError, match=r"no MetaService at 127\.0\.0\.1:\d+ .*refused"):
        open_store(f"memcache:{config}", U)
    config.write_text("ock.mmc.meta_service_url = tcp://127.0.0.1:port\n")
    with pytest.raises(UserError, match=r"has no line `ock\.mmc\.meta_service_url"):
        open_store(f"memcache:{config}", U)
    with pytest.raises(UserError, match="No such file"):
        open_store(f"memcache:{tmp_path}/nowhere", U)
    monkeypatch.setitem(sys.modules, "memcache_hybrid", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install memcache-hybrid") as caught:
        open_store(spec, U)
    assert "\n" not in str(caught.value)
