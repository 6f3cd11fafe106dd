"""Sweeps block sizes, capacities and policies over traces; the result is the same for any number of workers.

LRU gives all capacities in one pass; every other policy is one job per capacity. OPT always runs
as well, once as a device's cache and once as a tier that may leave blocks out: no policy may hit
more, and that is checked. Knows no file.

    inputs = {("qa", 16): block_trace(requests, 16)}
    cells = sweep(inputs, SweepSettings(capacities=(64, 128), runs=policy_runs(["lru", "fifo"])), workers=2)
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, get_args

from dsatrace.errors import UserError
from dsatrace.kv.policies.registry import policy_info
from dsatrace.kv.policies.simulate import Oversize, simulate
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.study.sweep_cells import (
    ADMIT,
    BYPASS,
    LRU,
    OPT,
    OVERALL,
    POOL,
    Cell,
    Cells,
    Given,
    PolicyRun,
    bypass_cells,
    lru_cells,
    pool_cells,
    simulated_cells,
)

BY_WORKLOAD = ("priority", "wa-lru", "wa-prob", "admit-lru")
"""Policies that tell workloads apart. With one workload they are LRU or close to it."""

Form = Literal["leaf", "flat"]
Inputs = Mapping[tuple[str, int], BlockTrace]
"""Keyed by name of the trace and block size."""
_InMemory = Mapping[tuple[str, int], Given]


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What runs on every trace; `sweep_cells` explains the words."""

    capacities: tuple[int, ...]  # blocks
    runs: tuple[PolicyRun, ...]  # see `policy_runs`
    oversize: Oversize = "reject"
    concurrency: int = 1  # requests in flight
    by_conversation: bool = False  # count hits by groups of conversations too, for their interval

    def __post_init__(self) -> None:
        if len(set(self.capacities)) != len(self.capacities) or not self.capacities:
            raise UserError(f"name each capacity once, and at least one: {list(self.capacities)}")
        if OPT not in (run.policy for run in self.runs):
            raise UserError("a sweep always runs OPT, to check the others; take its runs from policy_runs")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One replay: a policy, or the pool or the bound by its name; LRU has all capacities at once."""

    trace: str
    block_size: int
    run: PolicyRun | str
    capacities: tuple[int, ...]


def policy_runs(
    names: Sequence[str],
    forms: Sequence[Form] = ("leaf",),
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[PolicyRun, ...]:
    """The policies in each form in which they differ, OPT among them; `params` by policy.

    Raises a `UserError` for a name that is unknown or given twice.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"name each policy once, and at least one: {', '.join(names)}")
    if not set(forms) <= set(get_args(Form)) or not forms:
        raise UserError(f"forms are leaf and flat, not {', '.join(forms)}")
    runs: dict[str, PolicyRun] = {}
    for name, form in itertools.product(dict.fromkeys((*names, OPT)), dict.fromkeys(forms)):
        of_name = dict((params or {}).get(name, {}))
        policy, admission = name, {}
        if name.startswith(ADMIT):
            policy = name.removeprefix(ADMIT)
            admission = {"admit": tuple(of_name.pop("admit")), "since_s": of_name.pop("since_s", 0.0)}
        leaf = form == "leaf" or policy_info(policy).leaf_first
        run = PolicyRun(policy, leaf, of_name, **admission)
        runs.setdefault(run.name, run)
    return tuple(runs.values())


def sweep(
    inputs: Inputs,
    settings: SweepSettings,
    workers: int = 1,
    on_done: Callable[[], None] = lambda: None,
) -> Cells:
    """All cells, in the order of inputs, policies (then the pool and `opt-bypass`) and capacities.

    An input of several workloads must be the only one; it gives `overall` and a cell for each.
    More than one worker means fresh processes, at most one per job, so a script that calls this
    must be importable. `on_done` is called after each of `num_jobs` jobs.
    """
    _check_names(inputs)
    jobs = list(_jobs(inputs, settings))
    given = {
        key: Given.of(trace, settings.concurrency, settings.by_conversation) for key, trace in inputs.items()
    }
    cells: Cells = []
    for of_job in _results(jobs, given, settings, min(workers, len(jobs))):
        cells += of_job
        on_done()
    order = {name: i for i, name in enumerate((*(run.name for run in settings.runs), POOL, BYPASS))}
    traces = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in inputs))}
    cells.sort(
        key=lambda cell: (
            traces.get(cell.workload, 0),
            cell.block_size,
            order[cell.policy],
            cell.capacity_blocks,
        )
    )
    _check_bound([cell for cell in cells if cell.workload in (OVERALL, *traces)])
    return cells


def num_jobs(inputs: Inputs, settings: SweepSettings) -> int:
    return sum(1 for _ in _jobs(inputs, settings))


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_names(inputs: Inputs) -> None:
    several = [name for (name, _), trace in inputs.items() if len(trace.workload_names) > 1]
    if several and {name for name, _ in inputs} != {OVERALL}:
        raise UserError(f"{several[0]} has several workloads; sweep each alone, or name it {OVERALL!r}")
    if any(OVERALL in trace.workload_names for trace in inputs.values() if several):
        raise UserError(f"a workload is named {OVERALL!r}, as is the sum of all; name it otherwise")


def _jobs(inputs: Inputs, settings: SweepSettings) -> Iterator[_Job]:
    for (trace, block_size), run in itertools.product(inputs, settings.runs):
        if run.name == LRU:
            yield _Job(trace, block_size, run, settings.capacities)
            continue
        for capacity in settings.capacities:
            yield _Job(trace, block_size, run, (capacity,))
    for (trace, block_size), capacity in itertools.product(inputs, settings.capacities):
        if settings.oversize == "reject":
            yield _Job(trace, block_size, POOL, (capacity,))
        yield _Job(trace, block_size, BYPASS, (capacity,))


def _run_job(job: _Job, inputs: _InMemory, settings: SweepSettings) -> Cells:
    given = inputs[job.trace, job.block_size]
    if job.run == POOL:
        return pool_cells(job.trace, given, job.capacities[0], settings.concurrency)
    if isinstance(job.run, str):
        return bypass_cells(job.trace, given, job.capacities[0])
    if job.run.name == LRU:
        return lru_cells(job.trace, given, job.capacities, settings.oversize)
    return simulated_cells(job.trace, given, job.run, job.capacities[0], settings.oversize)


def _results(jobs: list[_Job], inputs: _InMemory, settings: SweepSettings, workers: int) -> Iterator[Cells]:
    if workers <= 1:
        yield from (_run_job(job, inputs, settings) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with a bar's thread may hang
    try:
        with ProcessPoolExecutor(workers, context, _start, (inputs, settings)) as pool:
            policies = dict.fromkeys(run.policy for run in settings.runs if run.name != LRU)
            list(pool.map(compile_policy, policies))  # each by one worker; the others load what it wrote
            yield from pool.map(_run_in_worker, jobs, chunksize=max(1, len(jobs) // (8 * workers)))
    except BrokenProcessPool as error:
        raise UserError(
            "a worker of the sweep was killed; give fewer --workers or a shorter trace"
        ) from error


_given: tuple[_InMemory, SweepSettings] | None = None
"""The worker's copy, set by `_start`."""


def _start(inputs: _InMemory, settings: SweepSettings) -> None:
    global _given  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    _given = (inputs, settings)


def _run_in_worker(job: _Job) -> Cells:
    assert _given is not None, "a worker begins with _start"
    return _run_job(job, *_given)


def compile_policy(policy: str) -> None:
    """Compiles a policy's loop, or loads it from the cache of compiled code."""
    simulate(AccessStream.of([[0]], workloads=["any"]), policy, 1, **_NEUTRAL.get(policy, {}))


_NEUTRAL: dict[str, dict[str, Any]] = {
    "wa-lru": {"admit": ["any"]},
    "wa-prob": {"reuse": {"any": (0.5, 1.0)}},
}
"""Parameters that need no trace to learn from."""


def _check_bound(cells: Iterable[Cell]) -> None:
    """No policy hits more than both OPTs. Takes only cells over a whole trace: they bound no part of one."""
    by_place: dict[tuple[str, int, int], list[Cell]] = {}
    for cell in cells:
        by_place.setdefault((cell.workload, cell.block_size, cell.capacity_blocks), []).append(cell)
    for here in by_place.values():
        bound, outer = (next(cell for cell in here if cell.policy == name) for name in (OPT, BYPASS))
        for cell in here:
            assert cell.hits <= outer.hits, f"{cell} hits more than any cache can: {outer}"
            if cell.policy not in (POOL, BYPASS) and not cell.policy.startswith(ADMIT):
                hits, most = (one.hits + one.output_hits for one in (cell, bound))
                assert hits <= most, f"{cell} hits more than OPT: {bound}"
