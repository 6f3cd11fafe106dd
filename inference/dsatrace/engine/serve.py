"""Serves requests as they arrive: pulls each when its time has come, and yields it when it ended.

Knows neither data set nor runner. Requests are pulled lazily and forgotten when they ended,
so that neither a source of hundreds of megabytes nor a day of answers is ever in memory.

    for live in serve(engine, requests):
        print(live.request_id, live.state, live.finish_s - live.request.arrival_s)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import UserError
from ..workloads.request import Request
from .clock import to_ns
from .engine import Engine
from .live import LiveRequest

BATCHES_AHEAD = 2
"""Requests that have arrived are pulled until so many batches wait; the source keeps the others."""


def serve(engine: Engine, requests: Iterable[Request]) -> Iterator[LiveRequest]:
    """Yields every request when it has ended, rejected ones too, in the order of their ends.

    `requests` must be sorted by `arrival_s`; under tensor parallel every rank is given the
    same. After `engine.request_abort()` what was running and waiting comes as `aborted`, and
    no more requests are pulled.
    """
    arrivals = _Arrivals(requests)
    max_waiting = BATCHES_AHEAD * engine.scheduler.max_batch_size
    engine.wait_until(0)  # agrees on the time before anything is decided by it
    while True:
        while len(engine.scheduler.waiting) < max_waiting and arrivals.next_is_here(engine.clock.now_ns):
            live = engine.submit(arrivals.pull())
            if live.ended:
                yield live
        if engine.scheduler.has_work:
            progress = engine.step(arrivals.next_ns)
        elif arrivals.next_ns is not None:
            progress = engine.wait_until(arrivals.next_ns)
        else:
            return
        yield from progress.ended
        if progress.aborted:
            return


class _Arrivals:
    """The requests still to come. The source is asked for one more only when somebody looks."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._source = iter(requests)
        self._next: Request | None = None
        self._next_ns: int | None = None
        self._last: Request | None = None
        self._exhausted = False

    @property
    def next_ns(self) -> int | None:
        """When the next request arrives; None when there is none."""
        if self._next is None and not self._exhausted:
            self._next = next(self._source, None)
            self._exhausted = self._next is None
            self._next_ns = None if self._next is None else to_ns(self._next.arrival_s)
            self._check_order()
        return self._next_ns

    def next_is_here(self, now_ns: int) -> bool:
        next_ns = self.next_ns
        return next_ns is not None and next_ns <= now_ns

    def pull(self) -> Request:
        """The request that `next_ns` told of."""
        assert self._next is not None
        self._last, self._next = self._next, None
        return self._last

    def _check_order(self) -> None:
        last, new = self._last, self._next
        if last is not None and new is not None and new.arrival_s < last.arrival_s:
            raise UserError(
                f"request {new.request_id} arrives at {new.arrival_s} s, before request "
                f"{last.request_id} at {last.arrival_s} s; sort the requests by arrival"
            )
