"""A run of the door `attach`: its tracer, its requests, and what must be true when it ends.

Knows requests and captures; no model and no tensor.

    with AttachedRun(config, info) as run:
        name = run.begin_request([5, 9, 2])
        run.tracer.put(capture)
        run.end_request(name, num_output_tokens=12, state="length", finish_s=run.now())
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from dsatrace.errors import UserError
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.request_facts import RecordedRequest, RequestFacts
from dsatrace.trace.tracer import Tracer


class AttachedRun:
    """Writes a run; as a context manager it ends it with the block. `close` ends it without one."""

    def __init__(self, config: TraceConfig, info: RunInfo) -> None:
        self.tracer = Tracer(config, info)
        self._started = time.perf_counter()
        self._requests: dict[str, RecordedRequest] = {}
        self._first_token_s: dict[str, float] = {}
        self._num_requests = 0
        self._is_open = True

    def selection(self, layer: int, ids: Any, positions: Any) -> None:
        """Takes one layer's selection of a model of the user's own: see `own_model.OwnModelRun`."""
        raise UserError(
            "trace.selection: this trace watches the model's generate; for ids of your own, attach with "
            "num_layers and top_k"
        )

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    def begin_request(self, prompt_token_ids: Sequence[int], arrival_s: float = 0.0) -> str:
        """Returns the request's id: r0, r1, ... in the order of the run."""
        request = RecordedRequest(f"r{self._num_requests}", prompt_token_ids, arrival_s=arrival_s)
        self._num_requests += 1
        self.tracer.add_request(request)
        self._requests[request.request_id] = request
        return request.request_id

    def note_first_token(self, request_id: str, at_s: float) -> None:
        self._first_token_s[request_id] = at_s

    def end_request(
        self, request_id: str, num_output_tokens: int, state: str, finish_s: float | None
    ) -> None:
        """Writes the request's line; one that never ends gets a line that says so when the run ends."""
        request = self._requests.pop(request_id)
        facts = RequestFacts(
            num_output_tokens=num_output_tokens,
            first_token_s=self._first_token_s.pop(request_id, None),
            finish_s=finish_s,
            state=state,
        )
        self.tracer.finish_request(request, facts)

    def finish(self) -> None:
        """Ends what is under way. Raises `UserError` if nothing was recorded, or not all of a step."""
        raise NotImplementedError

    def detach(self) -> None:
        """Takes off whatever watches the model."""

    def close(self) -> None:
        """Ends the run. Raises `UserError` if nothing was recorded; the run then says `incomplete`."""
        if self._is_open:
            self._is_open = False
            with self.tracer:
                self.detach()
                self.finish()

    def __enter__(self) -> AttachedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._is_open:
            self._is_open = False
            self.detach()
            self.tracer.__exit__(kind, error, traceback)
