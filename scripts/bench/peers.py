"""Other people's simulators on the same accesses, where they are installed.

libCacheSim (GPL, so only here and in a test) reads single objects from a file. KVCache.AI's
kvcache-simulator compiles its C++ when it is first used, replays chains of blocks and evicts leaves first.

    pip install libcachesim==0.3.5 kvcache-simulator==0.1.3
"""

from __future__ import annotations

import importlib
import importlib.util
import resource
import shutil
from pathlib import Path

import numpy as np

from dsatrace.kv.policies.compiled import NEVER
from dsatrace.kv.policies.stream import AccessStream

LIBCACHESIM = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "s3-fifo": "S3FIFO",
    "sieve": "Sieve",
    "arc": "ARC",
    "opt": "Belady",
}
KVCACHE = {"lru": "lru", "opt": "optimal"}
"""Its FIFO takes less than its calls differ by chance."""


def why_no_libcachesim() -> str:
    return "" if importlib.util.find_spec("libcachesim") else "not installed"


def why_no_kvcache() -> str:
    if not importlib.util.find_spec("kvcache_sim"):
        return "not installed"
    return "" if shutil.which("c++") else "no c++"


def write_flat(path: Path, ids: np.ndarray, times: np.ndarray, next_use: np.ndarray) -> None:
    """libCacheSim's oracleGeneral: time, object, size and next access of each of (N,) accesses."""
    fields = np.zeros(len(ids), np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]))
    fields["time"], fields["id"], fields["size"] = times, ids + 1, 1
    fields["next"] = np.where(next_use == NEVER, -1, next_use)
    fields.tofile(path)


def flat_miss_rate(path: Path, policy: str, capacity: int) -> float:
    """What libCacheSim makes of the file; reading it is part of its time."""
    theirs = importlib.import_module("libcachesim")
    reader = theirs.TraceReader(str(path), theirs.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(theirs, LIBCACHESIM[policy])(capacity, hashpower=18)  # the default's table is 128 MB
    return float(cache.process_trace(reader)[0])


class KvcacheSimulator:
    """The stream as kvcache-simulator holds it. Each call builds its prefix tree again, which is not counted:
    a replay is what each of some further capacities takes."""

    FURTHER = 19

    def __init__(self, stream: AccessStream, block_size: int) -> None:
        backend, trace = (importlib.import_module(f"kvcache_sim.{name}") for name in ("cpp_backend", "trace"))
        backend.ensure_cpp_simulator()
        self._run = backend.run_cpp_sweep
        num_tokens = stream.num_accesses * block_size
        self._trace = trace.TraceData(
            ids=stream.blocks.tolist(),
            tokens=[block_size] * stream.num_accesses,
            request_starts=stream.starts.tolist(),
            block_size=block_size,
            request_count=stream.num_requests,
            unique_raw_blocks=stream.num_blocks,
            total_input_tokens=num_tokens,
            average_input_tokens=num_tokens / stream.num_requests,
            parse_errors=0,
            skipped_records=0,
        )

    def one(self, policy: str, capacity: int) -> tuple[float, float]:
        """Processor seconds of a call with this capacity alone; hit rate of the last half of the requests."""
        return self._sweep(policy, [capacity])

    def several_s(self, policy: str, capacity: int) -> float:
        """Processor seconds of a call with `FURTHER` capacities beside this one."""
        return self._sweep(policy, [capacity + i for i in range(self.FURTHER + 1)])[0]

    def _sweep(self, policy: str, capacities: list[int]) -> tuple[float, float]:
        name, before = KVCACHE[policy], _children_s()
        done = self._run(
            self._trace,
            capacities=capacities,
            policies=[name],
            warmup_requests=self._trace.request_count // 2,
        )
        return _children_s() - before, float(done.results[name, capacities[0]].hitRate)


def _children_s() -> float:
    """Processor time of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
