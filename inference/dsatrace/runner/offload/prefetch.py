"""Fetches what a layer is guessed to select, while its indexer is still choosing.

Two guesses: what the same layer selected in the step before, or what the layer before it
selected in this step. A wrong guess costs bytes only. Knows no store and no residency.

    prefetcher = Prefetcher("previous-layer", num_layers=61, fetch)
    prefetcher.start(7); ...; prefetcher.join()     # around layer 7's indexer
    prefetcher.selected(7, units, num_missed=3)
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from dsatrace.runner.settings import PrefetchKind

Fetch = Callable[[int, np.ndarray], np.ndarray]
"""`(layer_id, units) -> units that were fetched`; called in the prefetcher's thread."""


class Prefetcher:
    """One guess per layer and decode step, between `start` and `join`.

    Recall: of the units that the step selected and HBM lacked when it began, the share that came in
    time. Precision: of the units that were brought, the share that was selected.
    """

    def __init__(self, kind: PrefetchKind, num_layers: int, fetch: Fetch) -> None:
        self.kind = kind
        self.used_units = [0] * num_layers
        self.fetched_units = [0] * num_layers
        self.missed_units = [0] * num_layers  # selected, and not there in spite of the guess
        self._fetch = fetch
        self._selected: list[np.ndarray | None] = [None] * num_layers  # by the last step that did
        self._came: np.ndarray | None = None
        self._running: Future[np.ndarray] | None = None
        self._thread = None if kind == "none" else ThreadPoolExecutor(1, "prefetch")

    def start(self, layer_id: int) -> None:
        """Begins to fetch the guess for a layer, if there is one."""
        if self._thread is None:
            return
        source = layer_id if self.kind == "previous-step" else layer_id - 1
        guess = self._selected[source] if source >= 0 else None
        if guess is not None:
            self._running = self._thread.submit(self._fetch, layer_id, guess)

    def wait(self) -> None:
        """Returns when nothing is under way; the next `join` raises what failed."""
        if self._running is not None:
            self._running.exception()

    def join(self) -> None:
        """Waits for what was begun, and raises its error."""
        running, self._running = self._running, None
        self._came = None if running is None else running.result()

    def selected(self, layer_id: int, units: np.ndarray, num_missed: int) -> None:
        """The layer selected these distinct units, of which `num_missed` were not in HBM."""
        if self._thread is None:
            return
        self._selected[layer_id] = units
        self.missed_units[layer_id] += num_missed
        if self._came is not None:
            self.fetched_units[layer_id] += len(self._came)
            self.used_units[layer_id] += int(np.isin(self._came, units).sum())

    def to_json(self) -> dict[str, Any] | None:
        """The summary's `prefetch`; None where nothing is guessed."""
        if self._thread is None:
            return None
        fetched, used, missed = map(sum, (self.fetched_units, self.used_units, self.missed_units))
        return {
            "units": fetched,
            "used_units": used,
            "missed_units": missed,
            "recall": used / (used + missed) if used + missed else None,
            "precision": used / fetched if fetched else None,
        }

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
