"""Gaps between uses where times were recorded: of turns, and of requests.

Reads block ids (Mooncake's, Bailian's) or BurstGPT's CSV with sessions. A turn's blocks are used again at
the conversation's next turn, those of a common system prompt by the next request of anybody. Both kinds
of gap are told for the quieter and the busier half of their beginnings; how busy it is says the number of
other conversations' requests near the beginning. Only gaps of the first half of the log that are no longer
than half of it count: of those none is cut off by its end. Intervals are bootstrapped over conversations.

    python3 scripts/recorded_gaps.py conversation_trace.jsonl --near 30
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError, exits_cleanly
from dsatrace.report.grid import Grid, number
from dsatrace.study.request_files import read_requests
from dsatrace.study.requests import UNKNOWN, block_trace
from dsatrace.study.tokenization import WordVocabulary

WAYS = 3
"""A block that so many different blocks follow is shared: a turn that was asked again makes two ways."""
NUM_DRAWS = 2000
Times = NDArray[np.float64]
Numbers = NDArray[np.int64]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("log", type=Path, help="block ids with recorded times, or BurstGPT's CSV")
    parser.add_argument("--near", type=float, default=30.0, help="seconds about a gap's beginning")
    args = parser.parse_args(argv)
    time_s, conversation = (_sessions if args.log.suffix == ".csv" else _chains)(args.log)
    print(gap_grid(args.log.name, time_s, conversation, args.near).markdown())
    return 0


def gap_grid(name: str, time_s: Times, conversation: Numbers, near_s: float) -> Grid:
    """A row per kind of gap and half; `time_s` (R,) rises, `conversation` (R,) numbers from 0."""
    turns, length = np.lexsort((time_s, conversation)), time_s[-1] - time_s[0]
    same = np.flatnonzero(conversation[turns][1:] == conversation[turns][:-1])
    every = np.arange(len(time_s))
    kinds = {"turns": (turns[same], turns[same + 1]), "anybody's requests": (every[:-1], every[1:])}
    rows = []
    for kind, (before, after) in kinds.items():
        whole = np.maximum(time_s[before] - time_s[0], time_s[after] - time_s[before]) <= length / 2
        begin = before[whole]
        gaps, owner = time_s[after[whole]] - time_s[begin], conversation[begin]
        rate = np.array([_rate(time_s, conversation, i, near_s) for i in begin.tolist()])
        busy = rate > np.median(rate)
        for half, chosen in (("all", np.ones_like(busy)), ("quieter", ~busy), ("busier", busy)):
            if not chosen.any():  # it was equally busy all the time
                continue
            low, high = _median_interval(gaps[chosen], owner[chosen])
            values = (gaps[chosen].min(), np.median(gaps[chosen]), gaps[chosen].mean(), gaps[chosen].max())
            cells = (number(float(value), ",.0f" if value >= 100 else ".3g") for value in values)
            head = (kind, half, f"{rate[chosen].mean():.3g}", f"{chosen.sum():,}")
            rows.append((*head, *cells, f"{low:,.0f} to {high:,.0f}"))
    columns = ("between", "half", "others/s", "gaps", "min s", "median s", "mean s", "max s", "median, 95 %")
    return Grid(f"{name}: {len(time_s):,} requests in {length:,.0f} s", columns, rows, left=(0, 1))


def _rate(time_s: Times, conversation: Numbers, request: int, near_s: float) -> float:
    """Requests of other conversations per second, within `near_s` of a request and the log."""
    begin, end = max(time_s[0], time_s[request] - near_s), min(time_s[-1], time_s[request] + near_s)
    near = (time_s >= begin) & (time_s <= end) & (conversation != conversation[request])
    return float(near.sum() / (end - begin))


def _median_interval(gaps: Times, owner: Numbers) -> tuple[float, float]:
    draw, groups = np.random.default_rng(0), [gaps[owner == i] for i in np.unique(owner)]
    medians = [
        np.median(np.concatenate([groups[i] for i in draw.integers(0, len(groups), len(groups))]))
        for _ in range(NUM_DRAWS)
    ]
    low, high = np.quantile(medians, (0.025, 0.975)).tolist()
    return low, high


def _chains(path: Path) -> tuple[Times, Numbers]:
    """A conversation is what goes on from one block behind the blocks that conversations share."""
    requests = read_requests(path, WordVocabulary())
    if not requests.times_recorded or requests.tokens_per_id == 1:
        raise UserError(f"{path}: needs block ids with recorded times")
    trace = block_trace(requests, requests.tokens_per_id)
    ways = np.bincount(trace.parents[trace.parents >= 0], minlength=trace.num_keys)
    names: dict[int, int] = {}
    conversation = []
    for i in range(trace.num_requests):
        own = (key for key in trace.keys_of(i) if ways[key] < WAYS)
        conversation.append(names.setdefault(next(own, UNKNOWN - i), len(names)))
    return trace.time_s, np.array(conversation)


def _sessions(path: Path) -> tuple[Times, Numbers]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "Session ID" not in rows[0]:
        raise UserError(f"{path}: has no column Session ID; BurstGPT_3 has one")
    time_s = np.array([float(row["Timestamp"]) for row in rows])
    order = np.argsort(time_s, kind="stable")
    return time_s[order], np.unique([row["Session ID"] for row in rows], return_inverse=True)[1][order]


if __name__ == "__main__":
    sys.exit(main())
