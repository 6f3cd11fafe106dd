"""The stores' members as tests open them, servers included; what is not installed skips, with its reason.

Servers live for a test session, in short folders of their own (a unix socket's path is limited
to 108 bytes). Mooncake's master gives leases of 50 ms here, so that `evict` can work.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from dsatrace.kv.stores.interface import NAMESPACE_BYTES, Store, StoreError, unit_keys
from dsatrace.kv.stores.nixl import PACKAGES as NIXL_PACKAGES
from dsatrace.kv.stores.opening import open_store
from helpers.fake_memcache import FakePool
from helpers.memory_store import MemoryStore

sys.path.insert(0, str(ROOT / "scripts" / "bench"))

from servers import Missing, MooncakeMaster, ValkeyServer, free_port

__all__ = ["free_port"]

MEMBERS = (
    *("memory", "ram", "mmap", "file", "nixl"),
    *("valkey-unix", "valkey-tcp", "mooncake", "memcache-fake", "sim"),
)
REMOTE = ("valkey-unix", "valkey-tcp", "mooncake", "memcache-fake")
LEASE_MS = 50

Opener = Callable[..., Store]
"""`opener(unit_bytes, capacity_units=None)`: an empty store of one member."""


@contextlib.contextmanager
def valkey(*flags: str) -> Iterator[ValkeyServer]:
    """A server of one's own, to do anything to."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="valkey-")))
        stack.enter_context(_skips())
        yield stack.enter_context(ValkeyServer(folder, *flags))


@contextlib.contextmanager
def mooncake(segment_mib: int = 32, lease_ms: int = LEASE_MS) -> Iterator[MooncakeMaster]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mooncake-")))
        stack.enter_context(_skips())
        yield stack.enter_context(MooncakeMaster(folder, segment_mib, lease_ms))


@contextlib.contextmanager
def _skips() -> Iterator[None]:
    try:
        yield
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    with valkey() as server:
        yield server


@pytest.fixture(scope="session")
def mooncake_master() -> Iterator[MooncakeMaster]:
    with mooncake() as master:
        yield master


@pytest.fixture
def fake_memcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, FakePool]]:
    """A spec that opens the adapter of MemCache on a fake of its package, and the fake's pool."""
    pool = FakePool()
    monkeypatch.setitem(sys.modules, "memcache_hybrid", pool.module())
    monkeypatch.setenv("MMC_LOCAL_CONFIG_PATH", "")  # restored afterwards: opening sets it
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = tmp_path / "mmc-local.conf"
        port = listener.getsockname()[1]
        config.write_text(f"# a comment = no value\nock.mmc.meta_service_url = tcp://127.0.0.1:{port}\n")
        yield f"memcache:{config}", pool


def has_nixl() -> bool:
    return any(importlib.util.find_spec(name) for name in NIXL_PACKAGES)


def opener_of(member: str, request: pytest.FixtureRequest, folder: Path) -> Opener:
    """How tests open `member`: servers come from the session's fixtures, files go to `folder`."""
    if member == "memory":
        return MemoryStore
    if member.startswith("valkey"):
        server = request.getfixturevalue("valkey_server")
        return functools.partial(open_store, server.unix if member == "valkey-unix" else server.tcp)
    if member == "mooncake":
        return functools.partial(open_store, request.getfixturevalue("mooncake_master").spec)
    if member == "memcache-fake":
        return functools.partial(open_store, request.getfixturevalue("fake_memcache")[0])
    if member == "nixl" and not has_nixl():
        pytest.skip("no nixl; pip install nixl-cu12")
    spec = {"ram": "ram", "sim": "sim:pcie5-x16+ram", "mmap": f"mmap:{folder}/m", "file": f"file:{folder}/f"}
    return functools.partial(open_store, spec.get(member, f"{member}:{folder}/n"))


def units(num_units: int, unit_bytes: int, seed: int = 0) -> np.ndarray:
    """`(num_units, unit_bytes)` random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (num_units, unit_bytes), dtype=np.uint8)


U = 656  # bytes of a unit in the tests of faults
KEYS = unit_keys(2, np.arange(10))
DATA = units(10, U)
NAMESPACE = bytes(range(NAMESPACE_BYTES))


def fetched(store: Store) -> np.ndarray:
    """The hits of a fetch of `KEYS`, whose bytes are those of `DATA`."""
    out = np.zeros_like(DATA)
    hits = store.fetch(KEYS, out)
    assert (out[hits] == DATA[hits]).all()
    return hits


@contextlib.contextmanager
def fails(kind: str, match: str | None = None) -> Iterator[None]:
    """Expects a `StoreError` of this kind."""
    with pytest.raises(StoreError, match=match) as caught:
        yield
    assert caught.value.kind == kind


def evict_leased(store: Store, keys: np.ndarray) -> np.ndarray:
    """Evicts, and again once the leases are over; asking `contains` in between would renew them."""
    known = store.contains(keys)
    gone = store.evict(keys)
    for _ in range(40):
        if (gone | ~known).all():
            break
        time.sleep(LEASE_MS / 1e3)
        left = known & ~gone
        gone[left] |= store.evict(keys[left])
    return gone
