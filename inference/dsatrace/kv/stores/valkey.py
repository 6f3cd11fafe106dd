"""Units in a Valkey or Redis server, over TCP or a unix socket, many per request.

    store = open_store("redis://127.0.0.1:6379", unit_bytes=41984)
    store = open_store("unix:///run/valkey.sock?db=1&ttl_s=60", unit_bytes=41984, capacity_units=10_000)

A server for a run: `valkey-server --port 6379 --save '' --maxmemory 8gb`. A key is the handle's 16
random bytes and the unit's number. A unit that the server evicts or expires is a miss; under
`maxmemory-policy noeviction` a full server refuses units, which `put` reports.

Each unit is written with a time to live, `ttl_s` seconds (default: 600), so that the units of a run
that was killed go away. A run that lives renews all its units four times in that time, in a thread and
on a connection of its own: 1,024 units per request, nothing per step. To renew 100,000 units takes the
thread 25 ms of CPU and the server 0.3 s, once in 150 seconds. A write costs the server 0.3 us more per
unit: 2 % of a batch of blocks of 41,984 bytes, 25 % of one of 2,048 rows of 656; a fetch costs the same.
One hash per run, with one time to live, would be cheaper, but a server that evicts would drop the whole
run at once; and a renewal by each read would cost every fetch, and lose the units that are not read.

The client (`resp`) is our own: checksums included, it fetches 64 blocks 1.1 times and 2,048 rows 1.2
to 2.4 times as fast as redis-py with hiredis (`scripts/bench/tiers.py`, TCP and unix socket).
"""

from __future__ import annotations

import contextlib
import math
import threading
import urllib.parse
from collections.abc import Callable

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.checked import ABSENT, DAMAGED, FOUND, Batch, CheckedStore, Medium, Moved, parts
from dsatrace.kv.stores.checksums import sum_units
from dsatrace.kv.stores.interface import NAMESPACE_BYTES, StoreError, StoreSettings
from dsatrace.kv.stores.resp import NIL, Address, Connection, Frames, command, unpack

KEY_BYTES = NAMESPACE_BYTES + 8
REQUEST_BYTES = 4 << 20
"""Bytes of values per request; limits the memory for requests and replies."""
REQUEST_KEYS = 1024
"""Keys per request without values."""
DEFAULT_TTL_S = 600.0
LEAST_TTL_S, MOST_TTL_S = 0.1, 30 * 24 * 3600.0
RENEWALS = 4
"""Per time to live: a unit outlives two that fail."""


class ValkeyMedium(Medium):
    """Unit = one string value. One operation per unit, also if several share a request."""

    def __init__(self, address: Address, ttl_s: float, settings: StoreSettings) -> None:
        self._connection = Connection(address, settings.timeout_s)
        self._renewing = Connection(address, min(settings.timeout_s, ttl_s / RENEWALS))
        self._ttl_s = ttl_s
        self._closing = threading.Event()
        self._renewer: threading.Thread | None = None
        self._unit_bytes = unit_bytes = settings.unit_bytes
        self._namespace = np.frombuffer(settings.namespace, dtype=np.uint8)
        self._batch = max(1, REQUEST_BYTES // unit_bytes)
        ttl_ms = b"%d" % math.ceil(ttl_s * 1e3)
        ttl_word = b"$%d\r\n%s\r\n" % (len(ttl_ms), ttl_ms)
        self._set = Frames(b"*5\r\n$3\r\nSET\r\n", KEY_BYTES, unit_bytes, b"$2\r\nPX\r\n" + ttl_word)
        self._renew = Frames(b"*3\r\n$7\r\nPEXPIRE\r\n", KEY_BYTES, end=ttl_word)
        self._get = Frames(b"", KEY_BYTES)
        self._connection.lines(command("PING"), 1)

    @property
    def num_retries(self) -> int:
        return self._connection.num_retries

    def keep_alive(self, stored: Callable[[], np.ndarray]) -> None:
        """From now on, renews what `stored` returns, (K,) uint64, until `close`."""

        def run() -> None:
            while not self._closing.wait(self._ttl_s / RENEWALS):
                with contextlib.suppress(StoreError):  # the next renewal comes in time
                    self._renew_all(stored())
            self._renewing.close()

        self._renewer = threading.Thread(target=run, name="renew-units", daemon=True)
        self._renewer.start()

    def _renew_all(self, keys: np.ndarray) -> None:
        """A unit that the server has dropped stays away."""
        for part in parts(len(keys), REQUEST_KEYS):
            if self._closing.is_set():
                return
            self._renewing.lines(self._renew.filled(self._wire_keys(keys[part])), len(keys[part]))

    def write(self, batch: Batch) -> Moved:
        keys, _, data, rows, sums = batch
        sum_units(data, rows, keys, sums)
        stored = np.empty(len(keys), dtype=bool)
        for part in parts(len(keys), self._batch):
            request = self._set.filled(self._wire_keys(keys[part]), data, rows[part])
            replies = self._connection.lines(request, len(request))
            stored[part] = [self._was_stored(reply) for reply in replies]
        if not stored.all():
            self.drop(keys[~stored])  # an older version may have stayed
        return Moved(stored, len(keys), int(np.count_nonzero(stored)) * self._unit_bytes)

    def _was_stored(self, reply: bytes) -> bool:
        if reply == b"+OK":
            return True
        if reply.startswith(b"-OOM"):
            return False
        raise self._connection.refusal(reply)

    def read(self, batch: Batch) -> Moved:
        keys, _, out, rows, sums = batch
        outcome = np.full(len(keys), ABSENT, dtype=np.uint8)
        num_bytes = 0
        for part in parts(len(keys), self._batch):
            frames = self._get.filled(self._wire_keys(keys[part]))
            head = b"*%d\r\n$4\r\nMGET\r\n" % (len(frames) + 1)
            request = np.frombuffer(head + frames.tobytes(), dtype=np.uint8)
            reply, begins, lengths = self._connection.values(request, len(frames), self._unit_bytes)
            found = lengths == self._unit_bytes
            outcome[part] = np.where(found, FOUND, np.where(lengths == NIL, ABSENT, DAMAGED))
            unpack(reply, begins[found], out, rows[part][found])
            num_bytes += int(lengths[lengths != NIL].sum())
        sum_units(out, rows, keys, sums)
        return Moved(outcome, int(np.count_nonzero(outcome != ABSENT)), num_bytes)

    def holds(self, keys: np.ndarray) -> np.ndarray:
        return self._ask(b"EXISTS", keys) > 0

    def drop(self, keys: np.ndarray) -> np.ndarray:
        self._ask(b"UNLINK", keys)
        return np.ones(len(keys), dtype=bool)

    def _ask(self, question: bytes, keys: np.ndarray) -> np.ndarray:
        """The replies, integers, to a command that takes one key: (N,) int64."""
        start = b"*2\r\n$%d\r\n%s\r\n" % (len(question), question)
        request = Frames(start, KEY_BYTES).filled(self._wire_keys(keys))
        replies = self._connection.lines(request, len(keys))
        if refusals := [reply for reply in replies if not reply.startswith(b":")]:
            raise self._connection.refusal(refusals[0])
        return np.array([int(reply[1:]) for reply in replies], dtype=np.int64)

    def _wire_keys(self, keys: np.ndarray) -> np.ndarray:
        """(N, KEY_BYTES) uint8."""
        wire = np.empty((len(keys), KEY_BYTES), dtype=np.uint8)
        wire[:, :NAMESPACE_BYTES] = self._namespace
        wire[:, NAMESPACE_BYTES:] = keys.astype(">u8").view(np.uint8).reshape(len(keys), 8)
        return wire

    def close(self, keys: np.ndarray) -> None:
        self._closing.set()
        with contextlib.suppress(StoreError):  # a server that is gone has no units to drop
            for part in parts(len(keys), REQUEST_KEYS):
                self.drop(keys[part])
        self._connection.close()
        if self._renewer is not None:
            self._renewer.join()


def valkey_store(settings: StoreSettings) -> CheckedStore:
    """A store on the server that the spec names; raises `UserError` if it does not answer."""
    address, ttl_s = parse_spec(settings.spec)
    try:
        medium = ValkeyMedium(address, ttl_s, settings)
    except StoreError as error:
        if error.kind == "refused":
            raise UserError(f"{error}; a password goes into redis://:PASSWORD@HOST:PORT") from error
        where = f"--port {address.port}" if address.path is None else f"--port 0 --unixsocket {address.path}"
        raise UserError(f"{error}; start a server with `valkey-server {where} --save ''`") from error
    store = CheckedStore(medium, settings)
    medium.keep_alive(store.keys)
    return store


def parse_spec(spec: str) -> tuple[Address, float]:
    """The server, and the units' time to live in seconds.

    `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE][?ttl_s=SECONDS]`, the same as `valkey://`, or
    `unix://PATH[?db=N&ttl_s=SECONDS]`.
    """
    try:
        url = urllib.parse.urlsplit(spec)
        fields = dict(urllib.parse.parse_qsl(url.query, strict_parsing=bool(url.query)))
        ttl_s = float(fields.pop("ttl_s", DEFAULT_TTL_S))
        if url.scheme == "unix":
            database, path = int(fields.pop("db", 0)), url.netloc + url.path
        else:
            database, path = int(url.path.strip("/") or 0), None
        port = url.port or Address.port
        if fields or url.scheme not in ("redis", "valkey", "unix") or path == "":
            raise ValueError
    except ValueError:
        raise UserError(
            f"{_without_password(spec)}: not an address; use redis://HOST:PORT/DATABASE or unix://PATH?db=N, "
            "and after it ?ttl_s=SECONDS or &ttl_s=SECONDS"
        ) from None
    if not LEAST_TTL_S <= ttl_s <= MOST_TTL_S:  # so written, it catches nan too
        raise UserError(f"{_without_password(spec)}: use a ttl_s from 0.1 to 2592000 (30 days)")
    address = Address(
        label=_without_password(spec),
        host=url.hostname or Address.host,
        port=port,
        path=path,
        username=urllib.parse.unquote(url.username) if url.username else None,
        password=urllib.parse.unquote(url.password) if url.password else None,
        database=database,
    )
    return address, ttl_s


def _without_password(spec: str) -> str:
    scheme, separator, rest = spec.partition("://")
    return scheme + separator + rest.rpartition("@")[2]
