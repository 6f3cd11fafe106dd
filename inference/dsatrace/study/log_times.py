"""Times of a log in seconds: dates as text, or numbers whose unit is known.

times = Times(given=None, of_layout="ms", source="log.jsonl")
times.seconds({"timestamp": 1500}, "timestamp")     # 1.5
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.rows import BadRow

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_LARGEST = 1e20
_FIRST_YEAR_S, _LAST_YEAR_S = 1e8, 1e11  # dates since 1970 lie between, in seconds; no two units overlap


class Times:
    """Seconds of a log's times: dates as text, or numbers of one unit.

    Without a unit, given or of the layout, a number must be a date since 1970, whose size tells it;
    else a `UserError` asks. A `UserError` also refuses a unit that was given for dates as text.
    """

    def __init__(self, given: str | None, of_layout: str | None, source: str) -> None:
        self.unit, self._given, self._source = given or of_layout, given, source

    def seconds(self, row: Mapping[str, Any], column: str) -> float:
        value = row.get(column)
        if value is None or value == "":
            raise BadRow("missing column", column=column)
        if isinstance(value, str):
            if self._given is not None:
                raise UserError(f"{self._source}: {column!r} holds dates, not numbers; leave out --time-unit")
            try:
                date = datetime.datetime.fromisoformat(value)
            except ValueError as error:
                raise BadRow("not a time", "give a number or an ISO date", column) from error
            return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRow("not a time", f"it is of type {type(value).__name__}", column)
        if not abs(value) < _LARGEST:
            raise BadRow("number too large", f"it is over {_LARGEST:g}", column)
        if self.unit is None:
            fitting = [u for u, s in UNITS_S.items() if _FIRST_YEAR_S <= value * s < _LAST_YEAR_S]
            if not fitting:
                raise UserError(
                    f"{self._source}: the times in {column!r} are no dates, so their unit is unclear; "
                    f"give it with --time-unit {', '.join(UNITS_S)}"
                )
            self.unit = fitting[0]
        return value * UNITS_S[self.unit]
