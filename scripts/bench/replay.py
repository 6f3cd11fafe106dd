"""The replay of selections: microseconds per record, memory, and growth.

A record is one step of 2,048 ids out of 131,072. The steps are synthetic: a share of each is kept from
the step before, the rest are popular ids and some at random. Figures are CPU time of one core, the best
of a few runs, after compilation. Ratios are what counts: absolute times move with the machine. It does
not tell which policy is best; miss rates are printed to show what was replayed.

Beside ours: libCacheSim, which is fed the same ids one by one, as an ordinary simulator is. It does not
know that the ids of a step must lie in the buffer together.

    python3 scripts/bench/replay.py                   # a minute
    python3 scripts/bench/replay.py --long            # growth up to 1 million records
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from growth import in_own_process
from machine import Rows, announce, cpu_seconds, peak_bytes
from peers import flat_miss_rate, why_no_libcachesim, write_flat

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.kv.policies.compiled import NEVER
from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.policies import POLICIES, misses
from dsatrace.selection_replay.steps import NO_ID, Steps

TOP_K, NUM_IDS = 2048, 131072
KEPT = (0.5, 0.7, 0.9)
SIZES = (2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768)
FED = ("lru", "fifo", "lfu", "s3-fifo", "opt")  # to libCacheSim


def records(num_steps: int, kept: float) -> Steps:
    """One request's steps at one layer; ids ascending, as a selection's positions are recorded."""
    rng = np.random.default_rng(0)
    popular = rng.permutation(NUM_IDS)
    current = rng.choice(NUM_IDS, TOP_K, replace=False)
    ids = np.empty((num_steps, TOP_K), np.int32)
    for step in range(num_steps):
        chosen = np.zeros(NUM_IDS, bool)
        chosen[rng.choice(current, round(kept * TOP_K), replace=False)] = True
        while (num_missing := TOP_K - int(chosen.sum())) > 0:
            ranks = (NUM_IDS * rng.random(num_missing) ** 3).astype(np.int64)
            chosen[popular[ranks]] = True
        current = np.flatnonzero(chosen)
        ids[step] = current
    ptr = np.arange(num_steps + 1, dtype=np.int64) * TOP_K
    newest, visible = np.full(num_steps, NO_ID, np.int32), np.full(num_steps, NUM_IDS, np.int64)
    return Steps(ids.ravel(), ptr, newest, visible, NUM_IDS)


def per_record_us(steps: Steps, work: Callable[[], object], repeats: int) -> float:
    work()  # compiles
    seconds: float = cpu_seconds(work, repeats)
    return seconds / steps.num_steps * 1e6


def miss_rate(steps: Steps, per_step: np.ndarray) -> float:
    return float(per_step.sum() / len(steps.ids))


def show_policies(num_steps: int, size: int, repeats: int) -> None:
    headings = [f"{heading} at {kept}" for kept in KEPT for heading in ("us", "misses")]
    title = f"One record of {TOP_K:,} ids, B = {size:,}, {num_steps} steps, by the share kept of a step"
    table = Rows(title, f"{'policy':26}", *headings)
    traces = [records(num_steps, kept) for kept in KEPT]
    for label, sizes in (("lru, all sizes", ()), (f"lru, and {len(SIZES)} sizes by step", SIZES)):
        cells = [f"{per_record_us(steps, partial(lru, steps, sizes), repeats):.1f}" for steps in traces]
        table.add(label, *(cell for us in cells for cell in (us, "")))
    for name in POLICIES:
        row = []
        for steps in traces:
            us = per_record_us(steps, partial(misses, steps, name, size), repeats)
            row += [f"{us:.1f}", f"{miss_rate(steps, misses(steps, name, size).misses):.3f}"]
        table.add(name, *row)


def show_flat(num_steps: int, repeats: int) -> None:
    """libCacheSim on the same ids, one by one."""
    title = "Fed one by one to libCacheSim: its speed, and its miss rate beside the true one"
    headings = ("us per record, theirs", "ours", "misses, theirs", "true")
    table, why = Rows(title, f"{'policy, B, kept':20}", *headings), why_no_libcachesim()
    with tempfile.TemporaryDirectory() as folder:
        for kept in KEPT:
            steps = records(num_steps, kept)
            path = Path(folder) / f"{kept}.oracleGeneral"
            write_flat(path, steps.ids, np.repeat(np.arange(num_steps), steps.sizes), next_use(steps.ids))
            for size, name in itertools.product((TOP_K, 2 * TOP_K), FED):
                theirs, ours = partial(flat_miss_rate, path, name, size), partial(misses, steps, name, size)
                table.add(
                    f"{name}, {size:,}, {kept}",
                    why or f"{per_record_us(steps, theirs, repeats):.0f}",
                    f"{per_record_us(steps, ours, repeats):.1f}",
                    why or f"{theirs():.3f}",
                    f"{miss_rate(steps, ours().misses):.3f}",
                )


def next_use(ids: np.ndarray) -> np.ndarray:
    """(N,) where each id is accessed next, or `NEVER`."""
    order = np.argsort(ids, kind="stable")
    following = np.full(len(ids), NEVER)
    same = ids[order[1:]] == ids[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def grow(num_records: int, num_steps: int, one_stream: bool) -> str:
    """Replays so many records, as streams of `num_steps` or as one; the time and memory of its process."""
    steps = records(num_steps, 0.7)
    if one_stream:
        times = -(-num_records // num_steps)
        ptr = np.arange(times * num_steps + 1, dtype=np.int64) * TOP_K
        newest, visible = np.tile(steps.newest, times), np.tile(steps.visible, times)
        steps = Steps(np.tile(steps.ids, times), ptr, newest, visible, NUM_IDS)
    lru(records(2, 0.7), SIZES)
    misses(records(2, 0.7), "opt", 4096)
    before, started = peak_bytes(), time.process_time()
    for _ in range(-(-num_records // steps.num_steps)):
        lru(steps, SIZES)
        misses(steps, "opt", 4096)
    seconds = time.process_time() - started
    return f"{seconds / num_records * 1e6:.1f} {(peak_bytes() - before) / 2**20:.0f}"


def show_growth(counts: Sequence[int], longest: int) -> None:
    title = f"Growth: LRU at all sizes, {len(SIZES)} by step, and OPT at one; memory beside the records"
    table = Rows(title, f"{'records':32}", "us per record", "memory, MiB")
    rows = [(count, 512, False) for count in counts] + [(longest, 512, True)]
    for num_records, num_steps, one_stream in rows:
        said, *_ = in_own_process(grow, num_records, num_steps, one_stream)
        label = f"{num_records:,} in {'one stream' if one_stream else f'streams of {num_steps}'}"
        table.add(label, *said.split())


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=512, help="steps of a stream (default: 512)")
    parser.add_argument("--size", type=int, default=4096, help="ids in the buffer (default: 4096)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="the fastest of so many runs counts (default: 3)"
    )
    parser.add_argument("--long", action="store_true", help="grow to 1 million records (default: 100,000)")
    args = parser.parse_args(argv)
    if min(args.steps, args.repeats) < 1 or args.size < TOP_K:
        raise UserError(f"--steps and --repeats must be at least 1, and --size at least {TOP_K}")
    announce("numpy", "numba", threads=1)
    show_policies(args.steps, args.size, args.repeats)
    show_flat(min(args.steps, 128), 1)
    counts = (10_000, 100_000, 1_000_000) if args.long else (10_000, 100_000)
    show_growth(counts, 100_000 if args.long else 10_000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
