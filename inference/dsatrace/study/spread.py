"""How far the study's figures would move with other seeds, or with other conversations of the same kind.

A cell's hits and accesses are also kept by parts: a part per seed of the generators, or of a log at
most `MAX_GROUPS` groups of its conversations. Intervals are 95 %: over seeds Student's t of the
ratio estimator; over a log's groups the percentiles of a bootstrap, which draws groups and keeps
what each one hit. A gain over LRU is a difference of two policies on the same parts, so what moves
both is not in its interval.

    cells = with_intervals(pooled([sweep(inputs, settings) for inputs in of_each_seed]), "seeds")
    cells[0].hit_rate_low, cells[0].hit_rate_high, cells[0].gain
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dsatrace.kv.blocks import HIT
from dsatrace.study.metrics import Values
from dsatrace.study.run import Replayed
from dsatrace.study.sweep_cells import DIGITS, LRU, Cell, Cells, added

Kind = Literal["seeds", "conversations"]
NUM_SEEDS = 8
NUM_DRAWS = 2000
QUANTILES = (0.025, 0.975)
_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 0.975 quantiles of Student's t with 1, 2, ... 30 degrees of freedom."""

Interval = tuple[float, float] | tuple[None, None]
Spread = dict[str, dict[str, float]]
"""By metric: `low` and `high`, the ends of its interval, and over seeds its `mean`."""
Sums = Mapping[str, NDArray[Any]]
"""By metric (2, R): what is summed over requests for its numerator and its denominator."""


def pooled(of_seeds: Iterable[Cells]) -> Cells:
    """The cells of all seeds together: counts are added up, and each seed stays a part."""
    by_place: dict[tuple[object, ...], list[Cell]] = {}
    for cell in (cell for cells in of_seeds for cell in cells):
        place = (cell.workload, cell.block_size, cell.capacity_blocks, cell.policy)
        by_place.setdefault(place, []).append(cell)
    return [added(same, np.concatenate([cell.parts for cell in same])) for same in by_place.values()]


def with_intervals(cells: Sequence[Cell], kind: Kind) -> Cells:
    """The cells with the intervals of their hit rates and of their gains over LRU, as far as known."""
    lru = {(c.workload, c.block_size, c.capacity_blocks): c for c in cells if c.policy == LRU}
    result = []
    for cell in cells:
        hits, accesses = cell.parts.T
        low, high = interval(hits, accesses, kind)
        if low is not None and high is not None:  # of two seeds it reaches further than any rate can
            low, high = max(low, 0.0), min(high, 1.0)
        found: dict[str, Any] = {"hit_rate_low": low, "hit_rate_high": high}
        other = lru.get((cell.workload, cell.block_size, cell.capacity_blocks))
        if other is not None and cell.policy != LRU:
            found["gain"] = cell.hit_rate - other.hit_rate
            found["gain_low"], found["gain_high"] = interval(hits - other.parts[:, 0], accesses, kind)
        for name, value in found.items():
            found[name] = None if value is None else round(value, DIGITS)
        result.append(dataclasses.replace(cell, **found))
    return result


def over_seeds(of_seeds: Sequence[Values], least: float = 0.0) -> Spread:
    """Mean and interval of each metric that every seed has; none of them can be below `least`."""
    spread = {}
    for name in of_seeds[0]:
        values = np.array([one.get(name) for one in of_seeds], float)  # None becomes nan
        low, high = interval(values, np.ones(len(values)), "seeds")
        if low is not None and high is not None and np.isfinite(values).all():
            spread[name] = {"mean": float(values.mean()), "low": max(low, least), "high": high}
    return spread


def sums_of(replayed: Replayed) -> Sums:
    """Of each rate that is a sum over requests."""
    trace, result, events = replayed.trace, replayed.result, replayed.accesses
    reused = np.bincount(events["request"][events["kind"] == HIT], minlength=trace.num_requests)
    columns = {
        "hit_rate_first_prefill": (result.hit_tokens, trace.prompt_tokens),
        "hit_rate_blocks": (result.hit_tokens // trace.block_size, trace.prompt_blocks),
        "hit_rate_infinite": (replayed.unlimited.hit_tokens, trace.prompt_tokens),
        "sharing_above_0": (result.hit_tokens > 0, np.ones(trace.num_requests)),
        "block_reuse_rate": (reused, result.blocks_allocated + reused),
        "sharing_fraction_mean": (result.hit_tokens / trace.prompt_tokens, np.ones(trace.num_requests)),
    }
    return {name: np.array(pair) for name, pair in columns.items()}


def bootstrapped(sums: Sums, part: NDArray[np.int64]) -> Spread:
    """Interval of each rate, as far as it has one; `part` (R,) is each request's group."""
    spread = {}
    for name, of_requests in sums.items():
        numerator, denominator = of_parts(of_requests, part)
        low, high = interval(numerator, denominator, "conversations")
        if low is not None and high is not None:
            spread[name] = {"low": low, "high": high}
    return spread


def of_parts(of_requests: NDArray[Any], part: NDArray[np.int64], size: int = 0) -> NDArray[np.float64]:
    """(2, P) sums over the requests of each part, of (2, R)."""
    return np.array([np.bincount(part, column, size) for column in of_requests])


def interval(numerator: NDArray[Any], denominator: NDArray[Any], kind: Kind) -> Interval:
    """Of sum(numerator) / sum(denominator), both (P,) by part; (None, None) for fewer than two parts.

    Of a log, parts without a denominator are no parts.
    """
    if kind == "conversations":
        numerator, denominator = numerator[denominator > 0], denominator[denominator > 0]
    size, total = len(numerator), float(denominator.sum())
    if size < 2 or not total:
        return None, None
    if kind == "conversations":
        low, high = np.quantile(drawn_rates(numerator, denominator), QUANTILES).tolist()
        return low, high
    rate = float(numerator.sum()) / total
    residuals = (numerator - rate * denominator) / (total / size)
    error = float(np.sqrt((residuals**2).sum() / (size * (size - 1))))
    width = (_T_975[size - 2] if size - 2 < len(_T_975) else 1.96) * error
    return rate - width, rate + width


def drawn_rates(numerator: NDArray[Any], denominator: NDArray[Any]) -> NDArray[np.float64]:
    """(D,) the rate in each draw of P parts; the draws are the same for everything of P parts."""
    size = len(numerator)
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), NUM_DRAWS)
    rates: NDArray[np.float64] = (draws @ numerator) / np.maximum(draws @ denominator, 1)
    return rates
