"""Measures a store and fits `alpha_batch + ops * alpha_op + bytes / bandwidth` to it.

Batches have few and many units, small and large, scattered and adjacent, so that operations and bytes
can be told apart. The fit minimizes relative errors, since times span four decades, and no coefficient
is negative.

    preset, error = calibrate("ram", name="ram", source="this machine, 2026-01-01")
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store, unit_keys
from dsatrace.kv.stores.opening import open_store
from dsatrace.kv.stores.simulated import Figure, Preset

UNIT_BYTES = (656, 10_496, 41_984)
"""An fp8 row, and blocks of 16 and 64 of them."""

BATCH_UNITS = (1, 8, 64, 256)
POOL_UNITS = 1024
SEED = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One batch; the time is the median of several equal ones."""

    ops: int
    num_bytes: int
    us: float


def calibrate(spec: str, name: str, source: str, repeats: int = 9) -> tuple[Preset, float]:
    """The preset that fits the store of `spec`, called `name`, and the median relative error of its reads."""
    reads: list[Sample] = []
    writes: list[Sample] = []
    for unit_bytes in UNIT_BYTES:
        store = open_store(spec, unit_bytes, POOL_UNITS)
        try:
            put, fetched = _measure(store, repeats)
        finally:
            store.close()
        writes += put
        reads += fetched
    alpha_batch, alpha_op, us_per_byte = fit(reads)
    predicted = [alpha_batch + s.ops * alpha_op + s.num_bytes * us_per_byte for s in reads]
    error = statistics.median(abs(p - s.us) / s.us for p, s in zip(predicted, reads, strict=True))
    fastest_write = max(sample.num_bytes / sample.us / 1e3 for sample in writes)
    unresolved = max(s.num_bytes / s.us / 1e3 for s in reads)  # used if the fit finds no cost in bytes
    return Preset(
        name=name,
        what="measured where it was calibrated, this project's own layer included",
        alpha_batch_us=Figure(alpha_batch, source, "measured"),
        alpha_op_us=Figure(alpha_op, source, "measured"),
        read_gb_per_s=Figure(1e-3 / us_per_byte if us_per_byte else unresolved, source, "measured"),
        write_gb_per_s=Figure(fastest_write, f"{source}; largest batch, alphas included", "measured"),
    ), error


def fit(samples: list[Sample]) -> tuple[float, float, float]:
    """`alpha_batch`, `alpha_op` and microseconds per byte, none negative, by least relative squares."""
    times = np.array([sample.us for sample in samples])
    terms = np.array([(1.0, sample.ops, sample.num_bytes) for sample in samples]) / times[:, None]  # (S, 3)
    best, least = np.zeros(3), float(len(samples))
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        scale = np.linalg.norm(terms[:, used], axis=0)  # bytes are millions where batches are ones
        solved = np.linalg.lstsq(terms[:, used] / scale, np.ones(len(samples)), rcond=None)[0] / scale
        error = float(np.square(terms[:, used] @ solved - 1).sum())
        if (solved >= 0).all() and error < least:
            best, least = np.zeros(3), error
            best[list(used)] = solved
    return float(best[0]), float(best[1]), float(best[2])


def _measure(store: Store, repeats: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of writes of the whole pool, and of reads of every kind of batch."""
    rng = np.random.default_rng(SEED)
    keys = unit_keys(0, np.arange(POOL_UNITS))
    data = rng.integers(0, 256, (POOL_UNITS, store.unit_bytes), dtype=np.uint8)
    out = np.zeros((max(BATCH_UNITS), store.unit_bytes), dtype=np.uint8)
    store.register(data)
    store.register(out)
    put = partial(store.put, keys, data)
    writes = [_timed(store, repeats, put, ("write_ops", "bytes_written"))]
    reads = []
    for wanted in _batches(rng):
        fetch = partial(store.fetch, keys[wanted], out[: len(wanted)])
        reads.append(_timed(store, repeats, fetch, ("read_ops", "bytes_read")))
    return writes, reads


def _batches(rng: np.random.Generator) -> Iterator[np.ndarray]:
    for num_units in BATCH_UNITS:
        yield rng.permutation(POOL_UNITS)[:num_units]
        yield np.arange(num_units)


def _timed(store: Store, repeats: int, batch: Callable[[], np.ndarray], counted: tuple[str, str]) -> Sample:
    """`counted`: which fields of `StoreStats` hold the batch's operations and bytes."""
    batch()
    times, before = [], store.stats()
    for _ in range(repeats):
        begin = time.perf_counter()
        served = batch()
        times.append((time.perf_counter() - begin) * 1e6)
        if not served.all():
            lost = len(served) - int(served.sum())
            raise UserError(f"{lost} of {len(served)} units were not served; give the store more room")
    done = store.stats() - before
    ops, num_bytes = (getattr(done, name) // repeats for name in counted)
    return Sample(ops, num_bytes, statistics.median(times))
