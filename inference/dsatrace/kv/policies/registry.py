"""Every eviction policy by name: what it does, where it comes from, its parameters.

What users say of workloads by name becomes numbers by index here; what they leave out is measured
on the first requests of the stream, where there is one. What was learned from the requests before
`since_s` is applied from then on only.

    POLICIES["sieve"].source
    result = simulate(stream, "slru", 1000, leaf=True, protected=0.5)         # see `simulate`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from dsatrace.errors import UserError
from dsatrace.kv.policies.arc import arc_state
from dsatrace.kv.policies.frequency import gdsf_state, lfu_state, slru_state
from dsatrace.kv.policies.optimal import optimal_state
from dsatrace.kv.policies.ordered import ordered_state, uniform_state
from dsatrace.kv.policies.reuse import ReuseProfile, admitted_workloads, reuse_profile
from dsatrace.kv.policies.s3fifo import s3fifo_state
from dsatrace.kv.policies.sieve import sieve_state
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.policies.workload_aware import (
    by_workload_state,
    reuse_probability_state,
    tail_first_state,
)

Settings = dict[str, Any]
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Workloads:
    """Their names in order, and a stream to measure reuse on, if any."""

    names: tuple[str, ...]
    stream: AccessStream | None

    def by_index(self, values: Mapping[str, Value], what: str, default: Value | None = None) -> list[Value]:
        """The value of each workload; without a default all must be named."""
        unknown = sorted(set(values) - set(self.names))
        missing = [] if default is not None else sorted(set(self.names) - set(values))
        if unknown or missing:
            wrong = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
            raise UserError(f"{what} names workloads, {wrong}; there are {', '.join(self.names)}")
        return [values.get(name, default) for name in self.names]  # type: ignore[misc]

    def profile(self, share: float, instead: str) -> ReuseProfile:
        if self.stream is None:
            raise UserError(f"there is no stream to learn reuse from: give {instead}")
        return reuse_profile(self.stream.head(share))


def resolve_priorities(settings: Settings, workloads: Workloads) -> Settings:
    """`priorities`: a number for each workload by name, 0 where not named."""
    return {"worth": workloads.by_index(settings["priorities"], "priorities", 0.0)}


def resolve_admission(settings: Settings, workloads: Workloads) -> Settings:
    """`admit`: the workloads to keep by name, or None to measure which are reused."""
    if settings["admit"] is None:
        profile = workloads.profile(settings["profile_share"], "admit=[...]")
        worth = admitted_workloads(profile, settings["min_relative_reuse"])
    else:
        worth = workloads.by_index(dict.fromkeys(settings["admit"], 1.0), "admit", 0.0)
    return {"worth": worth, "since_s": settings["since_s"]}


def resolve_reuse(settings: Settings, workloads: Workloads) -> Settings:
    """`reuse`: (probability, mean seconds to it) of each workload by name, or None to measure."""
    if settings["reuse"] is None:
        profile = workloads.profile(settings["profile_share"], "reuse={name: (probability, mean_s)}")
        return {
            "reuse_probability": profile.probability.tolist(),
            "mean_reuse_s": profile.mean_s.tolist(),
            "since_s": settings["since_s"],
        }
    pairs = workloads.by_index(settings["reuse"], "reuse")
    for probability, mean_s in pairs:
        if not 0 <= probability < 1 or mean_s <= 0:
            raise UserError(
                f"reuse needs a probability from 0 to below 1 and a mean above 0 s: {probability}, {mean_s}"
            )
    return {
        "reuse_probability": [float(probability) for probability, _ in pairs],
        "mean_reuse_s": [float(mean_s) for _, mean_s in pairs],
        "since_s": settings["since_s"],
    }


@dataclasses.dataclass(frozen=True)
class PolicyInfo:
    """One policy.

    `leaf_first`: its flat form never evicts a parent whose child is of use, so flat and
    leaf-constrained give the same hits on prefix trees. `resolve` turns the user's parameters into
    those of `state`.
    """

    name: str
    meaning: str
    source: str
    state: Callable[..., NamedTuple]
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shares: tuple[str, ...] = ()  # parameters between 0 and 1
    naturals: tuple[str, ...] = ()  # parameters of at least 0
    resolve: Callable[[Settings, Workloads], Settings] | None = None
    num_queues: int | None = 1  # None: one per workload
    leaf_first: bool = False
    needs_future: bool = False

    def settings(self, params: Mapping[str, Any], workloads: Workloads) -> Settings:
        """The parameters with their defaults, resolved. Raises `UserError`."""
        unknown = sorted(set(params) - set(self.params))
        if unknown:
            takes = ", ".join(self.params) or "none"
            raise UserError(f"policy {self.name} has no parameter {', '.join(unknown)}; it takes {takes}")
        settings = {**self.params, **params}
        for parameter in self.shares:
            if not 0 <= settings[parameter] <= 1:
                raise UserError(f"{parameter} is a share, between 0 and 1, not {settings[parameter]}")
        for parameter in self.naturals:
            if settings[parameter] < 0:
                raise UserError(f"{parameter} must not be negative, but is {settings[parameter]}")
        return settings if self.resolve is None else self.resolve(settings, workloads)


def _ordered(name: str, meaning: str, source: str, by_recency: bool, newest_first: bool) -> PolicyInfo:
    state = partial(ordered_state, by_recency=by_recency, newest_first=newest_first)
    return PolicyInfo(name, meaning, source, state, leaf_first=by_recency and not newest_first)


# fmt: off
_INFOS = (
    _ordered("lru", "the least recently used block", "vLLM, SGLang; Mattson et al. 1970",
             by_recency=True, newest_first=False),
    _ordered("fifo", "the block cached first", "SGLang", by_recency=False, newest_first=False),
    _ordered("mru", "the most recently used block", "SGLang; Chou and DeWitt 1985",
             by_recency=True, newest_first=True),
    _ordered("filo", "the block cached last", "SGLang", by_recency=False, newest_first=True),
    PolicyInfo("lfu", "the block used least often since it was cached", "SGLang",
               lfu_state, leaf_first=True),
    PolicyInfo("slru", "blocks used once before those used again, each group by recency",
               "Karedla, Love and Wherry 1994",
               slru_state, {"protected": 0.8}, shares=("protected",), num_queues=2),
    PolicyInfo("priority", "the lowest priority of a workload, then LRU", "SGLang, TensorRT-LLM",
               by_workload_state, {"priorities": {}}, resolve=resolve_priorities,
               leaf_first=True),
    PolicyInfo("s3-fifo", "unused blocks of a small queue, then of the main one", "Yang et al., SOSP 2023",
               s3fifo_state, {"small": 0.1, "ghost": 0.9, "threshold": 2}, shares=("small",),
               num_queues=2),
    PolicyInfo("sieve", "the first block unused since a hand last passed it", "Zhang et al., NSDI 2024",
               sieve_state),
    PolicyInfo("arc", "recency or frequency, whichever returning blocks ask for",
               "Megiddo and Modha, FAST 2003", arc_state, num_queues=2),
    PolicyInfo("gdsf", "the least uses x cost of recomputing, with ageing",
               "Cherkasova, HPL-98-69, 1998; Cao and Irani 1997",
               gdsf_state, {"depth_cost": 0.0}, naturals=("depth_cost",)),
    PolicyInfo("t-lru", "ends of requests that a next turn can spare, then LRU",
               "Zhang et al., Tail-Optimized Caching, arXiv 2510.15152, 2025; SGLang",
               tail_first_state, {"slack_blocks": 8}, naturals=("slack_blocks",)),
    PolicyInfo("wa-lru", "blocks of workloads that are not admitted, then LRU",
               "admission by workload, given or by measured reuse",
               by_workload_state,
               {"admit": None, "min_relative_reuse": 0.5, "profile_share": 0.2, "since_s": 0.0},
               shares=("min_relative_reuse", "profile_share"), resolve=resolve_admission, leaf_first=True),
    PolicyInfo("wa-prob", "the least probability of reuse within a block's expected stay",
               "after Wang et al., KVCache Cache in the Wild, USENIX ATC 2025",
               reuse_probability_state,
               {"reuse": None, "profile_share": 0.2, "since_s": 0.0},
               shares=("profile_share",), resolve=resolve_reuse, num_queues=None),
    PolicyInfo("random", "any block, each as likely as the other",
               "libCacheSim's Random; arXiv 2601.18999 for leaves",
               uniform_state, {"seed": 42}, naturals=("seed",)),
    PolicyInfo("opt", "the block whose next use is farthest: the bound", "Belady 1966, on whole requests",
               optimal_state, leaf_first=True, needs_future=True),
)
# fmt: on

POLICIES: Mapping[str, PolicyInfo] = MappingProxyType({info.name: info for info in _INFOS})


def policy_info(name: str) -> PolicyInfo:
    """Raises `UserError` for an unknown name."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    return POLICIES[name]
