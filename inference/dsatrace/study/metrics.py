"""What every number of the study means: name, unit, formula, denominator. This is the only such list.

`measure` computes the values and checks them here. Rates are shares of 1; a rate with a
denominator of 0 is None. A quantile is the nearest rank: the smallest value whose cumulative
count reaches q; a median is the 0.5 quantile.

    python -m dsatrace.study.metrics        # prints the list as a markdown table
    check_values({"hit_rate_first_prefill": 1.2})       # raises ValueError
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Literal

from dsatrace.errors import exits_cleanly

Unit = Literal["share", "count", "blocks", "tokens", "s"]
Values = Mapping[str, float | int | None]

SHARING = ("mean", "median", "min", "max", "p90", "p99")
SPREAD = ("mean", "median", "min", "p90", "p99", "max")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number, or with `statistics` one for each of them, named `<name>_<statistic>`."""

    name: str
    unit: Unit
    meaning: str
    formula: str
    denominator: str = ""
    statistics: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{name}" for name in self.statistics) or (self.name,)


METRICS = (
    Metric("num_requests", "count", "requests of the trace; the metrics below are over all of them, and a "
           "rejected one finds nothing", "count"),
    Metric("num_served", "count", "requests that were not rejected", "num_requests - num_rejected"),
    Metric("num_rejected", "count", "requests that do not fit an empty cache", "count"),
    Metric("prompt_tokens", "tokens", "length of the prompts", "sum"),
    Metric("prompt_blocks", "blocks", "full blocks of the prompts", "sum"),
    Metric("hit_blocks", "blocks", "of those the ones found, up to the first that is missing", "sum"),
    Metric("sharing_fraction", "share", "part of a request's prompt that was cached at its first prefill",
           "hit tokens / prompt tokens, per request", "the request's prompt tokens", SHARING),
    Metric("sharing_above_0", "share", "requests that found anything", "requests with a hit / requests",
           "requests"),
    Metric("hit_rate_first_prefill", "share", "tokens cached when requests were first prefilled",
           "hit tokens / prompt tokens", "prompt tokens"),
    Metric("hit_rate_served", "share", "the same over served requests (vLLM's hits / queries)",
           "hit tokens / prompt tokens", "prompt tokens of served requests"),
    Metric("hit_rate_with_preempted", "share", "the same with what preempted requests looked up on return",
           "(hit + hit on return) / (prompt + looked up on return)", "tokens looked up, returns included"),
    Metric("hit_rate_blocks", "share", "full prompt blocks found, up to the first that is missing",
           "hit_blocks / prompt_blocks", "full prompt blocks"),
    Metric("hit_rate_blocks_any", "share", "full prompt blocks cached, wherever they stand: a prefix need "
           "not be contiguous, nor leave a token to compute",
           "cached blocks / full prompt blocks", "full prompt blocks"),
    Metric("hit_rate_infinite", "share", "first-prefill hits of a cache that never evicts: the ceiling",
           "hit tokens there / prompt tokens", "prompt tokens"),
    Metric("hit_rate_chunks_recounted", "share", "hits if the whole prompt is looked up again before every "
           "chunk of --recount-tokens, which finds the request's own chunks; no engine saves work by these",
           "full-block tokens before the chunk / prompt tokens, summed over chunks",
           "prompt tokens of served requests, once per chunk"),
    Metric("hit_rate_host", "share", "what the host pool served of the tokens that the cache lacked (vLLM's "
           "external hits / queries)", "host hit tokens / (prompt - hit tokens)", "tokens not in the cache"),
    Metric("hit_rate_with_host", "share", "first-prefill hits of the cache, and then of a host pool that "
           "takes the evicted blocks", "(hit + host hit) tokens / prompt tokens", "prompt tokens"),
    Metric("host_hit_blocks", "blocks", "blocks that the host pool served", "count"),
    Metric("block_reuse_rate", "share", "share of blocks that were shared instead of handed out",
           "blocks_reused / (blocks_allocated + blocks_reused)", "blocks of prompts and outputs"),
    Metric("blocks_allocated", "blocks", "blocks handed out, for prompts, outputs and after preemption",
           "count"),
    Metric("blocks_reused", "blocks", "blocks shared instead, after preemption too", "count of hits"),
    Metric("blocks_unique", "blocks", "different full blocks that were cached at some time", "count"),
    Metric("blocks_evicted", "blocks", "cached blocks evicted for others", "count of evictions"),
    Metric("blocks_hit", "share", "different blocks hit at least once", "hit blocks / blocks_unique",
           "different cached blocks"),
    Metric("accesses_per_block", "count", "how often a block was cached or hit", "accesses, per block",
           "all different cached blocks", SPREAD),
    Metric("hits_per_block", "count", "how often a block was hit", "hits, per block",
           "all different cached blocks", SPREAD),
    Metric("accesses_per_hit_block", "count", "how often a block was cached or hit", "accesses, per block",
           "blocks hit at least once", SPREAD),
    Metric("hits_per_hit_block", "count", "how often a block was hit", "hits, per block",
           "blocks hit at least once", SPREAD),
    Metric("reuse_gap_s", "s", "trace time from an access of a block to its next, evicted between or not",
           "time - time of the access before, per pair", "pairs of accesses of a block", SPREAD),
    Metric("hit_gap_s", "s", "trace time from a hit of a block to its next hit",
           "time - time of the hit before, per pair", "pairs of hits of a block", SPREAD),
)  # fmt: skip

UNITS: dict[str, Unit] = {key: metric.unit for metric in METRICS for key in metric.keys}
ROUNDING = 1e-9


def check_values(values: Values) -> None:
    """Raises `ValueError` for an unknown name, a share outside 0..1, or a negative or infinite number."""
    for name, value in values.items():
        if name not in UNITS:
            raise ValueError(f"{name} is no metric of the study")
        if value is None:
            continue
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be a number of at least 0")
        if UNITS[name] == "share" and value > 1 + ROUNDING:
            raise ValueError(f"{name} is {value}; a share lies between 0 and 1")


def markdown_table() -> str:
    """The list, with a line per metric."""
    lines = ["| metric | unit | meaning | formula | denominator |", "|---|---|---|---|---|"]
    for metric in METRICS:
        name = f"`{metric.name}`"
        if metric.statistics:
            name = f"`{metric.name}_` " + ", ".join(f"`{statistic}`" for statistic in metric.statistics)
        cells = (name, metric.unit, metric.meaning, metric.formula, metric.denominator)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@exits_cleanly
def main() -> None:
    print(markdown_table())


if __name__ == "__main__":
    sys.exit(main())
