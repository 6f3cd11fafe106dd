"""Checks the records of a run against each other: none is missing, doubled or out of place.

A *row* is one request's records in one forward, layer 0 to the last, side by side in the file; a
forward is one or more rows. `RunOrder` checks order and completeness, and that a request took at
least as long as its steps; it keeps one row, one forward and a little of each live request. `Seams`
knows the forwards at which the run was resumed; `Sharing` checks the records of layers that use
another layer's selection. Standard library only.

    order = RunOrder(rules, requests, may_miss=0)
    sharing = Sharing(rules)
    for number, record in run.lines("trace_steps.jsonl"):
        ended = order.add(number, record)     # the request that this record ends, or None
        sharing.add(record)                   # both raise Mismatch
    order.close(whole=True)
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dsatrace.schema import REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE, value_at
from dsatrace.verify.mismatch import Mismatch, compare, located, require
from dsatrace.verify.prefixes import Prefixes
from dsatrace.verify.requests import RequestLine
from dsatrace.verify.row import Row
from dsatrace.verify.rules import Rules


class RunOrder:
    """Fed with every record in the order of the file; raises `Mismatch` naming the line."""

    def __init__(self, rules: Rules, requests: Mapping[str, RequestLine], may_miss: int | None) -> None:
        """`may_miss`: dropped steps that were counted; None when that is not known."""
        self._rules = rules
        self._requests = requests
        self._prefixes = Prefixes(rules, requests)
        self._may_miss = may_miss
        self._row: list[tuple[int, Row]] = []  # the records of the row so far, by line
        self._forward: tuple[int, Row] | None = None  # its first line and row
        self._forward_requests: set[str] = set()
        self._seams = Seams(rules.resumed_at_forward)
        self.num_forwards_in_last_part = 0  # since the run was last resumed
        self._live: dict[str, _Live] = {}
        self._ended: set[str] = set()
        self._num_missing = 0
        self._line = 0

    def add(self, line: int, record: Mapping[str, Any]) -> str | None:
        """Takes the next record; returns its request id if it is the request's last."""
        self._line = line
        expected = self._rules.selections.sets[len(self._row)]
        for name, derived in (("layer_id", expected.layer), ("kv_head", expected.head)):
            if record.get(name) != derived:
                self.check_row()
                what = f"stored {record.get(name)}, derived {derived}: a record before it is missing, "
                raise Mismatch(name, what + "stands twice or lies elsewhere").at(STEPS_FILE, line, record)
        self._row.append((line, Row.of(record)))
        if len(self._row) < self._rules.num_layers:
            return None
        self.check_row()
        first, row = self._row[0]
        self._row = []
        return self.add_row(first, row)

    def add_row(self, line: int, row: Row) -> str | None:
        """The same for a whole row from `line` on, whose records agree with each other."""
        self._line = line + self._rules.num_layers - 1
        try:
            self._add_to_forward(line, row)
            return self._add_to_request(line, row)
        except Mismatch as mismatch:
            raise mismatch.at(STEPS_FILE, line, row._asdict() | {"layer_id": 0}) from None

    @property
    def is_within_row(self) -> bool:
        """Whether layers of the last row are still missing."""
        return bool(self._row)

    def check_row(self) -> None:
        """Names the first record of the row so far that differs from most of the others."""
        rows = [row for _, row in self._row]
        if len(set(rows)) <= 1:
            return
        usual = Row(*(Counter(values).most_common(1)[0][0] for values in zip(*rows, strict=True)))
        for layer, (line, row) in enumerate(self._row):
            for name, stored, other in zip(Row._fields, row, usual, strict=True):
                if stored != other:
                    what = f"stored {stored!r}, {other!r} in the other layers of its step"
                    record = row._asdict() | {"layer_id": layer}
                    raise Mismatch(_PATHS.get(name, name), what).at(STEPS_FILE, line, record)

    def close(self, whole: bool) -> None:
        """Call after the last record. `whole`: the run is complete, so nothing may be missing."""
        self.check_row()
        if not whole:
            return
        if self._row:
            what = f"the file ends after layer {len(self._row) - 1} of {self._rules.num_layers}"
            raise Mismatch("layer_id", what).at(STEPS_FILE, self._line, self._row[-1][1]._asdict())
        self._check_forward_is_whole()
        for request_id, live in self._live.items():
            if request_id not in self._requests:
                raise Mismatch("request_id", f"{request_id!r} has records and no line").at(REQUESTS_FILE)
            self._check_nothing_is_left(request_id, live)
        for request_id in self._requests.keys() - self._live.keys() - self._ended:
            self._check_nothing_is_left(request_id, None)
        if "prefix" in self._rules.selections.tells:
            self._prefixes.close()
        self._seams.enter(self._seams.last_part, len(self._live) + len(self._ended))
        if worst := self._seams.worst(len(self._requests)):
            line, num_cut = worst
            what = f"{num_cut} requests are missing from the forward, more than were served after the resume"
            raise Mismatch(_PATHS["batch_size"], what).at(STEPS_FILE, line)
        if self._seams.last_part:
            return  # a dropped forward may have been of requests that were served again
        everything_known = all(known.has_ended for known in self._requests.values())
        if everything_known and self._may_miss is not None and self._may_miss > self._num_missing:
            what = f"stored {self._may_miss}, but only {self._num_missing} steps of requests are missing"
            raise Mismatch("dropped_steps", what).at(SUMMARY_FILE)

    def _add_to_forward(self, line: int, row: Row) -> None:
        if self._forward is None or row.forward_idx != self._forward[1].forward_idx:
            if self._forward is not None:
                before = self._forward[1].forward_idx
                require(row.forward_idx > before, "forward_idx", row.forward_idx, f"after {before}")
                self._check_forward_is_whole()
            part = self._seams.part_of(row.forward_idx)
            self._seams.enter(part, len(self._live) + len(self._ended))
            self.num_forwards_in_last_part += part == self._seams.last_part
            self._forward = (line, row)
            self._forward_requests = {row.request_id}
            return
        for name in _OF_A_FORWARD:
            stored, other = getattr(row, name), getattr(self._forward[1], name)
            rule = f"{other!r} in the same forward from line {self._forward[0]}"
            require(stored == other, _PATHS.get(name, name), stored, rule)
        is_new = row.request_id not in self._forward_requests
        of_prompt = self._rules.whole_prompt and row.phase == "prefill"  # a row per position
        require(is_new or of_prompt, "request_id", row.request_id, "stands twice")
        self._forward_requests.add(row.request_id)

    def _check_forward_is_whole(self) -> None:
        """Every request of a decode forward is recorded, unless steps are sampled or a resume cut it."""
        if self._forward is None:
            return
        line, row = self._forward
        found = len(self._forward_requests)
        whole = row.phase == "decode" and self._rules.sample_rate >= 1
        if row.batch_size is None:
            return
        part, num_cut = self._seams.part_of(row.forward_idx), row.batch_size - found
        if num_cut < 0 or (whole and num_cut and not self._seams.excuse(part, num_cut, line)):
            with located(STEPS_FILE, line, row._asdict() | {"layer_id": 0}):
                compare(row.batch_size, found, _PATHS["batch_size"])

    def _add_to_request(self, line: int, row: Row) -> str | None:
        known = self._requests.get(row.request_id)
        require(row.request_id not in self._ended, "step_idx", row.step_idx, "after the request's last step")
        self._check_step(row)
        live = self._live.get(row.request_id)
        prompt_tokens = row.seq_len_current - row.step_idx - 1
        if live is None:
            expected = prompt_tokens if known is None else known.num_prompt_tokens
            live = self._live[row.request_id] = _Live(row, expected)
            first = self._rules.first_prompt_step(expected)
            num_missing = self._count_sampled(first, row.step_idx, expected)
            is_new = True
        else:
            before = live.row
            require(row.step_idx > before.step_idx, "step_idx", row.step_idx, f"after {before.step_idx}")
            in_one_part = self._seams.part_of(before.forward_idx) == self._seams.part_of(row.forward_idx)
            rule = "but the request has records from before the resume in between"
            require(in_one_part, "forward_idx", row.forward_idx, rule)
            forwards = row.forward_idx - before.forward_idx
            rule = f"{forwards} forwards after step {before.step_idx}"
            most = max(before.step_idx, -1) + forwards
            require(row.step_idx < 0 or row.step_idx <= most, "step_idx", row.step_idx, rule)
            for name in ("cached_blocks", "prefix_key", "needle_tokens"):
                compare(getattr(row, name), getattr(before, name), _PATHS[name])
            num_missing = self._count_sampled(before.step_idx + 1, row.step_idx, live.prompt_tokens)
            live.row = row
            is_new = False
        compare(row.seq_len_current, live.prompt_tokens + row.step_idx + 1, "seq_len_current")
        most = live.prompt_tokens // self._rules.block_size
        require(row.cached_blocks <= most, _PATHS["cached_blocks"], row.cached_blocks, f"at most {most}")
        if self._rules.prefix_cache and known is not None and known.state != "unfinished":
            num_hit = (known.prefix_hit_tokens or 0) // self._rules.block_size
            compare(row.cached_blocks, num_hit, _PATHS["cached_blocks"])
        if is_new and "prefix" in self._rules.selections.tells:
            self._prefixes.add(line, row, live.prompt_tokens)
        if row.step_idx >= 0:
            live.decode_us += row.step_wall_us or 0
        live.num_missing += num_missing
        self._num_missing += num_missing
        self._check_missing("step_idx", row.step_idx, live.num_missing)
        if known is not None and known.has_ended and not self._num_left(row.step_idx, known):
            self._check_time(row.request_id, known, live)
            self._ended.add(row.request_id)
            del self._live[row.request_id]
            return row.request_id
        return None

    def _check_step(self, row: Row) -> None:
        """Checks one step of a request: its phase, its sampling, its place before the request ends."""
        if row.step_idx < 0:
            require(self._rules.prefill, "step_idx", row.step_idx, "but the manifest records no prefill")
        of_a_step = "layerwise" if self._rules.selections.door == "layerwise" else "decode"
        compare(row.phase, "prefill" if row.step_idx < 0 else of_a_step, "phase")
        known = self._requests.get(row.request_id)
        last = known.last_step if known else None
        if last is not None:
            require(row.step_idx <= last, "step_idx", row.step_idx, f"after the request's last step, {last}")
        sampled = row.step_idx < 0 or self._rules.is_sampled(row.step_idx)
        require(sampled, "step_idx", row.step_idx, "a step that the sampling leaves out")

    def _count_sampled(self, start: int, end: int, prompt_tokens: int) -> int:
        """Steps in [start, end) that should be recorded: those that have anything to select from."""
        if self._rules.sample_rate <= 0:
            end = min(end, 0)
        start = max(start, self._rules.selections.least_visible - prompt_tokens - 1)
        return sum(step < 0 or self._rules.is_sampled(step) for step in range(start, end))

    def _num_left(self, step_idx: int, known: RequestLine) -> int:
        assert known.last_step is not None
        return self._count_sampled(step_idx + 1, known.last_step + 1, known.num_prompt_tokens)

    def _check_missing(self, field: str, stored: object, num_missing: int) -> None:
        if self._may_miss is not None and num_missing > self._may_miss:
            what = f"{num_missing} sampled steps of the request are missing, {self._may_miss} were dropped"
            raise Mismatch(field, f"stored {stored!r}: {what}")

    def _check_time(self, request_id: str, known: RequestLine, live: _Live) -> None:
        """On a wall clock, steps one after the other lie between a request's first token and its last."""
        if known.decode_s is None or self._rules.is_virtual:
            return
        least_s = live.decode_us / 1e6
        rule = f"{known.decode_s} s after its first token, and its recorded steps took {least_s:.6f} s"
        with located(REQUESTS_FILE, known.line, {"request_id": request_id}):
            require(known.decode_s >= least_s - _ROUNDING_S, "finish_s", known.finish_s, rule)

    def _check_nothing_is_left(self, request_id: str, live: _Live | None) -> None:
        known = self._requests[request_id]
        if not known.has_ended:
            return
        first = self._rules.first_prompt_step(known.num_prompt_tokens)
        before = live.row.step_idx if live else first - 1
        num_left = self._num_left(before, known)
        self._num_missing += num_left
        num_missing = num_left + (live.num_missing if live else 0)
        if live:
            self._check_time(request_id, known, live)
        with located(REQUESTS_FILE, known.line, {"request_id": request_id}):
            self._check_missing("num_output_tokens", known.num_output_tokens, num_missing)


_PATHS = {
    "cached_blocks": "prefix.prefix_cached_blocks",
    "prefix_key": "prefix.prefix_key",
    "needle_tokens": "needle.tokens",
    "batch_size": "kv_fetch.hbm.batch_size",
}
_ROUNDING_S = 2e-6
"""Times may have been rounded to whole microseconds."""
_OF_A_FORWARD = ("phase", "batch_size", "step_wall_us", "step_synced")


@dataclasses.dataclass
class _Live:
    """A request that may get more records."""

    row: Row
    prompt_tokens: int
    num_missing: int = 0
    decode_us: float = 0.0  # of its recorded decode steps


class Seams:
    """The forwards at which a run was resumed: requests under way there may be missing from the records.

    Fed in the order of the file.
    """

    def __init__(self, resumed_at_forward: Sequence[int]) -> None:
        self._forwards = resumed_at_forward
        self._part = 0
        self._num_cut: dict[int, tuple[int, int]] = {}  # part -> most requests cut from a forward, its line
        self._num_seen: dict[int, int] = {}  # part -> requests with records when it had ended

    @property
    def last_part(self) -> int:
        return len(self._forwards)

    def part_of(self, forward_idx: int) -> int:
        """The run's part, 0-based, that the forward belongs to."""
        return bisect.bisect_right(self._forwards, forward_idx)

    def excuse(self, part: int, num_cut: int, line: int) -> bool:
        """Whether `num_cut` requests may be missing from a forward; `worst` decides at the end."""
        if part == self.last_part:
            return False
        self._num_cut[part] = max(self._num_cut.get(part, (0, 0)), (num_cut, line))
        return True

    def enter(self, part: int, num_seen: int) -> None:
        """The next record is in `part`; `num_seen` requests have had records so far."""
        for ended in range(self._part, part):
            self._num_seen[ended] = num_seen
        self._part = max(self._part, part)

    def worst(self, num_requests: int) -> tuple[int, int] | None:
        """(line, missing requests) of a forward that lacks more requests than were served after it."""
        for part, (num_cut, line) in self._num_cut.items():
            if num_cut > num_requests - self._num_seen.get(part, num_requests):
                return line, num_cut
        return None


_OF_A_SELECTION = (
    *("selected_token_pos", "unique_token_pos_count", "offset_min", "offset_p50", "offset_max"),
    *("selected_ids", "num_selected_ids"),
    *("selected_block_ids", "unique_blocks", "tokens_per_touched_block"),
    *("prefix.intersection_ratio", "prefix.intersection_blocks"),
    *("scores_stats", "scores_topk", "kth_margin", "needle"),
)
"""Fields that are equal in all layers that use one selection; absent at some levels."""


class Sharing:
    """Compares the record of a layer without an indexer with that of the layer whose selection it uses.

    Fed with every record that `RunOrder` has taken, so a layer comes after its source.
    """

    def __init__(self, rules: Rules) -> None:
        # With tiers, each layer may be served differently.
        reads = ("kv_fetch.hbm.read_ops",) if rules.tiers is None else ()
        self._alike = (*_OF_A_SELECTION, *reads)
        self._source_layers = rules.source_layers
        self._sources = frozenset(rules.source_layers.values())
        self._records: dict[tuple[int, Any], Mapping[str, Any]] = {}  # of the sources, in the row under way

    def add(self, record: Mapping[str, Any]) -> None:
        """Raises `Mismatch` naming the field that differs from the source's."""
        layer, head = record["layer_id"], record.get("kv_head")
        if layer in self._sources:
            self._records[layer, head] = record
        source = self._source_layers.get(layer)
        if source is None:
            return
        for path in self._alike:
            try:
                compare(value_at(record, path), value_at(self._records[source, head], path), path)
            except Mismatch as mismatch:
                what = f"as in layer {source}, whose selection layer {layer} uses"
                raise Mismatch(mismatch.field, f"{mismatch.what} {what}") from None
