"""Where a run was resumed, and what that excuses.

A resume cuts the records of requests it serves again, so a forward from before it may hold
fewer requests than were in it; nothing else may. Standard library only, knows no record.

    seams = Seams((812,))
    seams.part_of(forward_idx=811)           # 0, before the resume
    seams.excuse(part=0, num_cut=2, line=40)
    seams.enter(part=1, num_seen=7)
    seams.worst(num_requests=8)              # (40, 2): one request was left that it could have been
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


class Seams:
    """Fed in the order of the file."""

    def __init__(self, resumed_at_forward: Sequence[int]) -> None:
        self._forwards = resumed_at_forward
        self._part = 0
        self._num_cut: dict[int, tuple[int, int]] = {}  # part -> most requests cut from a forward, its line
        self._num_seen: dict[int, int] = {}  # part -> requests with records when it had ended

    @property
    def last_part(self) -> int:
        return len(self._forwards)

    def part_of(self, forward_idx: int) -> int:
        """0-based part of the run that the forward belongs to."""
        return bisect.bisect_right(self._forwards, forward_idx)

    def excuse(self, part: int, num_cut: int, line: int) -> bool:
        """Whether so many requests may be missing from a forward; `worst` has the last word."""
        if part == self.last_part:
            return False
        self._num_cut[part] = max(self._num_cut.get(part, (0, 0)), (num_cut, line))
        return True

    def enter(self, part: int, num_seen: int) -> None:
        """The next record lies in `part`; `num_seen` requests have records by now."""
        for ended in range(self._part, part):
            self._num_seen[ended] = num_seen
        self._part = max(self._part, part)

    def worst(self, num_requests: int) -> tuple[int, int] | None:
        """(line, requests missing) of a forward that misses more than were served later, of all the run's."""
        for part, (num_cut, line) in self._num_cut.items():
            if num_cut > num_requests - self._num_seen.get(part, num_requests):
                return line, num_cut
        return None
