"""What the model thread hands to the trace writer for one forward pass.

Plain numpy and Python: knows no tensor and no file. There is one `StepCapture` per traced step;
everything else in a record is derived from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from dsatrace.kv.prefix import RequestPrefix
from dsatrace.kv.tiers.fetches import StepFetches

Phase = Literal["decode", "prefill"]


@dataclasses.dataclass(frozen=True)
class StepCapture:
    """The selections of one forward, for the rows that are recorded: B rows, L layers, K = top-k."""

    phase: Phase
    request_ids: tuple[str, ...]  # (B,)
    step_idx: tuple[int, ...]  # (B,) a request's own decode step, 0-based; -1 in prefill
    seq_len: np.ndarray  # (B,) int32, positions visible to the query, itself included
    batch_size: int  # requests in the forward, recorded or not
    positions: np.ndarray  # (L, B, K) int32, score order; the first min(K, seq_len) are valid, the rest -1
    score_stats: np.ndarray  # (L, B, 4) float32: min, mean, max over the selection; k-th margin
    scores: np.ndarray | None  # (L, B, K) float32, scores[i] belongs to positions[i]; None unless stored
    prefixes: tuple[RequestPrefix, ...]  # (B,)
    forward_idx: int  # the run's forward pass, 0-based
    step_wall_us: float  # wall time around the forward
    step_synced: bool  # the device was synchronised before the clock was read
    needles: tuple[tuple[int, ...], ...] = ()  # (B,) prompt positions of the answer; () when none has any
    fetches: StepFetches | None = None  # which tier held each position; None where all is in HBM
    wait: Callable[[], None] = lambda: None  # returns when the arrays are whole; the writer calls it first
    release: Callable[[], None] = lambda: None  # lets the arrays be reused; the writer calls it last
