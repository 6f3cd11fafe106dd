"""How fast `dsatrace verify` is: records a second, beside its own plain implementation, in one run.

Writes a run of full records (2,048 positions each, 32K context, evenly spread, made up), then lets
each way verify it in a process of its own, one after the other, several rounds; prints the
fastest round of each, the ratio, and the peak memory of all its processes. A run four times as
long shows whether memory stays flat. Says nothing about any model.

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

from long_run import Shape, in_own_process, write_run

from dsatrace.errors import exits_cleanly
from dsatrace.schema import STEPS_FILE
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
    with tempfile.TemporaryDirectory(prefix="dsatrace-verify-") as temporary:
        short, long = Path(temporary) / "short", Path(temporary) / "long"
        num_records = write_run(short, args.records, "full", Shape())
        size = (short / STEPS_FILE).stat().st_size
        print(f"{num_records} full records, {size / num_records:.0f} bytes each", flush=True)
        best: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, how in WAYS.items():
                best[name] = min(best.get(name, float("inf")), measured(name, short, num_records, **how))
        plain = best["plain, 1 process"]
        print()
        for name, seconds in best.items():
            per_record, ratio = seconds / num_records, plain / seconds
            print(
                f"{name:18} {per_record * 1e3:6.3f} ms a record {1 / per_record:8.0f} records/s {ratio:5.1f}x"
            )
        print()
        num_long = write_run(long, 4 * num_records, "full", Shape())
        measured(f"{num_long // num_records} times as long", long, num_long, **WAYS["fast, 2 processes"])
    return 0


def measured(name: str, folder: Path, num_records: int, plain: bool, jobs: int) -> float:
    """Seconds, without the start of the process that verifies; prints them, and its memory."""
    said, _, own_mb = in_own_process(verify_stage, folder, plain, jobs)
    seconds, of_workers_mb = map(float, said.split())
    memory = (
        f"{own_mb:.0f} MB, and {of_workers_mb:.0f} MB in a worker" if of_workers_mb else f"{own_mb:.0f} MB"
    )
    print(f"{name:18} {seconds:6.1f} s {num_records / seconds:8.0f} records/s   peak {memory}", flush=True)
    return seconds


def verify_stage(folder: Path, plain: bool, jobs: int) -> str:
    started = time.perf_counter()
    verify(folder, plain=plain, jobs=jobs)
    seconds = time.perf_counter() - started
    return f"{seconds} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}"


if __name__ == "__main__":
    sys.exit(main())
