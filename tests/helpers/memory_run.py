"""A run's folder of which parts are replaced in memory: verified again in a fraction of the time.

What is not replaced was found right before, so only what is new goes through `check_record`, which
knows one record alone; order, totals and everything else see the whole run. Every so often the parts
are written and verified the whole way, and that must say the same.

    run = MemoryRun(write_golden(tmp_path / "run"))
    run.found(records=[*run.records[:3], bad, *run.records[4:]])     # "trace_steps.jsonl line 4 ...", or ""
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from dsatrace.errors import UserError
from dsatrace.schema import REQUESTS_FILE, STEPS_FILE, SUMMARY_FILE
from dsatrace.verify import run as verify_run
from dsatrace.verify import steps
from dsatrace.verify.check_record import check_record
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.rules import Rules
from helpers.damage import overwrite
from helpers.golden_run import read_lines, write_lines

Record = dict[str, Any]
WHOLE_WAY = 41
"""Every so many times one is verified from files as well."""


class MemoryRun(PlainRun):
    """The run must be right as it lies in the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: list[dict[str, Any]] = read_lines(folder)
        self.said: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
        self.num_whole_way = 0
        self._num_found = 0
        self._now: tuple[Sequence[Record], Any] = self.records, self.said
        self._right = set(map(id, self.records))
        self._rules = Rules.of(self.manifest)
        requests = read_lines(folder, REQUESTS_FILE)
        self._needles = {line["request_id"]: tuple(line.get("needle_positions", ())) for line in requests}
        verify_run.verify(folder)

    def summary(self) -> Any:
        return self._now[1]

    def steps(
        self,
        on_bytes: Callable[[int], object] | None = None,
        part: tuple[int, int | None] = (0, None),
        first_line: int = 1,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._now[0], 1)

    def found(self, *, records: Sequence[Record] | None = None, summary: Any = None) -> str:
        """What verify says of the run with these records or this summary; "" if it is right."""
        self._now = self.records if records is None else records, self.said if summary is None else summary
        with mock.patch.object(steps, "check_record", self._check_new):
            said = _said(lambda: verify_run._verify(self, None, 1, plain=True))
        self._compare_with_the_whole_way(said)
        return said

    def found_in(self, i: int, record: Record) -> str:
        """The same with another record in the place of `records[i]`.

        Those before it are right by themselves and in their order, so what `check_record` finds is it.
        """
        records = [*self.records[:i], record, *self.records[i + 1 :]]
        try:
            check_record(record, self._rules, self._needles)
        except Mismatch as mismatch:
            said = str(mismatch.at(STEPS_FILE, i + 1, record))
            self._now = records, self.said
            self._compare_with_the_whole_way(said)
            return said
        return self.found(records=records)

    def _check_new(self, record: Record, *others: Any) -> None:
        if id(record) not in self._right:
            check_record(record, *others)

    def _compare_with_the_whole_way(self, said: str) -> None:
        self._num_found += 1
        if self._num_found % WHOLE_WAY == 1:
            self.num_whole_way += 1
            assert self._said_the_whole_way() == said

    def _said_the_whole_way(self) -> str:
        path = self.folder / SUMMARY_FILE
        before = (self.folder / STEPS_FILE).read_bytes(), path.read_bytes()
        try:
            write_lines(self.folder, self._now[0])
            overwrite(path, json.dumps(self._now[1]).encode())
            return _said(lambda: verify_run.verify(self.folder))
        finally:
            overwrite(self.folder / STEPS_FILE, before[0])
            overwrite(path, before[1])


def _said(verify: Callable[[], object]) -> str:
    """Anything else than what verify may raise goes through."""
    try:
        verify()
    except (Mismatch, UserError) as found:
        return str(found)
    return ""
