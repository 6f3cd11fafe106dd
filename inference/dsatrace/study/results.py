"""The files of a replay: its statistics, a table of requests, a table of blocks. No text, no token id.

write_results(folder, "multi_turn", replayed)
# multi_turn_stats.json, multi_turn_request_metrics.csv, multi_turn_block_metrics.csv
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsatrace.kv.simulation.replay import STATUS_NAMES
from dsatrace.study.measure import block_counts, measure, of_workload, per_turn, workloads_in
from dsatrace.study.output_folder import OutputFolder
from dsatrace.study.run import Replayed

REQUEST_COLUMNS = (
    "request", "arrival_s", "conversation_id", "turn", "workload", "mode", "prompt_tokens", "output_tokens",
    "status", "hit_tokens", "sharing_fraction", "full_blocks", "cached_blocks", "infinite_hit_tokens",
    "host_hit_blocks", "blocks_allocated", "num_preemptions", "resumed_tokens", "resumed_hit_tokens",
)  # fmt: skip
BLOCK_COLUMNS = (
    "block", "parent", "depth", "accesses", "hits", "evictions", "first_access_s", "last_access_s",
    "reuse_gap_s_mean", "reuse_gap_s_max", "reuse_gap_s_min", "reuse_gap_s_median",
)  # fmt: skip


def statistics(replayed: Replayed) -> dict[str, Any]:
    """The content of a stats file; workloads also apart, if there are several."""
    names = workloads_in(replayed)
    record: dict[str, Any] = {
        "cache": dataclasses.asdict(replayed.settings),
        "metrics": measure(replayed),
        "rejected": replayed.result.rejections(),
        "per_turn": per_turn(replayed),
    }
    if len(names) > 1:
        masks = {name: of_workload(replayed, name) for name in names}
        record["workloads"] = {
            name: {"metrics": measure(replayed, mask), "rejected": replayed.result.rejections(mask)}
            for name, mask in masks.items()
        }
    return record


def write_results(
    folder: OutputFolder,
    name: str,
    replayed: Replayed,
    stats_file: str | None = None,
    intervals: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the three files of a trace called `name`; returns the statistics."""
    record = {"trace": name, **statistics(replayed), **({"intervals": intervals} if intervals else {})}
    folder.write_chosen(stats_file, f"{name}_stats.json", record)
    folder.write_csv(f"{name}_request_metrics.csv", REQUEST_COLUMNS, _request_rows(replayed))
    folder.write_csv(f"{name}_block_metrics.csv", BLOCK_COLUMNS, block_rows(replayed))
    return record


def _request_rows(replayed: Replayed) -> Iterator[tuple[object, ...]]:
    requests, trace, result = replayed.requests, replayed.trace, replayed.result
    names = [*requests.conversation_ids, ""]  # UNKNOWN is -1: the last one
    columns = [
        np.arange(len(requests)),
        trace.time_s,
        [names[i] for i in requests.conversation],
        requests.turn,
        [requests.workload_names[i] for i in requests.workload],
        [requests.mode_names[i] for i in requests.mode],
        trace.prompt_tokens,
        trace.output_tokens,
        [STATUS_NAMES[i] for i in result.status],
        result.hit_tokens,
        result.hit_tokens / trace.prompt_tokens,
        replayed.trace.prompt_blocks,
        result.cached_blocks,
        replayed.unlimited.hit_tokens,
        [None] * len(requests) if replayed.host_hits is None else replayed.host_hits,
        result.blocks_allocated,
        result.num_preemptions,
        result.resumed_tokens,
        result.resumed_hit_tokens,
    ]
    return zip(*(_plain(column) for column in columns), strict=True)


def block_rows(replayed: Replayed) -> Iterator[tuple[object, ...]]:
    """A row per block that was ever cached, with the trace's ids; the parent of a first block is -1."""
    trace, events, counts = replayed.trace, replayed.accesses, block_counts(replayed)
    if not len(events):
        return iter(())
    used = counts.keys
    depth = np.zeros(trace.num_keys, np.int64)
    depth[trace.keys] = np.arange(len(trace.keys)) - np.repeat(trace.key_ptr[:-1], np.diff(trace.key_ptr))
    evictions = np.bincount(replayed.evictions["key"], minlength=trace.num_keys)
    # Times of all accesses, block after block; each block's are times[starts:ends].
    times = trace.time_s[events["clock"][np.argsort(events["key"], kind="stable")]]
    ends = np.cumsum(counts.accesses)
    starts = ends - counts.accesses
    first, last = times[starts], times[ends - 1]
    gaps = np.diff(times, prepend=0.0)
    gaps[starts] = -np.inf  # of no access before: first of its block in ascending order
    ascending = gaps[np.lexsort((gaps, np.repeat(np.arange(len(used)), counts.accesses)))]
    num_gaps = counts.accesses - 1
    again = num_gaps > 0
    mean = (last - first) / np.maximum(num_gaps, 1)
    median = starts + -(-num_gaps // 2)  # the nearest rank
    columns = [
        used, trace.parents[used], depth[used], counts.accesses, counts.hits, evictions[used], first, last,
        _where(again, mean), *(_where(again, ascending[at]) for at in (ends - 1, starts + again, median)),
    ]  # fmt: skip
    return zip(*(_plain(column) for column in columns), strict=True)


def _where(known: NDArray[np.bool_], values: NDArray[np.float64]) -> list[float | None]:
    """The values, and None where they are unknown."""
    return [value if is_known else None for is_known, value in zip(known, values.tolist(), strict=True)]


def _plain(column: Any) -> list[object]:
    values: list[object] = column.tolist() if isinstance(column, np.ndarray) else list(column)
    return values
