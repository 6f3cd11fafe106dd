"""Checks policies' parameters, and turns what users say of workloads by name into numbers by index.

What is not given is measured on the first requests of the stream, where there is one.
Knows no policy.

    shares("protected")({"protected": 0.8}, workloads)        # as given, or UserError
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dsatrace.errors import UserError
from dsatrace.kv.policies.reuse import ReuseProfile, admitted_workloads, reuse_profile
from dsatrace.kv.policies.stream import AccessStream

Settings = dict[str, Any]
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Workloads:
    """Their names in order, and a stream to learn from, if any."""

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


def as_given(settings: Settings, workloads: Workloads) -> Settings:
    return settings


def shares(*names: str) -> Callable[[Settings, Workloads], Settings]:
    """Those parameters lie between 0 and 1."""

    def resolve(settings: Settings, workloads: Workloads) -> Settings:
        for name in names:
            _check_share(settings, name)
        return settings

    return resolve


def natural(name: str) -> Callable[[Settings, Workloads], Settings]:
    """That parameter is not negative."""

    def resolve(settings: Settings, workloads: Workloads) -> Settings:
        if settings[name] < 0:
            raise UserError(f"{name} must not be negative, but is {settings[name]}")
        return settings

    return resolve


def resolve_priorities(settings: Settings, workloads: Workloads) -> Settings:
    """`priorities`: a number for each workload by name, 0 where not named."""
    return {"worth": workloads.by_index(settings["priorities"], "priorities", 0.0)}


def resolve_admission(settings: Settings, workloads: Workloads) -> Settings:
    """`admit`: the workloads to keep by name, or None to measure which are reused."""
    if settings["admit"] is not None:
        return {"worth": workloads.by_index(dict.fromkeys(settings["admit"], 1.0), "admit", 0.0)}
    _check_share(settings, "profile_share")
    _check_share(settings, "min_relative_reuse")
    profile = workloads.profile(settings["profile_share"], "admit=[...]")
    return {"worth": admitted_workloads(profile, settings["min_relative_reuse"])}


def resolve_reuse(settings: Settings, workloads: Workloads) -> Settings:
    """`reuse`: (probability, mean seconds to it) of each workload by name, or None to measure."""
    if settings["reuse"] is None:
        _check_share(settings, "profile_share")
        profile = workloads.profile(settings["profile_share"], "reuse={name: (probability, mean_s)}")
        return {
            "reuse_probability": profile.probability.tolist(),
            "mean_reuse_s": profile.mean_s.tolist(),
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
    }


def _check_share(settings: Settings, name: str) -> None:
    if not 0 <= settings[name] <= 1:
        raise UserError(f"{name} is a share, between 0 and 1, not {settings[name]}")
