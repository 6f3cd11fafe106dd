"""Units as named objects in a memory pool to which many processes lend: what Mooncake and MemCache share.

A `PoolClient` is one package's calls under common names, and `Codes` the meaning of its numbers;
`PooledMedium` makes a medium of it. An object's name is the handle's 16 random bytes and the unit's
number.

    medium = PooledMedium(MooncakeClient(store), settings)

Registered memory is read and written in place, by calls that end by the package's own limits. Other
memory goes through a copy of ours, and its calls end within `timeout_s`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from dsatrace.kv.stores.checked import ABSENT, DAMAGED, FOUND, Batch, Medium, Moved
from dsatrace.kv.stores.checksums import copy_units
from dsatrace.kv.stores.client_calls import StagedMemory, TimedCaller
from dsatrace.kv.stores.interface import StoreError, StoreSettings, are_distinct

OK = 0
MoveCall = Callable[[list[str], list[int], list[int]], Sequence[int]]  # PoolClient.store or .load


@dataclasses.dataclass(frozen=True)
class Codes:
    """What a package's negative numbers mean; any other is a failure of the whole batch."""

    no_room: tuple[int, ...]  # writes
    absent: tuple[int, ...]  # reads and removals
    damaged: tuple[int, ...]  # reads: there, but of another length
    leased: tuple[int, ...]  # removals: being read
    timed_out: tuple[int, ...]


class PoolClient(Protocol):
    """One package's calls: a batch each, distinct names, one code per unit. 0 is success unless said."""

    name: str  # of the package, for messages
    codes: Codes

    def store(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        """Stores the bytes at the addresses, in place of older versions."""

    def load(self, names: list[str], addresses: list[int], sizes: list[int]) -> Sequence[int]:
        """Reads to the addresses. A code is the number of bytes read."""

    def exist(self, names: list[str]) -> Sequence[int]:
        """A code is 1 or 0."""

    def remove(self, names: list[str], force: bool) -> Sequence[int]:
        """Drops objects; with `force` also leased ones, if the package can."""

    def register(self, address: int, num_bytes: int) -> int:
        """Announces memory."""

    def unregister(self, address: int, num_bytes: int) -> object:
        """Undoes `register`."""

    def close(self) -> object:
        """Leaves the pool."""


class PooledMedium(Medium):
    """Unit = one object. One operation per unit."""

    def __init__(self, client: PoolClient, settings: StoreSettings) -> None:
        self._client = client
        self._codes = client.codes
        self._unit_bytes = settings.unit_bytes
        self._namespace = settings.namespace.hex()
        self._caller = TimedCaller(client.name, settings.timeout_s)
        self._memory = StagedMemory(settings.unit_bytes, self._announce)

    def write(self, batch: Batch) -> Moved:
        self._caller.check_idle()
        codes = self._memory.send(partial(self._move, self._client.store), batch)
        stored = codes == OK
        if not stored.all():
            self._fail_on(codes, (OK, *self._codes.no_room))
            self.drop(batch.keys[~stored])  # an older version may have stayed
        return Moved(stored, len(stored), int(np.count_nonzero(stored)) * self._unit_bytes)

    def read(self, batch: Batch) -> Moved:
        self._caller.check_idle()
        keys, slots, out, rows, sums = batch
        if not are_distinct(keys):  # Mooncake serves a key only once per batch
            _, first, again = np.unique(keys, return_index=True, return_inverse=True)
            no_sums = np.empty(len(first), np.uint64)
            once = self.read(Batch(keys[first], slots[first], out, rows[first], no_sums))
            copy_units(out, rows[first][again], out, rows, keys, sums)
            return once._replace(outcome=once.outcome[again])
        codes = self._memory.receive(partial(self._move, self._client.load), batch)
        self._fail_on(codes[codes < 0], (*self._codes.absent, *self._codes.damaged))
        outcome = np.full(len(keys), DAMAGED, dtype=np.uint8)
        outcome[np.isin(codes, self._codes.absent)] = ABSENT
        outcome[codes == self._unit_bytes] = FOUND
        return Moved(outcome, int(np.count_nonzero(outcome != ABSENT)), int(codes[codes > 0].sum()))

    def holds(self, keys: np.ndarray) -> np.ndarray:
        codes = np.asarray(self._caller.in_time(self._client.exist, self._names(keys)))
        self._fail_on(codes, (0, 1))
        held: np.ndarray = codes == 1
        return held

    def drop(self, keys: np.ndarray) -> np.ndarray:
        codes = np.asarray(self._caller.in_time(self._client.remove, self._names(keys), False))
        self._fail_on(codes, (OK, *self._codes.absent, *self._codes.leased))
        return ~np.isin(codes, self._codes.leased)

    def register(self, buffer: np.ndarray) -> None:
        self._memory.register(buffer)

    def close(self, keys: np.ndarray) -> None:
        if self._caller.is_idle:
            if len(keys):  # by force: a lease protects readers, and this handle was the only one
                self._client.remove(self._names(keys), True)
            for buffer in self._memory.buffers:
                self._client.unregister(buffer.ctypes.data, buffer.nbytes)
            self._client.close()
        self._caller.close()

    def _announce(self, buffer: np.ndarray) -> None:
        if code := self._client.register(buffer.ctypes.data, buffer.nbytes):
            name, size = self._client.name, buffer.nbytes
            raise StoreError("refused", f"{name}: cannot register {size} bytes (code {code})")

    def _move(
        self, call: MoveCall, keys: np.ndarray, slots: np.ndarray, addresses: np.ndarray, direct: bool
    ) -> Sequence[int]:
        pieces = self._names(keys), addresses.tolist(), [self._unit_bytes] * len(keys)
        return call(*pieces) if direct else self._caller.in_time(call, *pieces)

    def _fail_on(self, codes: np.ndarray, expected: Sequence[int]) -> None:
        unexpected = set(codes.tolist()) - set(expected)
        if unexpected & set(self._codes.timed_out):
            raise StoreError("timeout", f"{self._client.name}: its master does not answer")
        if unexpected:
            raise StoreError(
                "connection", f"{self._client.name}: code {min(unexpected)}; is its master still up?"
            )

    def _names(self, keys: np.ndarray) -> list[str]:
        return [f"{self._namespace}{key:016x}" for key in keys.tolist()]
