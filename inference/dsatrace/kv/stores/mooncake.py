"""Units in Mooncake Store, the distributed pool that vLLM and SGLang use; one batch call each way.

    store = mooncake_store("mooncake://127.0.0.1:50051?segment_mib=1024", unit_bytes=41984)

Needs the package `mooncake-transfer-engine-non-cuda` (or the CUDA one) and a master:
`mooncake_master --rpc_address=127.0.0.1 --rpc_port=50051`. This process adds a segment of
`segment_mib` of its memory to the pool; with 0 other processes must have added some. A unit
read lately is leased: `evict` says False until the lease (10 s by default) is over.

Buffers that were registered are read and written in place. Mooncake's calls cannot be broken
off, so such a call ends by Mooncake's own limits: `timeout_s` for questions to the master (set
as `MC_RPC_TIMEOUT_MS` where that is not set yet), half a minute for the bytes. Calls on other
memory go through a copy of ours and end in time in any case.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.arguments import are_distinct
from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.checksums import copy_units, sum_units
from dsatrace.kv.stores.interface import StoreError, new_namespace
from dsatrace.kv.stores.medium import ABSENT, DAMAGED, FOUND, Medium, Moved

OK, NO_ROOM, WRONG_SIZE = 0, -200, -600
NOT_FOUND, HAS_LEASE, LEASE_EXPIRED, TIMED_OUT = -704, -706, -707, -901
"""Mooncake's codes for a unit. `LEASE_EXPIRED`: it may have been replaced while it was read."""

DEFAULT_PORT = 50051
DEFAULT_SEGMENT_MIB = 1024
STAGING_BYTES = 16 << 20
PACKAGE = "mooncake-transfer-engine-non-cuda"


class MooncakeMedium(Medium):
    """Unit = one object. One operation a unit."""

    def __init__(self, client: Any, unit_bytes: int, namespace: bytes, timeout_s: float) -> None:
        self._client = client
        self._unit_bytes = unit_bytes
        self._namespace = namespace.hex()
        self._timeout_s = timeout_s
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="mooncake")
        self._unfinished: Future[Any] | None = None
        self._registered: list[np.ndarray] = []
        self._staging = np.empty((max(1, STAGING_BYTES // unit_bytes), unit_bytes), dtype=np.uint8)
        self._register(self._staging)

    def write(
        self, keys: np.ndarray, slots: np.ndarray, data: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        if self._is_registered(data):
            sum_units(data, rows, keys, sums)
            codes = self._checked(self._client.batch_upsert_from(*self._pieces(keys, data, rows)))
        else:
            codes = self._staged(self._client.batch_upsert_from, keys, data, rows, sums, into=False)
        stored = codes == OK
        if not stored.all():
            self._fail_on(codes, (OK, NO_ROOM))
            self.drop(keys[~stored])  # an older version may have stayed
        return Moved(stored, len(keys), int(np.count_nonzero(stored)) * self._unit_bytes)

    def read(
        self, keys: np.ndarray, slots: np.ndarray, out: np.ndarray, rows: np.ndarray, sums: np.ndarray
    ) -> Moved:
        if not are_distinct(keys):  # of a key that stands twice in a batch, Mooncake serves one
            _, first, again = np.unique(keys, return_index=True, return_inverse=True)
            once = self.read(keys[first], slots[first], out, rows[first], np.empty(len(first), np.uint64))
            copy_units(out, rows[first][again], out, rows, keys, sums)
            return once._replace(outcome=once.outcome[again])
        if self._is_registered(out):
            codes = self._checked(self._client.batch_get_into(*self._pieces(keys, out, rows)))
            sum_units(out, rows, keys, sums)
        else:
            codes = self._staged(self._client.batch_get_into, keys, out, rows, sums, into=True)
        self._fail_on(codes[codes < 0], (NOT_FOUND, LEASE_EXPIRED, WRONG_SIZE))
        outcome = np.full(len(keys), DAMAGED, dtype=np.uint8)
        outcome[(codes == NOT_FOUND) | (codes == LEASE_EXPIRED)] = ABSENT
        outcome[codes == self._unit_bytes] = FOUND
        return Moved(outcome, int(np.count_nonzero(outcome != ABSENT)), int(codes[codes > 0].sum()))

    def holds(self, keys: np.ndarray) -> np.ndarray:
        codes = self._in_time(self._client.batch_is_exist, self._names(keys))
        self._fail_on(codes, (0, 1))
        return codes == 1

    def drop(self, keys: np.ndarray) -> np.ndarray:
        codes = self._in_time(self._client.batch_remove, self._names(keys))
        self._fail_on(codes, (OK, NOT_FOUND, HAS_LEASE))
        return codes != HAS_LEASE

    def register(self, buffer: np.ndarray) -> None:
        self._register(buffer)
        self._registered.append(buffer)

    def close(self, keys: np.ndarray) -> None:
        if self._unfinished is None or self._unfinished.done():
            if len(keys):  # by force, for a lease protects readers, and this handle was the only one
                self._client.batch_remove(self._names(keys), True)
            for buffer in (self._staging, *self._registered):
                self._client.unregister_buffer(buffer.ctypes.data)
            self._client.close()
        self._caller.shutdown(wait=False)

    def _register(self, buffer: np.ndarray) -> None:
        if code := self._client.register_buffer(buffer.ctypes.data, buffer.nbytes):
            raise StoreError("refused", f"mooncake: cannot register {buffer.nbytes} bytes (code {code})")

    def _is_registered(self, buffer: np.ndarray) -> bool:
        begin, end = _span(buffer)
        return any(low <= begin and end <= high for low, high in map(_span, self._registered))

    def _staged(
        self,
        call: Callable[..., Sequence[int]],
        keys: np.ndarray,
        buffer: np.ndarray,
        rows: np.ndarray,
        sums: np.ndarray,
        into: bool,
    ) -> np.ndarray:
        """A call whose bytes go through the staging memory, as much at a time as fits: codes, (N,) int64."""
        codes = np.empty(len(keys), dtype=np.int64)
        for begin in range(0, len(keys), len(self._staging)):
            part = slice(begin, begin + len(self._staging))
            staged = np.arange(len(keys[part]), dtype=np.int64)
            self._check_idle()
            if not into:
                copy_units(buffer, rows[part], self._staging, staged, keys[part], sums[part])
            codes[part] = self._in_time(call, *self._pieces(keys[part], self._staging, staged))
            if into:
                copy_units(self._staging, staged, buffer, rows[part], keys[part], sums[part])
        return codes

    def _in_time(self, call: Callable[..., Sequence[int]], *arguments: object) -> np.ndarray:
        """What the call returns, one code a unit; `StoreError` if that takes too long.

        A call that took too long goes on, and its memory with it: until it ends there are no others.
        """
        self._check_idle()
        self._unfinished = self._caller.submit(call, *arguments)
        try:
            return self._checked(self._unfinished.result(self._timeout_s))
        except FutureTimeout:
            raise StoreError("timeout", f"mooncake: no answer within {self._timeout_s:g} s") from None

    def _check_idle(self) -> None:
        if self._unfinished is not None and not self._unfinished.done():
            raise StoreError("timeout", "mooncake: still busy with a call that took too long")

    def _checked(self, codes: Sequence[int]) -> np.ndarray:
        return np.asarray(codes, dtype=np.int64)

    def _fail_on(self, codes: np.ndarray, expected: Sequence[int]) -> None:
        unexpected = set(codes.tolist()) - set(expected)
        if TIMED_OUT in unexpected:
            raise StoreError("timeout", "mooncake: its master does not answer")
        if unexpected:
            raise StoreError("connection", f"mooncake: code {min(unexpected)}; is its master still up?")

    def _pieces(
        self, keys: np.ndarray, buffer: np.ndarray, rows: np.ndarray
    ) -> tuple[list[str], list[int], list[int]]:
        """Names, addresses and sizes, as Mooncake takes them."""
        addresses = buffer.ctypes.data + rows * self._unit_bytes
        return self._names(keys), addresses.tolist(), [self._unit_bytes] * len(keys)

    def _names(self, keys: np.ndarray) -> list[str]:
        return [f"{self._namespace}{key:016x}" for key in keys.tolist()]


def _span(buffer: np.ndarray) -> tuple[int, int]:
    return buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes


def mooncake_store(
    spec: str,
    unit_bytes: int,
    capacity_units: int | None = None,
    timeout_s: float = 5.0,
    namespace: bytes | None = None,
) -> CheckedStore:
    """A store in the pool of the master that `spec` names; `UserError` if there is none."""
    host, port, segment_mib = _parse(spec)
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MC_RPC_TIMEOUT_MS", str(int(timeout_s * 1000)))
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise UserError(f"{spec}: {error}; pip install {PACKAGE}, apt install libibverbs1") from error
    start = f"start one with `mooncake_master --rpc_address={host} --rpc_port={port}`"
    try:  # asked first, because Mooncake itself goes on trying for a minute and a half
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        raise UserError(f"{spec}: no master ({error.strerror or error}); {start}") from error
    client = MooncakeDistributedStore()
    code = client.setup(
        socket.gethostbyname(host) if host in ("localhost", "127.0.0.1") else socket.gethostname(),
        "P2PHANDSHAKE",
        segment_mib << 20,
        STAGING_BYTES,
        "tcp",
        "",
        f"{host}:{port}",
    )
    if code:
        raise UserError(f"{spec}: what listens there is not a Mooncake master (code {code}); {start}")
    medium = MooncakeMedium(client, unit_bytes, namespace or new_namespace(), timeout_s)
    return CheckedStore(medium, unit_bytes, capacity_units)


def _parse(spec: str) -> tuple[str, int, int]:
    """Host, port and segment of `mooncake://HOST[:PORT][?segment_mib=N]`."""
    try:
        url = urllib.parse.urlsplit(spec)
        fields = dict(urllib.parse.parse_qsl(url.query, strict_parsing=bool(url.query)))
        segment_mib = int(fields.pop("segment_mib", DEFAULT_SEGMENT_MIB))
        if url.scheme != "mooncake" or not url.hostname or fields or url.path.strip("/") or segment_mib < 0:
            raise ValueError
        return url.hostname, url.port or DEFAULT_PORT, segment_mib
    except ValueError:
        raise UserError(f"{spec}: not an address; use mooncake://HOST:PORT?segment_mib=1024") from None
