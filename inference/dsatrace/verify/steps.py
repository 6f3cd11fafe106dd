"""Walks the step records of a run: plainly, record by record, or in chunks that several processes share.

What is found, and the words for it, are the same either way: a chunk that the fast derivation does not
find right is walked again by the plain implementation, which names the record and the field.

    steps = StepChecks(run, rules, requests, order, block_sizes=(16, 32, 64), since_forward=0)
    steps.check_in_chunks(2, on_bytes=None)           # raises Mismatch
    steps.totals.to_json(lines)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from dsatrace.schema import STEPS_FILE
from dsatrace.verify.check_record import check_record
from dsatrace.verify.check_tiers import BatchTimes, TierTotals
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch, located
from dsatrace.verify.order import RunOrder, Sharing
from dsatrace.verify.plain_summary import PlainSummary
from dsatrace.verify.requests import RequestLine, answers
from dsatrace.verify.rules import Rules


class StepChecks:
    """Every record of a run by itself, their order, and what they add up to: `totals` and `moved`."""

    def __init__(
        self,
        run: PlainRun,
        rules: Rules,
        requests: Mapping[str, RequestLine],
        order: RunOrder,
        block_sizes: Sequence[int],
        since_forward: int,
    ) -> None:
        self._run, self._rules, self._requests, self._order = run, rules, requests, order
        self._needles = {name: known.needle_positions for name, known in requests.items()}
        self._block_sizes, self._since_forward = block_sizes, since_forward
        self._times, self._sharing = BatchTimes(), Sharing(rules)
        self.moved = TierTotals(rules, since_forward)
        self._last_rows: dict[str, tuple[int, int]] = {}  # of live requests, not walked plainly: line, place
        self.totals: PlainSummary

    def check_plainly(self, on_bytes: Callable[[int], object] | None) -> None:
        """Record by record, with the standard library."""
        rules = self._rules
        self.totals = PlainSummary(
            top_k=rules.top_k,
            block_sizes=self._block_sizes,
            level=rules.level,
            offloaded=rules.tiers is not None,
            kind=rules.selections,
            answers=answers(self._requests),
        )
        self._walk(on_bytes, (0, None), first_line=1)

    def _walk(
        self, on_bytes: Callable[[int], object] | None, part: tuple[int, int | None], first_line: int
    ) -> int:
        """The records of a part, plainly; returns the number of the next line."""
        line = first_line - 1
        for line, record in self._run.steps(on_bytes, part, first_line):
            try:
                check_record(record, self._rules, self._needles)
                self._times.add(line, record)
            except Mismatch as mismatch:
                self._order.check_row()  # an earlier record of the same step may be the first bad one
                raise mismatch.at(STEPS_FILE, line, record) from None
            with located(STEPS_FILE, line, record):
                ended = self._order.add(line, record)  # names the place itself, which may be an earlier line
                self._sharing.add(record)
            self.totals.add(record)
            self.moved.add(record)
            self._last_rows.pop(record["request_id"], None)
            if ended is not None:
                self.totals.end_request(ended)
        return line + 1

    def check_in_chunks(self, jobs: int, on_bytes: Callable[[int], object] | None) -> None:
        """Chunk by chunk in numpy, and plainly where a chunk is not found right."""
        from dsatrace.verify.fast import ChunkChecks, JsonSteps, checked_chunks
        from dsatrace.verify.fast_summary import FastSummary

        if self._run.parquet_steps is None and not self._run.size(STEPS_FILE):
            self.check_plainly(on_bytes)
            return
        steps = self._run.parquet_steps or JsonSteps(self._run.folder / STEPS_FILE)
        self.totals = FastSummary(self._rules, self._block_sizes, answers(self._requests))
        checks = ChunkChecks(steps, self._rules, self._requests, self._block_sizes, self._since_forward)
        line = 1
        for chunk, found in checked_chunks(checks, jobs):
            if found is None or self._order.is_within_row:
                line = self._walk(on_bytes, chunk, line)
                continue
            self.totals.merge(found.totals)
            self.moved.merge(found.moved)
            for number, place, row in found.rows:
                self._last_rows[row.request_id] = (line + number, place)
                ended = self._order.add_row(line + number, row)
                if ended is not None:
                    self.totals.end_request(ended)
                    del self._last_rows[ended]
            line += found.num_lines
            if on_bytes:
                on_bytes(steps.bytes_of(chunk))
        # The last records of the others are known only now.
        for number, place in self._last_rows.values():
            from_there = self._run.steps(part=(place, None), first_line=number)
            for at, record in itertools.islice(from_there, self._rules.num_layers):
                with located(STEPS_FILE, at, record):
                    check_record(record, self._rules, self._needles)
