"""What it takes to choose a step's victims in HBM, policy by policy: compiled, beside plain Python.

A layer selects 2,048 of 16,384 rows, 500 of them other than in the step before, and HBM holds 4,096. Both
take turns on the same steps; times are medians, of this thread's processor time.

    python3 scripts/bench/tier_policies.py
    python3 scripts/bench/tier_policies.py --rows 131072 --slots 8192
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np
from machine import Rows, announce

from dsatrace.kv.tiers.residency import TIER_POLICIES, Residency
from helpers.plain_order import PlainOrder


def main() -> int:
    """Measures, prints a line per policy and one of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_384, help="of the context")
    parser.add_argument("--slots", type=int, default=4096, help="rows that HBM holds")
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--new", type=int, default=500, help="rows that the step before did not select")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    steps = selections(args.rows, args.top_k, args.new, args.steps)
    record = {"machine": announce("numpy", "numba", threads=1), **vars(args), "ms": {}}
    title = f"{args.top_k:,} of {args.rows:,} rows selected, {args.new} of them new, {args.slots:,} in HBM"
    table = Rows(title, "policy    ", "compiled ms", "plain ms", "ratio", "victims per step")
    for policy in TIER_POLICIES:
        ours, plain = (Residency(args.rows, args.slots, policy) for _ in range(2))
        plain._order = PlainOrder(policy, args.slots, plain.slot_of)
        times: tuple[list[float], list[float]] = ([], [])
        num_victims = []
        for step in steps:
            found = []
            for residency, of in zip((ours, plain), times, strict=True):
                started = time.thread_time_ns()
                found.append(residency.admit(step))
                of.append((time.thread_time_ns() - started) / 1e6)
            assert found[0].victims.tolist() == found[1].victims.tolist(), policy
            num_victims.append(len(found[0].victims))
        kept = [statistics.median(of[len(steps) // 4 :]) for of in times]  # before that, HBM fills
        mean = statistics.mean(num_victims[len(steps) // 4 :])
        table.add(policy, f"{kept[0]:.3f}", f"{kept[1]:.2f}", f"{kept[1] / kept[0]:.0f}x", f"{mean:.0f}")
        record["ms"][policy] = {"compiled": kept[0], "plain": kept[1]}
    print(json.dumps(record))
    return 0


def selections(num_rows: int, top_k: int, num_new: int, num_steps: int) -> list[np.ndarray]:
    """(top_k,) rows per step, of which `num_new` were not in the step before."""
    rng = np.random.default_rng(0)
    last = rng.choice(num_rows, top_k, replace=False)
    steps = []
    for _ in range(num_steps):
        kept = rng.choice(last, top_k - num_new, replace=False)
        others = np.setdiff1d(np.arange(num_rows), last, assume_unique=True)
        last = rng.permutation(np.concatenate([kept, rng.choice(others, num_new, replace=False)]))
        steps.append(last)
    return steps


if __name__ == "__main__":
    sys.exit(main())
