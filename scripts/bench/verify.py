"""How fast `dsatrace verify` is: records a second, beside its own plain implementation, in one run.

Writes a run of full records (2,048 positions each, 32K context, evenly spread, made up), then lets
each way verify it in a process of its own, one after the other, several rounds; prints the
fastest round of each, the ratio, and the peak memory of all its processes; then the same of a run
whose latents lie in two tiers. A run four times as long shows whether memory stays flat. On a
machine with other work, processor time tells more than the clock. Says nothing about any model.

    python3 scripts/bench/verify.py
    python3 scripts/bench/verify.py --records 60000 --rounds 1
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from growth import OFFLOADED, Shape, in_own_process, write_run
from machine import announce

from dsatrace.errors import exits_cleanly
from dsatrace.schema import STEPS_FILE
from dsatrace.trace.manifest import TierSettings
from dsatrace.verify.run import verify

WAYS: dict[str, Any] = {
    "plain, 1 process": {"plain": True, "jobs": 1},
    "fast, 1 process": {"plain": False, "jobs": 1},
    "fast, 2 processes": {"plain": False, "jobs": 2},
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=15_000, help="at least so many (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (%(default)s)")
    args = parser.parse_args(argv)
    announce("numpy", "numba", "orjson", threads="1 of each process")
    with tempfile.TemporaryDirectory(prefix="dsatrace-verify-") as temporary:
        compare(Path(temporary) / "short", args.records, args.rounds, None)
        compare(Path(temporary) / "offloaded", args.records, args.rounds, OFFLOADED)
        long = Path(temporary) / "long"
        num_long = write_run(long, 4 * args.records, "full", Shape())
        measured("four times as long", long, num_long, **WAYS["fast, 2 processes"])
    return 0


def compare(folder: Path, num_records: int, rounds: int, tiers: TierSettings | None) -> None:
    """Writes a run and prints what each way takes of it."""
    written = write_run(folder, num_records, "full", Shape(), tiers=tiers)
    size = (folder / STEPS_FILE).stat().st_size
    print(f"{folder.name}: {written} full records, {size / written:.0f} bytes each")
    best: dict[str, Spent] = {}
    for _ in range(rounds):
        for name, how in WAYS.items():
            spent = measured(name, folder, written, **how)
            best[name] = Spent(*map(min, zip(best.get(name, spent), spent, strict=True)))
    plain = best["plain, 1 process"]
    print()
    for name, spent in best.items():
        per_record, in_cpu = spent.seconds / written * 1e3, spent.cpu_s / written * 1e3
        print(
            f"{name:18} {per_record:6.3f} ms a record {plain.seconds / spent.seconds:5.1f}x   "
            f"processors {in_cpu:6.3f} ms {plain.cpu_s / spent.cpu_s:5.1f}x"
        )
    print()


class Spent(NamedTuple):
    seconds: float
    cpu_s: float  # of all processes


def measured(name: str, folder: Path, num_records: int, plain: bool, jobs: int) -> Spent:
    """Without the start of the process that verifies; prints it, and its memory."""
    said, *_, own_mib = in_own_process(verify_stage, folder, plain, jobs)
    seconds, cpu_s, of_workers_mib = map(float, said.split())
    memory = f"{own_mib:.0f} MiB"
    if of_workers_mib:
        memory += f", and {of_workers_mib:.0f} MiB in a worker"
    print(
        f"{name:18} {seconds:6.1f} s {cpu_s:6.1f} s of processors {num_records / seconds:8.0f} records/s   "
        f"peak {memory}"
    )
    return Spent(seconds, cpu_s)


def verify_stage(folder: Path, plain: bool, jobs: int) -> str:
    started, before = time.perf_counter(), used_s()
    verify(folder, plain=plain, jobs=jobs)
    seconds, cpu_s = time.perf_counter() - started, used_s() - before
    return f"{seconds} {cpu_s} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}"


def used_s() -> float:
    """Processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main())
