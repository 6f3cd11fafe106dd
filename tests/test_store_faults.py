"""What a store does when its server or file fails: never a wrong byte, the cause in one line, all counted.

The server is a real Valkey, or a socket where no server can be made to misbehave that way. For stores on
client libraries see `test_store_libraries`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dsatrace.errors import UserError
from dsatrace.kv.stores import backoff, resp
from dsatrace.kv.stores import valkey as valkey_module
from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.interface import NAMESPACE_BYTES, StoreError, StoreSettings, unit_keys
from dsatrace.kv.stores.opening import open_store
from dsatrace.kv.stores.resp import Connection, command
from dsatrace.kv.stores.valkey import parse_spec, valkey_store
from helpers.stores import DATA, KEYS, NAMESPACE, U, fails, fetched, free_port, has_nixl, units, valkey
from helpers.waiting import Clock, until

PATIENT_S = 600.0
"""Only what hangs takes so long."""


@contextlib.contextmanager
def waiting(store: CheckedStore, seconds: float) -> Iterator[None]:
    """Within, the store waits for an answer this long."""
    connection = store._medium._connection
    before, connection._timeout_s = connection._timeout_s, seconds
    yield
    connection._timeout_s = before


def close_unheard(store: CheckedStore) -> None:
    """Nobody answers what it says at last."""
    with waiting(store, 0.1):
        store.close()


def wire(key: int) -> bytes:
    return NAMESPACE + int(KEYS[key]).to_bytes(8, "big")


@pytest.fixture(scope="module")
def server():
    with valkey() as running:
        yield running


@pytest.fixture
def store(server):
    """Ten units under known names, so that a test can tamper with them."""
    opened = valkey_store(StoreSettings(server.unix, U, namespace=NAMESPACE))
    assert opened.put(KEYS, DATA).all()
    yield opened
    opened.close()


@pytest.fixture
def tell(server):
    """Sends the server a command on another connection; returns the answer."""
    connection = Connection(parse_spec(server.tcp)[0], timeout_s=PATIENT_S)
    yield lambda *words: connection.lines(command(*words), 1)[0]
    connection.close()


TAMPERED = {
    "altered": lambda tell: tell("SETRANGE", wire(3), "17", bytes([DATA[3, 17] ^ 1])),
    "truncated": lambda tell: tell("SET", wire(3), DATA[3, :-1].tobytes()),
    "too long": lambda tell: tell("SET", wire(3), DATA[3].tobytes() + b"x"),
    "empty": lambda tell: tell("SET", wire(3), b""),
    "far too long": lambda tell: tell("SETRANGE", wire(3), "5000000", b"x"),
    "another unit": lambda tell: tell("SET", wire(3), DATA[4].tobytes()),
    "zeros": lambda tell: tell("SET", wire(3), bytes(U)),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_unit_that_is_not_what_was_put_is_a_miss(store, tell, how):
    before = store.stats()
    TAMPERED[how](tell)
    assert fetched(store).tolist() == [key != 3 for key in range(10)]
    done = store.stats() - before
    assert (done.corrupt_units, done.missed_units, done.hit_units) == (1, 1, 9)
    assert done.errors == 0
    assert store.put(KEYS[3:4], DATA[3:4]).all()
    assert fetched(store).all()


def test_an_older_version_is_a_miss(store, tell):
    newer = units(1, U, seed=8)
    assert store.put(KEYS[3:4], newer).all()
    tell("SET", wire(3), DATA[3].tobytes())
    assert fetched(store).tolist() == [key != 3 for key in range(10)]
    assert store.stats().corrupt_units == 1


def test_evicted_and_replaced_units_are_plain_misses(store, tell):
    tell("DEL", wire(0))
    tell("PEXPIRE", wire(5), "1")
    tell("DEL", wire(7))
    tell("LPUSH", wire(7), "not a unit")
    until(lambda: not store.contains(KEYS[5:6]).any())
    assert store.contains(KEYS).tolist() == [key not in (0, 5) for key in range(10)]
    before = store.stats()
    assert np.flatnonzero(~fetched(store)).tolist() == [0, 5, 7]
    done = store.stats() - before
    assert (done.missed_units, done.corrupt_units) == (3, 0)
    tell("DEL", wire(7))


def test_keys_are_numbers_and_go_with_their_run(server, tell):
    mine = open_store(server.tcp, U)
    mine.put(KEYS, DATA)
    assert tell("DBSIZE") == b":10"
    cursor = Connection(parse_spec(server.tcp)[0], timeout_s=PATIENT_S)
    cursor._send(command("KEYS", "*"), time.monotonic() + PATIENT_S)
    with cursor._socket.makefile("rb") as reply:
        assert reply.readline() == b"*10\r\n"
        names = []
        for _ in range(10):
            assert reply.readline() == b"$24\r\n"
            names.append(reply.read(24 + 2)[:24])
    cursor.close()
    assert len({name[:NAMESPACE_BYTES] for name in names}) == 1
    assert {int.from_bytes(name[NAMESPACE_BYTES:], "big") for name in names} == set(KEYS.tolist())
    mine.close()
    assert tell("DBSIZE") == b":0"


def test_a_full_server_stores_what_fits():
    with valkey("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        store = open_store(server.unix, 41_984)
        keys, data = unit_keys(0, np.arange(200)), units(200, 41_984)
        stored = store.put(keys, data)
        assert 0 < stored.sum() < 200
        out = np.zeros_like(data)
        assert (store.fetch(keys, out) == stored).all()
        assert (out[stored] == data[stored]).all()
        again = store.put(keys, data[::-1].copy())  # overwrites that fail leave no old version
        hits = store.fetch(keys, out)
        assert (hits == again).all()
        assert (out[hits] == data[::-1][hits]).all()
        assert store.stats().errors == 0
        store.close()


def test_a_server_that_evicts_causes_only_misses():
    with valkey("--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru") as server:
        store = open_store(server.unix, 41_984)
        keys, data = unit_keys(0, np.arange(200)), units(200, 41_984)
        assert store.put(keys, data).all()
        out = np.zeros_like(data)
        hits = store.fetch(keys, out)
        assert 0 < hits.sum() < 200
        assert (out[hits] == data[hits]).all()
        assert store.stats().corrupt_units == 0
        store.close()


@pytest.mark.parametrize("call", ["fetch", "put", "contains", "evict"])
def test_a_killed_server_is_an_error_and_may_come_back(call):
    with valkey() as server:
        store = open_store(server.tcp, U, timeout_s=PATIENT_S)
        store.put(KEYS, DATA)
        server.kill()
        arguments = (KEYS, DATA.copy()) if call in ("fetch", "put") else (KEYS,)
        with fails("connection", r"127\.0\.0\.1:\d+: (it closed|Connection)"):
            getattr(store, call)(*arguments)
        done = store.stats()
        assert (done.errors, done.timeouts) == (1, 0)
        assert done.requested_units == done.missed_units + done.hit_units
        with pytest.raises(StoreError, match="refused"):
            store.put(KEYS, DATA)
        server.start()
        assert not fetched(store).any()
        assert store.put(KEYS, DATA).all()
        assert fetched(store).all()
        store.close()


def test_late_answers_of_a_paused_server_are_dropped(monkeypatch):
    monkeypatch.setattr(backoff, "time", clock := Clock())
    with valkey() as server:
        store = open_store(server.unix, U, timeout_s=PATIENT_S)
        store.put(KEYS, DATA)
        server.pause()
        for call in (lambda: fetched(store), lambda: store.evict(KEYS)):
            begin = time.monotonic()
            with waiting(store, 0.3), fails("timeout", r"no answer within 0\.3 s"):
                call()
            assert 0.25 < time.monotonic() - begin < PATIENT_S
            clock.now += PATIENT_S  # longer than the first two pauses
        server.resume()
        assert (store.stats().errors, store.stats().timeouts) == (2, 2)
        order = np.arange(10)[::-1]
        out = np.zeros_like(DATA)
        hits = store.fetch(KEYS[order].copy(), out)
        assert (out[hits] == DATA[order][hits]).all()
        store.close()


@pytest.mark.parametrize("call", ["fetch", "put", "contains", "evict"])
def test_a_connection_that_breaks_is_made_anew(store, tell, call):
    before = store.stats()
    assert int(tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")[1:]) >= 1
    arguments = (KEYS, DATA.copy()) if call in ("fetch", "put") else (KEYS,)
    assert getattr(store, call)(*arguments).all()
    assert ((done := store.stats() - before).retries, done.errors) == (1, 0)
    assert fetched(store).all() == (call != "evict")


def test_a_second_try_has_what_is_left_of_the_time(monkeypatch):
    """The first connection breaks 0.3 s before the time is over, and on the next one nobody answers."""
    monkeypatch.setattr(resp, "time", clock := Clock())
    given, left = [], resp._left
    monkeypatch.setattr(resp, "_left", lambda deadline: given.append(left(deadline)) or given[-1])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as peer:
                for answer in PONG:
                    peer.recv(1 << 20)
                    peer.sendall(answer)
                peer.recv(1 << 20)
                clock.now += PATIENT_S - 0.3

        thread = threading.Thread(target=serve)
        thread.start()
        store = open_store(f"redis://127.0.0.1:{listener.getsockname()[1]}", U, timeout_s=PATIENT_S)
        with fails("timeout", "no answer within"):
            store.put(KEYS, DATA)
        assert given[0] == PATIENT_S
        assert given[-1] == pytest.approx(0.3)
        assert (store.stats().retries, store.stats().timeouts) == (1, 1)
        thread.join()
    store.close()


def test_a_store_that_hangs_is_left_alone_for_ever_longer(monkeypatch, capsys):
    """And is told of once; when it answers, all is as before."""
    monkeypatch.setattr(backoff, "time", clock := Clock())
    with valkey() as server:
        store = open_store(server.unix, U, timeout_s=16)
        store.put(KEYS, DATA)
        server.pause()
        for pause_s in (2, 8, 32, 60):
            with waiting(store, 0.05), fails("timeout"):
                fetched(store)
            clock.now += pause_s - 0.01
            with fails("hanging", "asked again in"):
                fetched(store)
            with fails("hanging"):
                store.put(KEYS[:1], DATA[:1])
            clock.now += 0.02
        server.resume()
        assert fetched(store).tolist() == [False, *[True] * 9]  # the put that failed
        assert store.put(KEYS, DATA).all()
        done = store.stats()
        assert (done.timeouts, done.skipped_batches, done.errors) == (4, 8, 12)
        assert done.requested_units == done.missed_units + done.hit_units
        store.close()
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("the store hangs") == 1
    assert said.startswith("warning: unix:///")


@contextlib.contextmanager
def renewing_often(spec: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckedStore]:
    """A store whose units live for a minute and are renewed many times a second, with ten of them."""
    monkeypatch.setattr(valkey_module, "RENEWALS", 600)
    store = valkey_store(StoreSettings(f"{spec}?ttl_s=60", U, namespace=NAMESPACE))
    store._medium._renewing._timeout_s = PATIENT_S
    assert store.put(KEYS, DATA).all()
    yield store
    store.close()


def until_renewed(ask: Connection) -> None:
    """Takes half of a unit's time to live, and waits until it is given back."""
    assert ask.lines(command("PEXPIRE", wire(0), "30000"), 1) == [b":1"]
    until(lambda: int(ask.lines(command("PTTL", wire(0)), 1)[0][1:]) > 30_000)


def test_units_expire_unless_their_run_lives(monkeypatch):
    """A handle that is no longer heard of, and one that renews."""
    with valkey() as server, renewing_often(server.tcp, monkeypatch) as alive:
        ask = Connection(parse_spec(server.tcp)[0], timeout_s=PATIENT_S)
        dead = open_store(f"{server.tcp}?ttl_s=0.5", U)
        dead._medium._closing.set()  # its thread ends, as if by SIGKILL
        dead._medium._renewer.join()
        assert dead.put(KEYS, DATA).all()
        until(lambda: ask.lines(command("DBSIZE"), 1) == [b":10"])
        until_renewed(ask)
        assert fetched(alive).all()
        assert not fetched(dead).any()
        assert dead.stats().corrupt_units == 0
        alive.close()
        assert ask.lines(command("DBSIZE"), 1) == [b":0"]
        dead.close()
        ask.close()


def test_a_renewal_outlives_a_broken_connection(monkeypatch):
    with valkey() as server, renewing_often(server.tcp, monkeypatch) as store:
        ask = Connection(parse_spec(server.tcp)[0], timeout_s=PATIENT_S)
        renewing = store._medium._renewing
        for _ in range(5):
            until(lambda: renewing._socket is not None)
            assert int(ask.lines(command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"), 1)[0][1:]) > 0
            until_renewed(ask)
        assert renewing.num_retries > 0
        assert fetched(store).all()
        ask.close()


def test_a_store_closes_without_its_server():
    with valkey() as server:
        store = open_store(server.unix, U)
        store.put(KEYS, DATA)
        server.kill()
        store.close()


def test_a_server_that_is_down_at_the_start():
    port = free_port()
    with pytest.raises(UserError) as caught:
        open_store(f"redis://127.0.0.1:{port}", U)
    message = str(caught.value)
    assert "refused" in message
    assert f"valkey-server --port {port} --save ''" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"valkey-server --port 0 --unixsocket /nowhere/v\.sock"):
        open_store("unix:///nowhere/v.sock", U)


def test_a_password_is_asked_for_and_never_shown():
    with valkey("--requirepass", "secret") as server:
        address = f"127.0.0.1:{server.port}"
        for spec in (f"redis://{address}", f"redis://:wrong@{address}"):
            with pytest.raises(UserError, match=r"refuses: (NOAUTH|WRONGPASS)") as caught:
                open_store(spec, U)
            assert "wrong@" not in str(caught.value)
        store = open_store(f"redis://:secret@{address}/3", U)
        assert store.put(KEYS, DATA).all()
        store.close()
    with pytest.raises(UserError) as caught:
        open_store(f"redis://:secret@127.0.0.1:{free_port()}", U)
    assert "secret" not in str(caught.value)


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that answers each request by the next of `answers`, whatever was asked, then nothing."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENT_S)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                for answer in answers:
                    if not peer.recv(1 << 20):
                        return
                    peer.sendall(answer)
                ended.wait()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def test_another_protocol_on_the_port():
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    with (
        answering(refusal) as spec,
        pytest.raises(UserError, match="does not speak the Redis protocol: b'HTTP"),
    ):
        open_store(spec, U)
    with answering() as spec, pytest.raises(UserError, match=r"no answer within 0\.2 s"):
        open_store(spec, U, timeout_s=0.2)


PONG = (b"+PONG\r\n", b"+PONG\r\n")


@pytest.mark.parametrize(
    ("answer", "cause", "kind"),
    [
        (b"-LOADING Valkey is loading\r\n", "refuses: LOADING", "refused"),
        (b"*1\r\n:5\r\n", "malformed", "protocol"),
        (b"*2\r\n$-1\r\n$-1\r\n", "does not speak", "protocol"),
        (b"*1\r\n$-1\r\n$-1\r\n", "more than it was asked", "protocol"),
        (b"*1\r\n$656\r\nonly this", "no answer within", "timeout"),
        (b"", "no answer within", "timeout"),
    ],
)
def test_answers_that_are_none(answer, cause, kind):
    with answering(*PONG, b"+OK\r\n", answer) as spec:
        store = open_store(spec, U, timeout_s=PATIENT_S)
        assert store.put(KEYS[:1], DATA[:1]).all()
        with waiting(store, 0.3 if kind == "timeout" else PATIENT_S), fails(kind, cause):
            store.fetch(KEYS[:1], np.zeros_like(DATA[:1]))
        assert store.stats().errors == 1
        close_unheard(store)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad\r\n\r\n", b"-ERR one\r\n-ERR two\r\n"])
def test_a_strange_answer_to_a_write_leaves_none_for_later(answer):
    """It has as many lines as were asked for; another one may be under way."""
    with answering(*PONG, answer) as spec:
        store = open_store(spec, U, timeout_s=PATIENT_S)
        with pytest.raises(StoreError, match=r"does not speak|refuses: ERR one"):
            store.put(KEYS[:2], DATA[:2])
        assert store._medium._connection._socket is None
        close_unheard(store)


def test_memory_that_somebody_else_wrote_into():
    memory = np.zeros((10, U), dtype=np.uint8)
    store = open_store("ram", U, 10, memory=memory)
    store.put(KEYS, DATA)
    memory[(memory == DATA[6]).all(axis=1), 100] ^= 4
    assert np.flatnonzero(~fetched(store)).tolist() == [6]
    assert store.stats().corrupt_units == 1


FILES = ("mmap", "file", *(["nixl"] if has_nixl() else []))


def test_files_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("a thesis")
    for kind in FILES:
        with pytest.raises(UserError, match="exists already"):
            open_store(f"{kind}:{tmp_path}/mine", U, 10)
        with pytest.raises(UserError, match="No such file or directory"):
            open_store(f"{kind}:{tmp_path}/nowhere/f", U, 10)
    assert (tmp_path / "mine").read_text() == "a thesis"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for kind in FILES:
        with pytest.raises(UserError, match="no room for"):
            open_store(f"{kind}:{tmp_path}/f", U, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_nobody_elses(kind, tmp_path):
    store = open_store(f"{kind}:{tmp_path}/f", U, 10)
    store.put(KEYS, DATA)
    assert not list(tmp_path.iterdir())
    assert fetched(store).all()
    store.close()


@pytest.mark.parametrize("broken", ["error", "short"])
def test_a_disk_that_fails(broken, tmp_path, monkeypatch):
    store = open_store(f"file:{tmp_path}/f", U, 10)
    store.put(KEYS, DATA)

    def read(*_: object) -> int:
        if broken == "short":
            return 100
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", read)
        with fails("io"):
            fetched(store)
    assert store.stats().errors == 1
    assert fetched(store).all()
    store.close()
