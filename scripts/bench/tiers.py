"""What a fetch costs, store by store: ours, the client it is built on, and a copy in memory.

Batches are 1, 8, 64 and 128 blocks and 2048 rows, picked anew each time from a larger pool. The three
take turns on the same picks, so that other load on the machine affects all of them; overhead is the
median of the turns' ratios. A block is 64 tokens of one layer in the fp8 layout, 656 bytes per token
(`--bytes-per-token 1152` for bf16). Raw clients: numpy's `take` (memory, mapped file), `preadv` by
eight threads (O_DIRECT), redis-py with hiredis (`MGET`), Mooncake's `batch_get_into`, NIXL's own
transfer of a descriptor list (page cache warm). They deliver bytes unchecked; ours compares checksums.
MemCache is not measured: it needs an Ascend driver. Servers run on loopback: the figures show what
software costs, not what a network does.

    python3 scripts/bench/tiers.py                       # a minute
    python3 scripts/bench/tiers.py --only ram valkey-unix --turns 50
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import Rows, announce
from servers import Missing, MooncakeMaster, ValkeyServer

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.stores.interface import unit_keys
from dsatrace.kv.stores.opening import open_store

BLOCK_TOKENS = 64
POOL_BLOCKS, POOL_ROWS = 512, 8192
SEGMENT_MIB = 256
RawFetch = Callable[[np.ndarray, np.ndarray], object]
"""`raw(picks, out)` reads the units `picks` by the client's own calls, into `out` where it can."""


@dataclasses.dataclass(frozen=True)
class Batch:
    name: str
    num_units: int
    pool_units: int
    unit_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over the turns."""

    store: str
    batch: str
    memcpy_us: float
    raw_us: float
    ours_us: float
    put_us: float
    overhead: float  # ours over raw, less 1
    gb_per_s: float  # ours


@dataclasses.dataclass(frozen=True)
class Side:
    """One store: its spec, and its raw client on a pool of units."""

    spec: str
    raw: Callable[[np.ndarray], contextlib.AbstractContextManager[RawFetch]]
    is_local: bool = False  # needs to know how many units it may hold


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.turns < 1 or args.bytes_per_token < 1:
        raise UserError("--turns and --bytes-per-token: use at least 1")
    block = BLOCK_TOKENS * args.bytes_per_token
    batches = [Batch(f"{n} blocks", n, POOL_BLOCKS, block) for n in (1, 8, 64, 128)]
    batches.append(Batch("2048 rows", 2048, POOL_ROWS, args.bytes_per_token))
    about = announce("numpy", "numba", threads="1, 8 of a store that reads files")
    results: list[Result] = []
    absent: dict[str, str] = {}
    title = f"A fetch, us (median of {args.turns}); block {block:,} B, row {args.bytes_per_token:,} B"
    headings = ("memcpy", "raw client", "ours", "ours over raw", "ours GB/s", "our put")
    table = Rows(title, "store       ", "batch      ", *headings)
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=args.folder) as name:
        for side_name, make in SIDES.items():
            if args.only and side_name not in args.only:
                continue
            try:
                with make(Path(name)) as side:
                    for batch in batches:
                        r = measure(side_name, side, batch, args.turns)
                        results.append(r)
                        times = (f"{us:,.0f}" for us in (r.memcpy_us, r.raw_us, r.ours_us))
                        over = f"{r.overhead:+.0%}", f"{r.gb_per_s:.2f}"
                        table.add(r.store, r.batch, *times, *over, f"{r.put_us:,.0f}")
            except Missing as missing:
                absent[side_name] = str(missing)
                print(f"{side_name}: left out, {missing}")
    settings = {"bytes_per_token": args.bytes_per_token, "turns": args.turns}
    measured = [*map(dataclasses.asdict, results)]
    print(json.dumps({"machine": about, **settings, "absent": absent, "results": measured}))
    return 0


def measure(name: str, side: Side, batch: Batch, turns: int) -> Result:
    """Alternating turns of memcpy, raw and ours on the same picks."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (batch.pool_units, batch.unit_bytes), dtype=np.uint8)
    out = np.zeros((batch.num_units, batch.unit_bytes), dtype=np.uint8)
    keys = unit_keys(0, np.arange(batch.pool_units))
    room = batch.pool_units if side.is_local else None
    with side.raw(pool) as raw, contextlib.closing(open_store(side.spec, batch.unit_bytes, room)) as store:
        store.register(out)
        if not all(store.put(part, rows).all() for part, rows in _quarters(keys, pool)):
            raise UserError(f"{name}: the store has no room for {pool.nbytes >> 20} MiB; give it more")
        times: list[tuple[float, ...]] = []
        for turn in range(turns + 1):
            picks = rng.permutation(batch.pool_units)[: batch.num_units]
            chosen = keys[picks]
            steps = [
                partial(np.take, pool, picks, axis=0, out=out, mode="clip"),
                partial(raw, picks, out),
                partial(store.fetch, chosen, out),
            ]
            took = [0.0] * len(steps)
            for which in (0, 1, 2) if turn % 2 else (2, 1, 0):  # what comes first finds colder caches
                took[which] = _microseconds(steps[which])
            times.append((*took, _microseconds(partial(store.put, chosen, out))))
            if turn == 0 and not (store.fetch(chosen, out).all() and (out == pool[picks]).all()):
                raise RuntimeError(f"{name}: what was fetched is not what was put")
    copied, read, ours, put = (statistics.median(column) for column in zip(*times[1:], strict=True))
    overhead = statistics.median(turn[2] / turn[1] for turn in times[1:]) - 1
    bandwidth = out.nbytes / ours / 1e3
    return Result(name, batch.name, copied, read, ours, put, overhead, bandwidth)


def _quarters(keys: np.ndarray, pool: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(np.array_split(keys, 4), np.array_split(pool, 4), strict=True)


def _microseconds(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e6


@contextlib.contextmanager
def _local(spec: str, raw: Callable[[Path, np.ndarray], Any], folder: Path) -> Iterator[Side]:
    yield Side(spec.format(folder=folder), partial(raw, folder), is_local=True)


@contextlib.contextmanager
def _ram(folder: Path, pool: np.ndarray) -> Iterator[RawFetch]:
    copy = pool.copy()
    yield lambda picks, out: np.take(copy, picks, axis=0, out=out, mode="clip")


@contextlib.contextmanager
def _mmap(folder: Path, pool: np.ndarray) -> Iterator[RawFetch]:
    mapped = np.memmap(folder / "raw", dtype=np.uint8, mode="w+", shape=pool.shape)
    mapped[:] = pool
    yield lambda picks, out: np.take(mapped, picks, axis=0, out=out, mode="clip")


@contextlib.contextmanager
def _file(folder: Path, pool: np.ndarray) -> Iterator[RawFetch]:
    slot = -(-pool.shape[1] // 512) * 512
    padded = np.zeros((len(pool), slot), dtype=np.uint8)
    padded[:, : pool.shape[1]] = pool
    path = folder / "raw-file"
    path.write_bytes(padded.tobytes())
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, padded.nbytes)
    views = [memoryview(memory)[i * slot : (i + 1) * slot] for i in range(len(pool))]

    def share(picks: list[int]) -> None:
        for pick in picks:
            os.preadv(descriptor, [views[pick]], pick * slot)

    with ThreadPoolExecutor(8) as threads:
        yield lambda picks, out: list(threads.map(share, [picks[i::8].tolist() for i in range(8)]))
    os.close(descriptor)


@contextlib.contextmanager
def _nixl(folder: Path, pool: np.ndarray) -> Iterator[RawFetch]:
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if importlib.util.find_spec("nixl_cu12") is None:
        raise Missing("no nixl; pip install nixl-cu12")
    import nixl_cu12 as nixl

    agent = nixl.nixl_agent("raw", nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("POSIX")
    path, room = folder / "raw-nixl", np.zeros_like(pool)
    path.write_bytes(pool.tobytes())
    size, file = pool.shape[1], os.open(path, os.O_RDONLY)
    kept = [
        agent.register_memory([(begin, pool.nbytes, device, "")], kind)
        for begin, device, kind in ((room.ctypes.data, 0, "DRAM"), (0, file, "FILE"))
    ]

    def descriptors(begins: np.ndarray, device: int, kind: str) -> object:
        columns = np.broadcast_arrays(begins, size, device)
        return agent.get_xfer_descs(np.stack(columns, axis=1).astype(np.uint64), kind)

    def fetch(picks: np.ndarray, out: np.ndarray) -> None:
        memory = descriptors(room.ctypes.data + np.arange(len(picks)) * size, 0, "DRAM")
        transfer = agent.initialize_xfer("READ", memory, descriptors(picks * size, file, "FILE"), "raw")
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        transfer.release()

    yield fetch
    for registered in kept:
        agent.deregister_memory(registered)
    os.close(file)


@contextlib.contextmanager
def _valkey(folder: Path, unix: bool) -> Iterator[Side]:
    if importlib.util.find_spec("redis") is None:
        raise Missing("no client to compare with; pip install redis[hiredis]")
    import redis

    with tempfile.TemporaryDirectory(prefix="v-") as short, ValkeyServer(Path(short)) as server:
        spec = server.unix if unix else server.tcp
        where = {"unix_socket_path": spec.removeprefix("unix://")} if unix else {"port": server.port}

        @contextlib.contextmanager
        def raw(pool: np.ndarray) -> Iterator[RawFetch]:
            client = redis.Redis(**where)
            names = [b"raw%d" % i for i in range(len(pool))]
            for begin in range(0, len(pool), 64):
                part = slice(begin, begin + 64)
                client.mset(
                    {name: unit.tobytes() for name, unit in zip(names[part], pool[part], strict=True)}
                )
            yield lambda picks, out: client.mget([names[pick] for pick in picks.tolist()])
            client.flushall()
            client.close()

        yield Side(spec, raw)


@contextlib.contextmanager
def _mooncake(folder: Path) -> Iterator[Side]:
    """Units lie in another process's memory: within one process, Mooncake only copies."""
    with MooncakeMaster(folder, segment_mib=0, lease_ms=10_000) as master:
        address = f"127.0.0.1:{master.port}"
        with _lent_segment(address):
            yield Side(master.spec, partial(_mooncake_raw, address))


@contextlib.contextmanager
def _mooncake_raw(address: str, pool: np.ndarray) -> Iterator[RawFetch]:
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    if client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", address):
        raise RuntimeError("Mooncake's own client does not start")
    num_units, size = pool.shape
    room = np.zeros_like(pool)
    for memory in (pool, room):
        client.register_buffer(memory.ctypes.data, memory.nbytes)
    names = [f"raw{i}" for i in range(num_units)]
    sources, places = ([memory.ctypes.data + i * size for i in range(num_units)] for memory in (pool, room))
    for begin in range(0, num_units, 64):  # more at a time, and its connections run out
        part = slice(begin, begin + 64)
        if any(client.batch_upsert_from(names[part], sources[part], [size] * len(names[part]))):
            raise RuntimeError("Mooncake's own client cannot store its units")

    def fetch(picks: np.ndarray, out: np.ndarray) -> None:
        chosen = picks.tolist()
        read = client.batch_get_into([names[i] for i in chosen], places[: len(chosen)], [size] * len(chosen))
        if set(read) != {size}:
            raise RuntimeError(f"Mooncake's own client reads {sorted(set(read))[0]} of {size} bytes")

    yield fetch
    client.batch_remove(names, True)
    client.close()


@contextlib.contextmanager
def _lent_segment(address: str) -> Iterator[None]:
    """Another process that lends the pool its memory, so that bytes go over TCP."""
    arguments = f"'127.0.0.1', 'P2PHANDSHAKE', {2 * SEGMENT_MIB << 20}, 16 << 20, 'tcp', '', '{address}'"
    program = (
        "import sys; from mooncake.store import MooncakeDistributedStore as Client; client = Client();"
        f"print(client.setup({arguments}), flush=True); sys.stdin.read()"
    )
    lender = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert lender.stdout is not None
        if lender.stdout.readline().strip() != b"0":
            raise RuntimeError("no process could lend Mooncake a segment")
        yield
    finally:
        lender.kill()
        lender.wait()


SIDES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Side]]] = {
    "ram": partial(_local, "ram", _ram),
    "mmap": partial(_local, "mmap:{folder}/m", _mmap),
    "file": partial(_local, "file:{folder}/f", _file),
    "nixl": partial(_local, "nixl:{folder}/n", _nixl),
    "valkey-unix": partial(_valkey, unix=True),
    "valkey-tcp": partial(_valkey, unix=False),
    "mooncake": _mooncake,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SIDES, help="these stores (default: all)")
    parser.add_argument("--turns", type=int, default=30, help="of each batch (default: %(default)s)")
    parser.add_argument("--bytes-per-token", type=int, default=656, help="per layer (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
