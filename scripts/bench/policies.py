"""Eviction policies: block accesses per second, LRU at 50 capacities in one pass, memory.

The stream is synthetic: conversations that grow by some blocks per turn, come back at random and
share system prompts. Each figure is CPU time of one core, the best of a few runs, after compilation.
Ratios are what counts: absolute times move with the machine. It does not tell which policy is best;
hit rates are printed to show what was replayed.

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
from machine import peak_bytes
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stack_distance import lru_hits_at
from dsatrace.kv.policies.stream import AccessStream, release_by_concurrency

GOAL = 4e6  # accesses per second; a C++ simulator reaches 4.3e6 on one core
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


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU time of the fastest run."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def empty_table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def policies_table(stream: AccessStream, capacity: int, repeats: int) -> Table:
    title = f"{stream.num_accesses:,} block accesses, capacity {capacity:,} blocks"
    table = empty_table(title, "policy", "flat M/s", "leaf M/s", "x goal", "hits", "of OPT's")
    optimum = simulate(stream, "opt", capacity).hit_rate
    for name in POLICIES:
        hit_rate, flat, leaf = rates(stream, name, capacity, repeats)
        table.add_row(
            name,
            f"{flat / 1e6:.1f}",
            f"{leaf / 1e6:.1f}",
            f"{min(flat, leaf) / GOAL:.1f}",
            f"{hit_rate:.3f}",
            f"{hit_rate / optimum:.2f}",
        )
    return table


def rates(stream: AccessStream, name: str, capacity: int, repeats: int) -> tuple[float, ...]:
    """Hit rate, and accesses per second: flat and leaf-constrained."""
    params = GIVEN.get(name, {})
    hit_rate = simulate(stream, name, capacity, **params).hit_rate
    flat, leaf = (
        cpu_seconds(partial(simulate, stream, name, capacity, leaf=leaf, **params), repeats)
        for leaf in (False, True)
    )
    return hit_rate, stream.num_accesses / flat, stream.num_accesses / leaf


def capacities_table(stream: AccessStream, largest: int, repeats: int) -> Table:
    """LRU at 50 capacities; raises `RuntimeError` if the two ways disagree."""
    capacities = np.unique(np.geomspace(largest / 100, largest, 50).astype(int)).tolist()
    swept = lru_hits_at(stream, capacities)
    one_pass = cpu_seconds(lambda: lru_hits_at(stream, capacities), repeats)
    begin = time.process_time()
    simulated = [int(simulate(stream, "lru", capacity).hits.sum()) for capacity in capacities]
    all_runs = time.process_time() - begin
    if swept.hits.sum(axis=1).tolist() != simulated:
        raise RuntimeError("the one pass and the simulations disagree")
    title = f"LRU at {len(capacities)} capacities, {capacities[0]:,} to {capacities[-1]:,} blocks"
    table = empty_table(title, "way", "CPU s", "M accesses/s", "ratio")
    for way, seconds, runs in (
        ("one pass", one_pass, 1),
        (f"{len(capacities)} simulations, the same hits", all_runs, len(capacities)),
    ):
        rate = stream.num_accesses * runs / seconds / 1e6
        table.add_row(way, f"{seconds:.2f}", f"{rate:.1f}", f"{seconds / one_pass:.1f}")
    return table


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


def memory_table(stream: AccessStream, capacity: int) -> Table:
    title = f"Memory, {stream.num_accesses:,} accesses to {stream.num_blocks:,} blocks"
    headings = ("process before, MiB", "added, MiB", "bytes per access")
    table = empty_table(title, "policy, leaf-constrained", *headings)
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
            table.add_row(
                name, f"{before / 2**20:.0f}", f"{added / 2**20:.0f}", f"{added / stream.num_accesses:.1f}"
            )
    return table


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--accesses", type=int, default=10_000_000, help="block accesses of the stream")
    parser.add_argument("--capacity", type=int, default=10_000, help="blocks of the cache")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--quick", action="store_true", help="a tenth of the accesses, one run each")
    args = parser.parse_args(argv)
    if min(args.accesses, args.capacity, args.repeats) < 1:
        raise UserError("--accesses, --capacity and --repeats must be at least 1")
    num_accesses, repeats = (args.accesses // 10 or 1, 1) if args.quick else (args.accesses, args.repeats)
    console = Console()
    stream = conversations(num_accesses)
    console.print(policies_table(stream, args.capacity, repeats))
    console.print(capacities_table(stream, args.capacity, repeats))
    console.print(memory_table(stream, args.capacity))
    return 0


if __name__ == "__main__":
    sys.exit(main())
