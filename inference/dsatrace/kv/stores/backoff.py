"""When a store that hangs is asked again: after a pause that grows with every batch it leaves unanswered.

A batch that waits in vain costs the whole time limit, and there are many of them: each request that is
computed again has several. In a pause its batches fail at once instead. The first answer ends it.

    backoff = Backoff(timeout_s=5.0)
    backoff.check()                 # raises `StoreError`, kind hanging, in a pause
    backoff.timed_out(error)        # the next pause begins; the first one is told on stderr
    backoff.answered()
"""

from __future__ import annotations

import sys
import time

from dsatrace.kv.stores.interface import StoreError

FIRST, GROWTH, MOST_S = 1 / 8, 4.0, 60.0
"""The first pause as a share of the time limit: above 0, so that what a failed step has left to clean up
does not wait, too; short, so that one slow answer fails no request that is computed again."""


class Backoff:
    """The pauses of one store. Used by one thread at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._first_s = timeout_s * FIRST
        self._pause_s = 0.0
        self._until = 0.0  # by time.monotonic
        self._cause = ""
        self._was_told = False

    def check(self) -> None:
        """Raises `StoreError` while the store is not to be asked."""
        left_s = self._until - time.monotonic()
        if left_s > 0:
            raise StoreError("hanging", f"{self._cause}; it is asked again in {left_s:.2g} s")

    def timed_out(self, error: StoreError) -> None:
        """The store did not answer in time."""
        self._pause_s = min(max(self._first_s, self._pause_s * GROWTH), MOST_S)
        self._until = time.monotonic() + self._pause_s
        self._cause = str(error)
        if not self._was_told:
            self._was_told = True
            print(
                f"warning: {error}; the store hangs: it is asked again after {self._pause_s:.2g} s, then "
                "less and less often; until it answers, its units count as lost",
                file=sys.stderr,
                flush=True,
            )

    def answered(self) -> None:
        self._pause_s = 0.0
