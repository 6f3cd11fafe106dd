"""`dsatrace warmup`: compiles all kernels beforehand, so that no run waits for it.

dsatrace warmup
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence

from dsatrace.commands.parser import CommandParser, count
from dsatrace.errors import exits_cleanly
from dsatrace.jit import kept_in

PARTS = ("trace", "import", "stores", "study", "replay")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        "warmup",
        "Compile the kernels that the trace, import, the stores, the study and the replay use, and keep them "
        "for later runs.",
        examples="""
        %(prog)s
        %(prog)s --for trace
        """,
    )
    parser.add_argument("--for", dest="part", choices=("all", *PARTS), default="all", help="what to compile")
    parser.add_argument("--jobs", type=count, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    jobs = [job for part in PARTS if args.part in ("all", part) for job in _jobs(part)]
    context = multiprocessing.get_context("spawn")
    # Nearly all that numba makes lives as long as the process: to look for garbage is a tenth of the work.
    with concurrent.futures.ProcessPoolExecutor(min(args.jobs, len(jobs)), context, gc.disable) as pool:
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            print(f"compiled {done.result()}", file=sys.stderr)
    where = kept_in()
    kept = f"kept in {where}" if where else "no folder can be written, so every process compiles anew"
    print(f"{len(jobs)} kernels ready in {time.perf_counter() - started:.0f} s; {kept}")
    return 0


def _jobs(part: str) -> list[Callable[[], str]]:
    """What can be compiled side by side."""
    if part == "trace":
        return [_trace]
    if part == "import":
        return [_detector]
    if part == "stores":
        from dsatrace.kv.tiers.residency import COMPILED_POLICIES

        return [_stores, *(functools.partial(_tier_policy, name) for name in COMPILED_POLICIES)]
    if part == "replay":
        return [_locality, _policies_of_sets, _reader]
    from dsatrace.kv.policies.registry import POLICIES

    return [_pool, _lru_at_all_sizes, *(functools.partial(_policy, name) for name in POLICIES)]


def _trace() -> str:
    from dsatrace.trace.kernels import compile_kernels

    compile_kernels()
    return "the trace's writer"


def _detector() -> str:
    import numpy as np

    from dsatrace.captures.detector import Detector
    from dsatrace.trace.kind import engine_kind

    Detector(engine_kind(1, 1)).add("any", first=0, prompt_tokens=1, ids=np.zeros((1, 1, 1), np.int32))
    return "the detector of captures"


def _stores() -> str:
    for name in ("checksums", "ledger", "resp"):  # they compile when they are imported
        importlib.import_module(f"dsatrace.kv.stores.{name}")
    return "the stores"


def _tier_policy(name: str) -> str:
    import numpy as np

    from dsatrace.kv.policies.batches import BatchOrder

    order = BatchOrder(name, num_blocks=4, num_slots=2)
    order.admit(np.array([0, 1]), free=np.array([0, 1]))
    order.forget(np.array([0, 1]))
    return f"policy {name} of the tiers"


def _policies_of_sets() -> str:
    from dsatrace.selection_replay.policies import POLICIES, misses
    from dsatrace.selection_replay.steps import Steps

    steps = Steps.of([[1, 0], [2, 1]])
    for name in POLICIES:
        misses(steps, name, 2)
    return "the policies of selections"


def _pool() -> str:
    from dsatrace.kv.simulation.block_trace import BlockTrace
    from dsatrace.kv.simulation.replay import ReplayConfig, replay

    trace = BlockTrace.from_tokens([[1, 2, 3, 4, 5], [1, 2, 9]], block_size=2)
    replay(trace, ReplayConfig(num_blocks=4))
    replay(trace, ReplayConfig(num_blocks=4, schedule="continuous"))
    return "the block pool's simulator"


def _policy(name: str) -> str:
    from dsatrace.study.sweep import compile_policy

    compile_policy(name)
    return f"policy {name}"


def _lru_at_all_sizes() -> str:
    from dsatrace.kv.policies.bypass import bypassing_hits
    from dsatrace.kv.policies.reuse import reuse_profile
    from dsatrace.kv.policies.stack_distance import lru_hits_at
    from dsatrace.kv.policies.stream import AccessStream

    stream = AccessStream.of([[0, 1], [0, 2]])
    lru_hits_at(stream, [1, 2])
    bypassing_hits(stream, stream.lengths, 2)
    reuse_profile(AccessStream.of([[0]], workloads=["any"]))
    return "LRU at all sizes, the bound of any cache, and the profile of reuse"


def _reader() -> str:
    """As arrow gives ids; those that may be written to are compiled with the locality."""
    import numpy as np

    from dsatrace.trace.selections import copy_runs

    ids, ends = np.zeros(1, np.int32), np.array([0, 1])
    ids.flags.writeable = False
    copy_runs(ids, ends[:-1], ends[1:], ends[:-1], np.empty(1, np.int32))
    return "the reader of selections"


def _locality() -> str:
    from dsatrace.selection_replay.layer_overlap import LayerOverlap
    from dsatrace.selection_replay.locality import MEASURES
    from dsatrace.selection_replay.nulls import NULLS, null_of
    from dsatrace.selection_replay.predictors import predictions_of
    from dsatrace.selection_replay.steps import Steps

    steps = Steps.of([[0, 1], [0, 2], [1, 2]])
    for name in NULLS:
        null_of(steps, name, seed=0)
    LayerOverlap.of({0: steps, 1: steps})
    predictions_of(steps, before=steps)
    for kind in MEASURES.values():
        kind.of(steps)
    return "the locality of selections"


if __name__ == "__main__":
    sys.exit(main())
