"""The contract of a store of KV units, what it counts, and the check of a batch's arrays.

A unit is a fixed number of bytes: one block of one layer, or one row (one token of one
layer). A store knows neither tokens nor layers; a key is a number.

    keys = unit_keys(layer_id=3, unit_ids=block_ids)          # (N,) uint64
    stored = store.put(keys, pool, rows=slots)                # (N,) bool
    hits = store.fetch(keys, pool, rows=slots)                # (N,) bool
    store.stats().bytes_read
"""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from dsatrace.schema import LatencyKind

UNIT_ID_BITS = 48
NAMESPACE_BYTES = 16
DEFAULT_TIMEOUT_S = 5.0
ALIGNMENT = 8  # bytes; units are copied and summed as words

ErrorKind = Literal["timeout", "hanging", "connection", "protocol", "io", "refused"]
"""`hanging`: it was not asked, since it has just left a batch without an answer."""


class StoreError(RuntimeError):
    """A store failed in use: as far as one can tell, the batch did not happen."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


@dataclasses.dataclass(frozen=True)
class StoreStats:
    """What a store has done since it was opened; subtract two with `-`.

    Always `requested_units == hit_units + missed_units`, `bytes_useful == hit_units * unit_bytes`. An
    operation is a run of adjacent units where the medium merges neighbours (memory, files), else one
    unit. Of a failed batch, units count as missed or not stored, no bytes count, and `errors` grows
    by one.
    """

    read_batches: int = 0
    requested_units: int = 0
    hit_units: int = 0
    missed_units: int = 0  # absent, corrupt, or in a batch that failed
    corrupt_units: int = 0  # of those, units whose bytes came back short or altered
    read_ops: int = 0
    bytes_read: int = 0  # moved from the medium, padding and corrupt units included
    bytes_useful: int = 0
    read_us: float = 0.0
    write_batches: int = 0
    put_units: int = 0
    stored_units: int = 0
    write_ops: int = 0
    bytes_written: int = 0
    write_us: float = 0.0
    evicted_units: int = 0  # by `evict`; a unit that a remote store drops by itself is a later miss
    errors: int = 0  # batches that raised `StoreError`
    timeouts: int = 0  # of those, by time
    skipped_batches: int = 0  # of the errors, batches not sent since the store was hanging
    retries: int = 0  # requests sent again since their connection broke; no error if that went well
    latency_kind: LatencyKind = "measured"

    def __sub__(self, earlier: StoreStats) -> StoreStats:
        changes = {
            field.name: getattr(self, field.name) - getattr(earlier, field.name)
            for field in dataclasses.fields(self)
            if field.name != "latency_kind"
        }
        return StoreStats(**changes, latency_kind=self.latency_kind)


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """What a store is opened with."""

    spec: str  # as the user wrote it, `SCHEME` or `SCHEME:REST`
    unit_bytes: int
    capacity_units: int | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    memory: np.ndarray | None = None  # for `ram` only
    # Keeps one handle's units in a shared store apart from all others'.
    namespace: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(NAMESPACE_BYTES))

    @property
    def path(self) -> Path:
        """The spec without its scheme, for a store in a file."""
        return Path(self.spec.partition(":")[2])

    @property
    def room(self) -> int:
        """`capacity_units`, which a store on this machine needs."""
        if self.capacity_units is None:
            raise ValueError(f"{self.spec}: say how many units it may hold")
        return self.capacity_units


class Store(Protocol):
    """Keeps units of `unit_bytes` bytes under 64-bit keys and gives them back, a batch at a time.

    *Arrays.* `keys` is `(N,)` uint64. `data` and `out` are C-contiguous `(M, unit_bytes)`
    uint8 that start at a multiple of 8 bytes; unit i is row `rows[i]` of it, or row i where
    `rows` is None (then M == N). Anything else raises `ValueError` and nothing happens. A batch
    may be empty.

    *Own units only.* A handle gives back what it stored itself, in the version it stored last.
    Handles on one shared store never see each other's units, not even under equal keys.

    *Never wrong bytes.* A hit holds exactly the bytes that were put. A unit that is gone,
    short, altered or of an older version is a miss (the latter three counted as corrupt), and
    is forgotten. Rows of `out` that missed hold anything afterwards: use a row only if it hit.

    *Failure.* A store that stops answering raises `StoreError` within `timeout_s`, with its
    cause; `out` then holds anything, and the units of a failed put are forgotten. The handle
    stays usable: a later call tries again, and a store that has come back empty just misses.
    After a timeout, though, calls raise at once for a time that grows with every timeout, until
    one is answered.

    *Room.* A put into a full store keeps what fits and says which; it never evicts. An
    overwrite that did not fit leaves the key absent, never an old version.

    *Threads.* Calls may come from any thread and are carried out one after the other, `stats`
    included. `close` may be called twice; any other call after it raises `ValueError`.
    """

    unit_bytes: int
    capacity_units: int | None  # None: as much as the medium takes

    def put(self, keys: np.ndarray, data: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Stores or overwrites; `keys` are distinct. Returns which units are stored, (N,) bool."""

    def fetch(self, keys: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Reads into `out`; a key may stand twice, a row may not. Returns the hits, (N,) bool."""

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which units are here, (N,) bool. Says nothing about their bytes, counts no request."""

    def evict(self, keys: np.ndarray) -> np.ndarray:
        """Drops units. Returns which were here and are gone now, (N,) bool: False for an unknown
        key, and for one the medium holds under a lease, which stays readable."""

    def register(self, buffer: np.ndarray) -> None:
        """Announces memory that `data` and `out` will lie in, once; stores that move bytes by
        address then skip a copy. The caller keeps it alive until `close`."""

    def stats(self) -> StoreStats:
        """The counts so far."""

    def close(self) -> None:
        """Gives everything back: memory, files, and this handle's units in a shared store."""


def unit_keys(layer_id: int, unit_ids: np.ndarray) -> np.ndarray:
    """The keys of one layer's units, (N,) uint64. `unit_ids`: block ids or row numbers below 2**48."""
    ids = np.asarray(unit_ids)
    if not 0 <= layer_id < 1 << (64 - UNIT_ID_BITS):
        raise ValueError(f"layer {layer_id} does not fit a key's 16 bits")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << UNIT_ID_BITS:
        raise ValueError(f"unit ids {ids.min()}..{ids.max()} do not fit a key's {UNIT_ID_BITS} bits")
    return ids.astype(np.uint64) | np.uint64(layer_id << UNIT_ID_BITS)


def check_keys(keys: np.ndarray) -> None:
    """Raises `ValueError` unless `keys` is a (N,) uint64 array without gaps."""
    if keys.dtype != np.uint64 or keys.ndim != 1 or not keys.flags.c_contiguous:
        raise ValueError(f"keys must be a contiguous (N,) uint64 array, not {keys.shape} {keys.dtype}")


def check_batch(unit_bytes: int, keys: np.ndarray, buffer: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """The rows of `buffer` that hold the units, (N,) int64; raises `ValueError` as the contract says."""
    check_keys(keys)
    if buffer.dtype != np.uint8 or buffer.ndim != 2 or not buffer.flags.c_contiguous:
        raise ValueError(f"a buffer is C-contiguous (M, unit_bytes) uint8, not {buffer.shape} {buffer.dtype}")
    if buffer.shape[1] != unit_bytes:
        raise ValueError(f"the store's units are {unit_bytes} bytes; the buffer's rows are {buffer.shape[1]}")
    if buffer.__array_interface__["data"][0] % ALIGNMENT:
        raise ValueError(f"the buffer does not start at a multiple of {ALIGNMENT} bytes")
    if rows is None:
        if len(buffer) != len(keys):
            raise ValueError(f"{len(keys)} keys for {len(buffer)} rows; name the rows")
        return np.arange(len(keys), dtype=np.int64)
    if rows.shape != keys.shape or rows.dtype.kind not in "iu":
        raise ValueError(f"rows must be {len(keys)} integers, not {rows.shape} {rows.dtype}")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(buffer):
        raise ValueError(f"rows {rows.min()}..{rows.max()} lie outside the buffer's {len(buffer)}")
    return np.ascontiguousarray(rows, dtype=np.int64)


def are_distinct(numbers: np.ndarray) -> bool:
    ordered = np.sort(numbers)
    return not (ordered[1:] == ordered[:-1]).any()
