"""A third derivation, in numpy, for the many records that are right: ten times faster than the plain one.

It only says "right" or "look again": the plain implementation then names the field, or finds
the record right after all. The first and last record of every request, and a sample of the
others, go through the plain implementation in any case. Takes a *chunk* at a time, a part of
the steps file that holds whole forwards, so that several processes can share a run; shares
`schema.py` with the writer and nothing else.

    checks = ChunkChecks(JsonSteps(path), rules, requests, block_sizes=(16, 32, 64), since_forward=0)
    for chunk, found in checked_chunks(checks, jobs=2):      # None: look again
        totals.merge(found.totals)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from dsatrace.schema import STEP_FIELDS, nearest_rank, problems
from dsatrace.verify.check_record import check_given, check_record
from dsatrace.verify.check_tiers import BatchTimes, TierTotals, check_fetches
from dsatrace.verify.chosen import Chosen, FastSelected, integers, num_runs
from dsatrace.verify.fast_summary import FastSummary
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.order import Sharing
from dsatrace.verify.plain_record import fetch_from_hbm
from dsatrace.verify.requests import RequestLine, answers
from dsatrace.verify.row import Row
from dsatrace.verify.rules import Rules

if TYPE_CHECKING:
    from dsatrace.verify.parquet_steps import ParquetSteps

Record = Mapping[str, Any]
CHUNK_BYTES = 16 << 20
SAMPLE = 97
"""Every so many records one is derived by the plain implementation too."""
_READ_BYTES = 1 << 20
_MAX_SHAPES = 4096
_INTEGERS = ("selected_token_pos", "selected_block_ids", "intersection_blocks")
LOOK_AGAIN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
    struct.error,
)
"""What a malformed record makes the fast derivation raise; the plain one says it in words."""


Chunk = tuple[int, int]
"""From and up to but without, in bytes of JSON lines or rows of Parquet: whole forwards."""


@dataclasses.dataclass
class Checked:
    """A chunk whose records are right, each by itself."""

    num_lines: int
    rows: list[tuple[int, int, Row]]  # line from the chunk's first, place, row
    totals: FastSummary
    moved: TierTotals


class JsonSteps:
    """`trace_steps.jsonl`: a place is a byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = path.stat().st_size

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Parts of about `size` bytes; the last ends with the file, even within a line."""
        start = 0
        with self.path.open("rb") as file:
            while start < self.num_bytes:
                file.seek(start + size)
                file.readline()  # the rest of a line
                forward = None
                end = file.tell()
                while line := file.readline():
                    this = _forward_of(line)
                    if forward is not None and this is not None and this != forward:
                        break
                    forward, end = this, file.tell()
                else:
                    end = self.num_bytes
                yield start, min(end, self.num_bytes)
                start = end

    def records(self, chunk: Chunk) -> Iterator[tuple[int, Record]]:
        """(place, record); raises what JSON that is none raises."""
        at, end = chunk
        with self.path.open("rb", buffering=_READ_BYTES) as file:
            file.seek(at)
            while at < end:
                line = file.readline()
                yield at, orjson.loads(line)
                at += len(line)
        if at != end:
            raise ValueError("the chunk ends within a line")

    def bytes_of(self, chunk: Chunk) -> int:
        return chunk[1] - chunk[0]


def _forward_of(line: bytes) -> object:
    try:
        return orjson.loads(line).get("forward_idx")
    except (ValueError, AttributeError):
        return None


class ChunkChecks:
    """Checks chunks of one run, each by itself."""

    def __init__(
        self,
        steps: JsonSteps | ParquetSteps,
        rules: Rules,
        requests: Mapping[str, RequestLine],
        block_sizes: Sequence[int],
        since_forward: int,
    ) -> None:
        self.steps = steps
        self.rules = rules
        self._needles = {name: known.needle_positions for name, known in requests.items()}
        self._new_totals = functools.partial(FastSummary, rules, block_sizes, answers(requests))
        self._new_moved = functools.partial(TierTotals, rules, since_forward)
        self._shapes: set[Any] = set()
        self._first_step = rules.first_step
        # The steps of each request that go the plain way, whatever is found.
        self._ends = {
            name: (self._first_step, rules.first_prompt_step(known.num_prompt_tokens), known.last_step)
            for name, known in requests.items()
        }
        kind = rules.selections
        self._sets = {one.layer: one for one in kind.sets}
        self._layers = tuple(self._sets)
        self._unknown = {field.name for field in kind.fields if field.type == "null"}
        self._absent = {
            field.name for field in STEP_FIELDS if field.is_absent and not kind.tells.issuperset(field.needs)
        }

    def check(self, chunk: Chunk) -> Checked | None:
        """What the chunk adds up to; None where a record is wrong or the chunk does not hold whole rows."""
        try:
            return self._check(chunk)
        except (Mismatch, *LOOK_AGAIN):
            return None

    def _check(self, chunk: Chunk) -> Checked:
        totals, moved = self._new_totals(), self._new_moved()
        times, sharing = BatchTimes(), Sharing(self.rules)
        rows: list[tuple[int, int, Row]] = []
        num_lines = at = 0  # of the layers that select
        for place, record in self.steps.records(chunk):
            row = Row.of(record)
            if at == 0:
                rows.append((num_lines, place, row))
            if record["layer_id"] != self._layers[at] or row != rows[-1][2]:
                raise ValueError("not whole rows")
            chosen = self._chosen(record, num_lines)
            times.add(num_lines, record)
            sharing.add(record)
            totals.add(record, chosen)
            moved.add(record)
            num_lines += 1
            at = (at + 1) % len(self._layers)
        if at:
            raise ValueError("not whole rows")
        return Checked(num_lines, rows, totals, moved)

    def _chosen(self, record: Record, line: int) -> Chosen | None:
        """The selection of a record that is right; raises where it may be wrong. None below level full."""
        chosen = self.derive(record)
        ends = self._ends.get(record["request_id"], (self._first_step,))
        if chosen is None or record["step_idx"] in ends or line % SAMPLE == 0:
            check_record(record, self.rules, self._needles)
        return chosen

    def derive(self, record: Record) -> Chosen | None:
        """The selection with which the record agrees; None where the plain derivation must look."""
        rules = self.rules
        its_set = self._sets.get(record["layer_id"])
        if rules.level != "full" or its_set is None or not self._has_schema(record):
            return None
        check_given(record, rules)
        seq_len, size, latent = record["seq_len_current"], rules.block_size, rules.latent_bytes
        ascending = integers(record["selected_token_pos"])
        if rules.keep_order:
            if not _is_by_score(ascending, record.get("scores_topk")):
                return None
            ascending = np.sort(ascending)
        count, most = len(ascending), min(its_set.top_k, seq_len)
        is_set = count == most if rules.selections.is_engines else 1 <= count <= most
        is_set = is_set and bool((ascending[1:] > ascending[:-1]).all())
        if not is_set or ascending[0] < 0 or ascending[-1] >= seq_len:
            return None
        is_sparse = seq_len > its_set.top_k
        if not is_sparse and record["kth_margin"] is not None:
            return None
        chosen = Chosen.of(ascending, size)
        _, blocks, in_block = chosen
        num_blocks = len(blocks)
        missing = max((int(blocks[-1]) + 1) * size - seq_len, 0)
        up_to = np.bincount(in_block).cumsum()  # up_to[n]: blocks with at most n tokens
        scanned = 0 if record["layer_id"] in rules.source_layers else seq_len
        derived = {
            "event": "dsa_topk",
            "unique_token_pos_count": count,
            "offset_min": seq_len - 1 - int(ascending[-1]),
            "offset_p50": seq_len - 1 - int(ascending[count - 1 - nearest_rank(count, 50)]),
            "offset_max": seq_len - 1 - int(ascending[0]),
            "block_size_tokens": size,
            "unique_blocks": num_blocks,
            "tokens_per_touched_block": {
                "mean": count / num_blocks,
                "p50": int(np.searchsorted(up_to, nearest_rank(num_blocks, 50), side="right")),
                "p95": int(np.searchsorted(up_to, nearest_rank(num_blocks, 95), side="right")),
            },
            "path": "sparse" if is_sparse else "dense",
            "indexer_scan": {"tokens": scanned, "bytes_read": scanned * rules.index_bytes},
        }
        if rules.tiers is None and "kv_fetch" not in self._unknown:
            derived["kv_fetch"] = fetch_from_hbm(
                hit_blocks=num_blocks,
                bytes_read=(num_blocks * size - missing) * latent,
                read_ops=num_runs(blocks),
                batch_size=record["kv_fetch"]["hbm"]["batch_size"],
                bytes_useful=count * latent,
            )
        agrees = (
            all(record[name] == value for name, value in derived.items() if name not in self._unknown)
            and ("prefix" in self._unknown or _has_prefix(record["prefix"], blocks))
            and _are_equal(integers(record["selected_block_ids"]), blocks)
            and self._has_needle(record, ascending)
        )
        if agrees and rules.tiers is not None:
            selected = FastSelected(
                num_tokens=count,
                num_blocks=num_blocks,
                block_size=size,
                latent_bytes=latent,
                missing=missing,
                positions=None,
                blocks=None,
                chosen=chosen,
            )
            check_fetches(record, selected, rules.tiers)
        return chosen if agrees else None

    def _has_schema(self, record: Record) -> bool:
        """The schema's table judges nothing but names, their order and types: the record's shape."""
        shape = _shape(record)
        if shape not in self._shapes:
            fields = self.rules.selections.fields
            is_wrong = problems(record, self.rules.level, fields) or not self._absent.isdisjoint(record)
            if is_wrong or len(self._shapes) >= _MAX_SHAPES:
                return False
            self._shapes.add(shape)
        return True

    def _has_needle(self, record: Record, ascending: np.ndarray) -> bool:
        known, stored = self._needles.get(record["request_id"]), record.get("needle")
        if not known:  # of a request that is not known, only the plain derivation knows what is possible
            return stored is None
        places = np.minimum(np.searchsorted(ascending, known), len(ascending) - 1)
        selected = int(np.count_nonzero(ascending[places] == np.array(known)))
        return stored == {"tokens": len(known), "selected": selected}


def _shape(value: Record) -> Any:
    """Names and types, down to the items of lists, but for those that `integers` reads."""
    inner = [
        _shape(held) if type(held) is dict else frozenset(map(type, held))
        for name, held in value.items()
        if type(held) is dict or (type(held) is list and name not in _INTEGERS)
    ]
    return tuple(value), tuple(map(type, value.values())), *inner


def _has_prefix(stored: Record, blocks: np.ndarray) -> bool:
    cached = stored["prefix_cached_blocks"]
    num_shared = int(np.searchsorted(blocks, cached))
    derived = {"prefix_cache_hit": cached > 0, "intersection_ratio": num_shared / len(blocks)}
    return all(stored[name] == value for name, value in derived.items()) and _are_equal(
        integers(stored["intersection_blocks"]), blocks[:num_shared]
    )


def _are_equal(left: np.ndarray, right: np.ndarray) -> bool:
    return len(left) == len(right) and bool((left == right).all())


def _is_by_score(positions: np.ndarray, stored: list[float] | None) -> bool:
    """Score descending, then position ascending."""
    if stored is None or len(stored) != len(positions):
        return False
    scores = np.array(stored, dtype=np.float64)
    falls, equal = scores[1:] < scores[:-1], scores[1:] == scores[:-1]
    return bool((falls | equal & (positions[1:] > positions[:-1])).all())


def checked_chunks(checks: ChunkChecks, jobs: int) -> Iterator[tuple[Chunk, Checked | None]]:
    """Every chunk in the order of the file, checked by `jobs` processes."""
    parts = checks.steps.chunks(CHUNK_BYTES)
    if jobs <= 1 or checks.steps.num_bytes <= CHUNK_BYTES:
        for chunk in parts:
            yield chunk, checks.check(chunk)
        return
    context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork would break
    with concurrent.futures.ProcessPoolExecutor(jobs - 1, context, _start_worker, (checks,)) as pool:
        under_way = deque[tuple[Chunk, concurrent.futures.Future[Checked | None]]]()
        try:
            for chunk in parts:
                if sum(not found.done() for _, found in under_way) < jobs:  # each works, and one waits
                    under_way.append((chunk, pool.submit(_check_in_worker, chunk)))
                else:  # this process is one of them
                    under_way.append((chunk, concurrent.futures.Future()))
                    under_way[-1][1].set_result(checks.check(chunk))
                while under_way and (under_way[0][1].done() or len(under_way) > 2 * jobs):
                    first, found = under_way.popleft()
                    yield first, found.result()
            for first, found in under_way:
                yield first, found.result()
        finally:
            pool.shutdown(cancel_futures=True)


_IN_WORKER: list[ChunkChecks] = []
"""The run's, in a worker process: it is sent once and not with every chunk."""


def _start_worker(checks: ChunkChecks) -> None:
    _IN_WORKER.append(checks)


def _check_in_worker(chunk: Chunk) -> Checked | None:
    return _IN_WORKER[-1].check(chunk)
