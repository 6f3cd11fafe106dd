"""Every eviction policy by name: what it does, where it comes from, its parameters.

POLICIES["sieve"].source
policy = make_policy("slru", capacity=1000, leaf=True, protected=0.5)     # for a pool
result = simulate(stream, "slru", 1000, leaf=True, protected=0.5)         # see `simulate`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from dsatrace.errors import UserError
from dsatrace.kv.policies.arc import Arc, arc_state
from dsatrace.kv.policies.frequency import Gdsf, Lfu, Slru, gdsf_state, lfu_state, slru_state
from dsatrace.kv.policies.optimal import Optimal, optimal_state
from dsatrace.kv.policies.ordered import Ordered, Uniform, ordered_state, uniform_state
from dsatrace.kv.policies.plain import PlainPolicy
from dsatrace.kv.policies.s3fifo import S3Fifo, s3fifo_state
from dsatrace.kv.policies.settings import (
    Settings,
    Workloads,
    as_given,
    natural,
    resolve_admission,
    resolve_priorities,
    resolve_reuse,
    shares,
)
from dsatrace.kv.policies.sieve import Sieve, sieve_state
from dsatrace.kv.policies.workload_aware import (
    ByWorkload,
    ReuseProbability,
    TailFirst,
    by_workload_state,
    reuse_probability_state,
    tail_first_state,
)


@dataclasses.dataclass(frozen=True)
class PolicyInfo:
    """One policy.

    `leaf_first` says that its flat form never evicts a parent whose child is of use, so
    that flat and leaf-constrained give the same hits on prefix trees. `resolve` checks the
    user's parameters and turns them into those of `plain` and `state`.
    """

    name: str
    meaning: str
    source: str
    plain: Callable[..., PlainPolicy]
    state: Callable[..., NamedTuple]
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resolve: Callable[[Settings, Workloads], Settings] = as_given
    num_queues: int | None = 1  # None: one a workload
    leaf_first: bool = False
    needs_future: bool = False

    def settings(self, params: Mapping[str, Any], workloads: Workloads) -> Settings:
        """The parameters with their defaults, resolved. Raises `UserError`."""
        unknown = sorted(set(params) - set(self.params))
        if unknown:
            takes = ", ".join(self.params) or "none"
            raise UserError(f"policy {self.name} has no parameter {', '.join(unknown)}; it takes {takes}")
        return self.resolve({**self.params, **params}, workloads)


def _ordered(name: str, meaning: str, source: str, by_recency: bool, newest_first: bool) -> PolicyInfo:
    return PolicyInfo(
        name,
        meaning,
        source,
        partial(Ordered, by_recency=by_recency, newest_first=newest_first),
        partial(ordered_state, by_recency=by_recency, newest_first=newest_first),
        leaf_first=by_recency and not newest_first,
    )


_INFOS = (
    _ordered("lru", "the least recently used block", "vLLM, SGLang; Mattson et al. 1970", True, False),
    _ordered("fifo", "the block cached first", "SGLang", False, False),
    _ordered("mru", "the most recently used block", "SGLang; Chou and DeWitt 1985", True, True),
    _ordered("filo", "the block cached last", "SGLang", False, True),
    PolicyInfo(
        "lfu",
        "the block used least often since it was cached",
        "SGLang",
        Lfu,
        lfu_state,
        leaf_first=True,
    ),
    PolicyInfo(
        "slru",
        "blocks used once before those used again, each group by recency",
        "Karedla, Love and Wherry 1994",
        Slru,
        slru_state,
        params={"protected": 0.8},
        resolve=shares("protected"),
        num_queues=2,
    ),
    PolicyInfo(
        "priority",
        "the lowest priority of a workload, then LRU",
        "SGLang, TensorRT-LLM",
        ByWorkload,
        by_workload_state,
        params={"priorities": {}},
        resolve=resolve_priorities,
        leaf_first=True,
    ),
    PolicyInfo(
        "s3-fifo",
        "unused blocks of a small queue, then of the main one",
        "Yang et al., SOSP 2023",
        S3Fifo,
        s3fifo_state,
        params={"small": 0.1, "ghost": 0.9, "threshold": 2},
        resolve=shares("small"),
        num_queues=2,
    ),
    PolicyInfo(
        "sieve",
        "the first block unused since a hand last passed it",
        "Zhang et al., NSDI 2024",
        Sieve,
        sieve_state,
    ),
    PolicyInfo(
        "arc",
        "recency or frequency, whichever returning blocks ask for",
        "Megiddo and Modha, FAST 2003",
        Arc,
        arc_state,
        num_queues=2,
    ),
    PolicyInfo(
        "gdsf",
        "the least uses x cost of recomputing, with ageing",
        "Cherkasova, HPL-98-69, 1998; Cao and Irani 1997",
        Gdsf,
        gdsf_state,
        params={"depth_cost": 0.0},
        resolve=natural("depth_cost"),
    ),
    PolicyInfo(
        "t-lru",
        "ends of requests that a next turn can spare, then LRU",
        "Zhang et al., Tail-Optimized Caching, arXiv 2510.15152, 2025; SGLang",
        TailFirst,
        tail_first_state,
        params={"slack_blocks": 8},
        resolve=natural("slack_blocks"),
    ),
    PolicyInfo(
        "wa-lru",
        "blocks of workloads that are not admitted, then LRU",
        "admission by workload, given or by measured reuse",
        ByWorkload,
        by_workload_state,
        params={"admit": None, "min_relative_reuse": 0.5, "profile_share": 0.2},
        resolve=resolve_admission,
        leaf_first=True,
    ),
    PolicyInfo(
        "wa-prob",
        "the least probability of reuse within a block's expected stay",
        "after Wang et al., KVCache Cache in the Wild, USENIX ATC 2025",
        ReuseProbability,
        reuse_probability_state,
        params={"reuse": None, "profile_share": 0.2},
        resolve=resolve_reuse,
        num_queues=None,
    ),
    PolicyInfo(
        "random",
        "any block, each as likely as the other",
        "libCacheSim's Random; arXiv 2601.18999 for leaves",
        Uniform,
        uniform_state,
        params={"seed": 42},
        resolve=natural("seed"),
    ),
    PolicyInfo(
        "opt",
        "the block whose next use is farthest: the bound",
        "Belady 1966, on whole requests",
        Optimal,
        optimal_state,
        leaf_first=True,
        needs_future=True,
    ),
)

POLICIES: Mapping[str, PolicyInfo] = MappingProxyType({info.name: info for info in _INFOS})


def policy_info(name: str) -> PolicyInfo:
    """Raises `UserError` for an unknown name."""
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    return POLICIES[name]


def make_policy(
    name: str,
    capacity: int,
    *,
    leaf: bool = False,
    workload_names: tuple[str, ...] = ("all",),
    **params: Any,
) -> PlainPolicy:
    """The plain policy, for a pool of `capacity` blocks.

    `Access.workload` is an index of `workload_names`. Raises `UserError` for an unknown
    name or parameter, and where a policy would have to learn from a stream first.
    """
    info = policy_info(name)
    if capacity < 1:
        raise UserError(f"a cache holds at least 1 block, not {capacity}")
    settings = info.settings(params, Workloads(workload_names, None))
    return info.plain(capacity, leaf=leaf, **settings)
