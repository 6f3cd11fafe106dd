"""Eviction policies: block accesses per second, beside other simulators, LRU at 50 capacities, memory.

The stream is synthetic: conversations that grow by some blocks per turn, come back at random and
share system prompts. Each figure is CPU time of one core, the best of a few runs, after compilation.
Ratios are what counts: absolute times move with the machine. It does not tell which policy is best;
hit rates are printed to show what was replayed. libCacheSim gets every block as a request of its own,
and so do we beside it: hits are the same. kvcache-simulator gets whole requests, of which it counts the
last half, and evicts leaves first; its optimum may refuse a block, ours may not.

    python3 scripts/bench/policies.py               # 10 million accesses, some minutes
    python3 scripts/bench/policies.py --quick
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from machine import Rows, announce, cpu_seconds, peak_bytes
from peers import (
    KVCACHE,
    LIBCACHESIM,
    KvcacheSimulator,
    flat_miss_rate,
    why_no_kvcache,
    why_no_libcachesim,
    write_flat,
)

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stack_distance import lru_hits_at
from dsatrace.kv.policies.stream import AccessStream, release_by_concurrency

WORKLOADS = ("chat", "qa", "summary", "agent")
GIVEN: dict[str, dict[str, Any]] = {
    "wa-lru": {"admit": ["chat", "qa"]},
    "wa-prob": {"reuse": {name: (0.5, 100.0 * (index + 1)) for index, name in enumerate(WORKLOADS)}},
}
SWEEP = "lru at 50"
MEMORY_OF = ("lru", SWEEP, "arc", "opt")


def conversations(num_accesses: int, seed: int = 0) -> AccessStream:
    """Requests of some 50 blocks; seven of ten continue one of the recent conversations."""
    rng = np.random.default_rng(seed)
    num_prompts, prompt_blocks = 16, 8
    prompts = [np.arange(at * prompt_blocks, (at + 1) * prompt_blocks) for at in range(num_prompts)]
    num_blocks = num_prompts * prompt_blocks
    chains: list[np.ndarray] = []
    live: list[np.ndarray] = []
    total = 0
    while total < num_accesses:
        if live and rng.random() < 0.7:
            chain = live.pop(max(0, len(live) - 1 - int(rng.exponential(200))))
        else:
            chain = prompts[rng.integers(num_prompts)]
        grown = int(rng.geometric(1 / 12))
        chain = np.concatenate([chain, np.arange(num_blocks, num_blocks + grown)])
        num_blocks += grown
        if len(chain) < 200:
            live.append(chain)
        chains.append(chain)
        total += len(chain)
    num_requests = len(chains)
    return AccessStream(
        np.concatenate(chains),
        np.concatenate(([0], np.cumsum([len(chain) for chain in chains]))),
        np.arange(num_requests) * 0.5,
        rng.integers(0, len(WORKLOADS), num_requests),
        release_by_concurrency(num_requests, 1),
        WORKLOADS,
    )


def show_policies(stream: AccessStream, capacity: int, repeats: int) -> None:
    title = f"{stream.num_accesses:,} block accesses, capacity {capacity:,} blocks"
    table = Rows(title, f"{'policy':20}", "flat M/s", "leaf M/s", "hits", "of OPT's")
    optimum = simulate(stream, "opt", capacity).hit_rate
    for name in POLICIES:
        hit_rate, flat, leaf = rates(stream, name, capacity, repeats)
        speeds = f"{flat / 1e6:.1f}", f"{leaf / 1e6:.1f}"
        table.add(name, *speeds, f"{hit_rate:.3f}", f"{hit_rate / optimum:.2f}")


def rates(stream: AccessStream, name: str, capacity: int, repeats: int) -> tuple[float, ...]:
    """Hit rate, and accesses per second: flat and leaf-constrained."""
    params = GIVEN.get(name, {})
    hit_rate = simulate(stream, name, capacity, **params).hit_rate
    flat, leaf = (
        cpu_seconds(partial(simulate, stream, name, capacity, leaf=leaf, **params), repeats)
        for leaf in (False, True)
    )
    return hit_rate, stream.num_accesses / flat, stream.num_accesses / leaf


PEER_HEADINGS = (f"{'policy':20}", "ours M/s", "theirs M/s", "ratio", "our hits", "their hits")


def show_libcachesim(stream: AccessStream, capacity: int, repeats: int) -> None:
    """Flat policies on the same blocks, each a request of its own; the two take turns."""
    num = stream.num_accesses
    single = AccessStream(
        stream.blocks, np.arange(num + 1), np.arange(num), np.zeros(num), release_by_concurrency(num, 1)
    )
    table = Rows(f"Beside libCacheSim, {num:,} single blocks, capacity {capacity:,}", *PEER_HEADINGS)
    why = why_no_libcachesim()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blocks.oracleGeneral"
        write_flat(path, single.blocks, np.zeros(num), single.next_use(single.lengths))
        for name in LIBCACHESIM:
            ours = partial(simulate, single, name, capacity)
            theirs = partial(flat_miss_rate, path, name, capacity)
            hits = ours().hit_rate
            if why:
                _add_peer(table, name, num / cpu_seconds(ours, repeats), hits, why)
                continue
            turns = [(cpu_seconds(ours, 1), cpu_seconds(theirs, 1)) for _ in range(repeats)]
            of_ours, of_theirs = map(min, zip(*turns, strict=True))
            _add_peer(table, name, num / of_ours, hits, num / of_theirs, 1 - theirs())


def show_kvcache(stream: AccessStream, capacity: int, repeats: int) -> None:
    """Leaves first, on whole requests; hits are those of the last half of them."""
    num, half = stream.num_accesses, stream.num_requests // 2
    table = Rows(f"Beside kvcache-simulator, {num:,} accesses, capacity {capacity:,}", *PEER_HEADINGS)
    why = why_no_kvcache()
    peer = None if why else KvcacheSimulator(stream, block_size=16)
    for name in KVCACHE:
        ours = partial(simulate, stream, name, capacity, leaf=True)
        found = ours()
        hits = float(found.hits[half:].sum() / found.accesses[half:].sum())
        if peer is None:
            _add_peer(table, name, num / cpu_seconds(ours, repeats), hits, why)
            continue
        turns = [
            (cpu_seconds(ours, 1), *peer.one(name, capacity), peer.several_s(name, capacity))
            for _ in range(repeats)
        ]
        of_ours, one_s, their_hits, several_s = map(min, zip(*turns, strict=True))
        theirs_s = (several_s - one_s) / peer.FURTHER
        theirs = num / theirs_s if theirs_s > 0 else "too fast"  # less than what the calls differ by chance
        _add_peer(table, name, num / of_ours, hits, theirs, their_hits)


def _add_peer(
    table: Rows, name: str, ours: float, our_hits: float, theirs: float | str, their_hits: float = 0.0
) -> None:
    """`theirs` is a rate, or why there is none."""
    if isinstance(theirs, str):
        rate, ratio = theirs, ""
    else:
        rate, ratio = f"{theirs / 1e6:.1f}", f"{ours / theirs:.1f}x"
    hits = f"{our_hits:.4f}", f"{their_hits:.4f}" if their_hits else ""
    table.add(name, f"{ours / 1e6:.1f}", rate, ratio, *hits)


def show_capacities(stream: AccessStream, largest: int, repeats: int) -> None:
    """LRU at 50 capacities; raises `RuntimeError` if the two ways disagree."""
    capacities = np.unique(np.geomspace(largest / 100, largest, 50).astype(int)).tolist()
    title = f"LRU at {len(capacities)} capacities, {capacities[0]:,} to {capacities[-1]:,} blocks"
    table = Rows(title, f"{'way':32}", "CPU s", "M accesses/s", "ratio")
    swept = lru_hits_at(stream, capacities)
    one_pass = cpu_seconds(lambda: lru_hits_at(stream, capacities), repeats)
    table.add("one pass", f"{one_pass:.2f}", f"{stream.num_accesses / one_pass / 1e6:.1f}", "1.0")
    begin_s = time.process_time()
    simulated = [int(simulate(stream, "lru", capacity).hits.sum()) for capacity in capacities]
    seconds = time.process_time() - begin_s
    if swept.hits.sum(axis=1).tolist() != simulated:
        raise RuntimeError("the one pass and the simulations disagree")
    rate = stream.num_accesses * len(capacities) / seconds / 1e6
    way = f"{len(capacities)} simulations, the same hits"
    table.add(way, f"{seconds:.2f}", f"{rate:.1f}", f"{seconds / one_pass:.1f}")


def _measure(path: str, name: str, capacity: int, sender: Connection) -> None:
    """Sends peak memory before and after, in bytes; runs in a separate process."""
    arrays = np.load(path)
    stream = AccessStream(**{key: arrays[key] for key in arrays.files}, workload_names=WORKLOADS)
    simulate(stream.head(0.001), "lru" if name == SWEEP else name, 10)  # numba itself is not counted
    before = peak_bytes()
    if name == SWEEP:
        lru_hits_at(stream, np.geomspace(capacity / 100, capacity, 50).astype(int).tolist())
    else:
        simulate(stream, name, capacity, leaf=True)
    sender.send((before, peak_bytes()))


def show_memory(stream: AccessStream, capacity: int, repeats: int) -> None:
    """Each policy once, in a process of its own."""
    title = f"Memory, {stream.num_accesses:,} accesses to {stream.num_blocks:,} blocks"
    headings = ("process before, MiB", "added, MiB", "bytes per access")
    table = Rows(title, "policy, leaf-constrained ", *headings)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "stream.npz")
        fields = ("blocks", "starts", "times", "workloads", "release")
        np.savez(path, **{field: getattr(stream, field) for field in fields})
        for name in MEMORY_OF:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(path, name, capacity, sender))
            process.start()
            sender.close()
            before, after = receiver.recv()
            process.join()
            added = after - before
            sizes = f"{before / 2**20:.0f}", f"{added / 2**20:.0f}"
            table.add(name, *sizes, f"{added / stream.num_accesses:.1f}")


SECTIONS: dict[str, Callable[[AccessStream, int, int], None]] = {
    "policies": show_policies,
    "libcachesim": show_libcachesim,
    "kvcache": show_kvcache,
    "capacities": show_capacities,
    "memory": show_memory,
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--accesses", type=int, default=10_000_000, help="block accesses of the stream")
    parser.add_argument("--capacity", type=int, default=10_000, help="blocks of the cache")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these tables")
    parser.add_argument("--quick", action="store_true", help="a tenth of the accesses, one run each")
    args = parser.parse_args(argv)
    if min(args.accesses, args.capacity, args.repeats) < 1:
        raise UserError("--accesses, --capacity and --repeats must be at least 1")
    num_accesses, repeats = (args.accesses // 10 or 1, 1) if args.quick else (args.accesses, args.repeats)
    announce("numpy", "numba", threads=1)
    stream = conversations(num_accesses)
    for name in args.only:
        SECTIONS[name](stream, args.capacity, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
