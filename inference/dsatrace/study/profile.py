"""What policies are told of workloads: how each reuses its blocks, and its priority.

The workload-aware policies need a profile of how each workload reuses its blocks. It is given, or
learned from the first requests of the trace, and applied to the rest; these policies are LRU until
then, so that every policy is measured on every request and none on what it has seen.

    profile, since_s = learned_profile(block_trace(requests, 16), share=0.2)
    runs = policy_runs(["lru", "wa-lru"], params=params_of(["wa-lru"], profile, since_s))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.files import read_json
from dsatrace.kv.policies.registry import POLICIES
from dsatrace.kv.policies.reuse import admitted_workloads, reuse_profile
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.text import counted

WARM_UP_SHARE = 0.2
ADMITTING = ("wa-lru", "admit-lru")
NEED_PROFILE = (*ADMITTING, "wa-prob")


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


def learned_profile(trace: BlockTrace, share: float) -> tuple[Profile, float]:
    """The profile of the first `share` of the requests, and the time from which it is known, in s.

    Raises a `UserError` if a workload of the rest does not occur in them.
    """
    if not 0 < share < 1:
        raise UserError(f"--warm-up must be a share between 0 and 1, not {share}")
    stream = AccessStream.of_trace(trace).head(share)
    missing = sorted(set(range(stream.num_workloads)) - set(stream.workloads.tolist()))
    if missing:
        names = ", ".join(repr(stream.workload_names[i]) for i in missing)
        raise UserError(
            f"the warm-up of {counted(stream.num_requests, 'request')} has none of {names}; "
            "raise --warm-up, give a --profile, or leave the workload-aware policies out"
        )
    measured = reuse_profile(stream)
    admitted = admitted_workloads(measured, POLICIES["wa-lru"].params["min_relative_reuse"])
    columns = zip(
        stream.workload_names, measured.probability.tolist(), measured.mean_s.tolist(), admitted, strict=True
    )
    profile = {
        name: WorkloadProfile(probability, mean_s, bool(worth))
        for name, probability, mean_s, worth in columns
    }
    first_after = min(stream.num_requests, trace.num_requests - 1)
    return profile, float(trace.time_s[first_after])


def read_profile(path: Path) -> Profile:
    """A profile file: the `profile.json` that a sweep writes, or one made by hand."""
    remedy = "; give the profile.json of a sweep"
    given = read_json(path, f"--profile {path}", unreadable=remedy, broken=remedy)
    if not isinstance(given, dict) or not given:
        raise UserError(f'{path}: a profile is an object of workloads: {{"qa": {{...}}, ...}}')
    return {name: _entry(path, name, values) for name, values in given.items()}


def profile_record(profile: Profile) -> dict[str, Any]:
    """As `read_profile` reads it."""
    return {name: dataclasses.asdict(entry) for name, entry in profile.items()}


def params_of(
    names: Sequence[str],
    profile: Profile | None,
    since_s: float = 0.0,
    *,
    admit: Sequence[str] | None = None,
    priorities: Mapping[str, float] | None = None,
    seed: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The parameters of each policy: seed, priorities, profile.

    What the profile says is applied from `since_s` on; `admit`, whom to admit, from the beginning.
    """
    params: dict[str, dict[str, Any]] = {} if seed is None else {"random": {"seed": seed}}
    if priorities is not None:
        params["priority"] = {"priorities": dict(priorities)}
    elif "priority" in names:
        raise UserError("policy priority needs --priorities, such as qa=2 chat_multi=1")
    if profile is not None:
        admitted = [name for name, entry in profile.items() if entry.admitted]
        params |= {name: {"admit": admitted, "since_s": since_s} for name in ADMITTING}
        reuse = {name: (entry.reuse_probability, entry.mean_reuse_s) for name, entry in profile.items()}
        params["wa-prob"] = {"reuse": reuse, "since_s": since_s}
    if admit is not None:
        params |= {name: {"admit": list(admit)} for name in ADMITTING}
    missing = [name for name in names if name in NEED_PROFILE and name not in params]
    if missing:
        raise UserError(f"{missing[0]} needs a profile; give --profile or --warm-up")
    return params


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
