"""Several workloads in one cache: the hits that each policy gives to each workload, and to all.

The workload-aware policies need a profile of how each workload reuses its blocks. It is given,
or measured on a warm-up: the first requests of the log, which are not replayed. Every policy
replays the rest from an empty cache, so none is measured on what it has seen; only OPT knows the
future. OPT bounds the hits of all workloads together; a policy that neglects the others may give
one workload more.

    rest, profile = warm_up(log, block_size=16, share=0.2)
    runs = mixed_runs(["lru", "fifo", "wa-lru"], profile)
    cells = sweep({(OVERALL, 16): rest.at(16)}, SweepSettings((256,), runs))
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.reuse import ReuseProfile, admitted_workloads, reuse_profile
from dsatrace.study.sweep import Form, policy_runs
from dsatrace.study.sweep_cells import PolicyRun
from dsatrace.study.sweep_inputs import RequestLog

CAPACITY_BLOCKS = 256
BLOCK_SIZE = 16
WARM_UP_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class WorkloadProfile:
    """How one workload reuses blocks, and whether workload-aware LRU admits it to its LRU order."""

    reuse_probability: float
    mean_reuse_s: float
    admitted: bool

    def __post_init__(self) -> None:
        if not 0 <= self.reuse_probability < 1 or not 0 < self.mean_reuse_s < float("inf"):
            raise UserError(
                "a profile needs a reuse_probability from 0 to below 1 and a mean_reuse_s above 0, not "
                f"{self.reuse_probability}, {self.mean_reuse_s}"
            )


Profile = dict[str, WorkloadProfile]


def warm_up(log: RequestLog, block_size: int, share: float) -> tuple[RequestLog, Profile]:
    """Splits off the first `share` of the requests; returns the rest, and the profile of the first.

    Raises a `UserError` if a workload of the rest does not occur in the warm-up.
    """
    if not 0 < share < 1:
        raise UserError(f"--warm-up must be a share between 0 and 1, not {share}")
    num_requests = round(share * len(log))
    rows = np.arange(len(log))
    head, rest = log.take(rows[:num_requests]), log.take(rows[num_requests:])
    missing = sorted(set(rest.labels) - set(head.labels))
    if missing or not len(rest):
        raise UserError(
            f"the warm-up of {num_requests} requests has none of {', '.join(map(repr, missing))}; "
            "raise --warm-up, give a --profile, or leave the workload-aware policies out"
        )
    stream = head.at(block_size).stream
    return rest, _profile(reuse_profile(stream), stream.workload_names)


def read_profile(path: Path) -> Profile:
    """A profile file: the `profile.json` that a mixed run writes, or one made by hand."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the profile: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the profile is not JSON: {error}") from error
    if not isinstance(given, dict) or not given:
        raise UserError(f'{path}: a profile is an object of workloads: {{"qa": {{...}}, ...}}')
    return {name: _entry(path, name, values) for name, values in given.items()}


def profile_record(profile: Profile) -> dict[str, Any]:
    """As `read_profile` reads it."""
    return {name: dataclasses.asdict(entry) for name, entry in profile.items()}


def mixed_runs(
    names: Sequence[str],
    profile: Profile | None,
    forms: Sequence[Form] = ("leaf", "flat"),
    priorities: Mapping[str, float] | None = None,
    seed: int | None = None,
) -> tuple[PolicyRun, ...]:
    """The policies with their parameters: seed, priorities, profile."""
    params: dict[str, dict[str, Any]] = {} if seed is None else {"random": {"seed": seed}}
    if priorities is not None:
        params["priority"] = {"priorities": dict(priorities)}
    elif "priority" in names:
        raise UserError("policy priority needs --priorities, such as qa=2 chat_multi=1")
    if profile is not None:
        params["wa-lru"] = {"admit": [name for name, entry in profile.items() if entry.admitted]}
        params["wa-prob"] = {
            "reuse": {name: (entry.reuse_probability, entry.mean_reuse_s) for name, entry in profile.items()}
        }
    elif set(names) & set(NEED_PROFILE):
        raise UserError(f"{', '.join(NEED_PROFILE)} need a profile; give --profile or --warm-up")
    return policy_runs(names, forms, params)


NEED_PROFILE = ("wa-lru", "wa-prob")


def default_policies(with_priorities: bool) -> list[str]:
    """All of them; `priority` only with priorities."""
    return [name for name in POLICIES if name != "priority" or with_priorities]


def _profile(measured: ReuseProfile, names: Sequence[str]) -> Profile:
    admitted = admitted_workloads(measured, POLICIES["wa-lru"].params["min_relative_reuse"])
    columns = zip(names, measured.probability.tolist(), measured.mean_s.tolist(), admitted, strict=True)
    return {
        name: WorkloadProfile(probability, mean_s, bool(worth))
        for name, probability, mean_s, worth in columns
    }


def _entry(path: Path, name: str, values: Any) -> WorkloadProfile:
    fields = {field.name: (bool,) if field.type == "bool" else (int, float) for field in _FIELDS}
    if not isinstance(values, dict) or set(values) != set(fields):
        raise UserError(f"{path}: workload {name!r} needs exactly {', '.join(fields)}")
    for field, kinds in fields.items():
        if type(values[field]) not in kinds:
            raise UserError(
                f"{path}: workload {name!r}: {field} is {values[field]!r}, not a value of its kind"
            )
    try:
        return WorkloadProfile(**values)
    except UserError as error:
        raise UserError(f"{path}: workload {name!r}: {error}") from error


_FIELDS = dataclasses.fields(WorkloadProfile)
