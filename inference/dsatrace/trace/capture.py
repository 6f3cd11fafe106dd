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

Phase = Literal["decode", "prefill", "layerwise"]
NUM_STATS = 4  # of a row's scores: min, mean, max over the selection; k-th margin
SPARE_STEPS = 2  # beside those that wait for the writer: one being filled, one being written


@dataclasses.dataclass(frozen=True)
class StepCapture:
    """The selections of one forward, for the rows that are recorded: B rows, L sets, K = top-k.

    The engine's are token positions, one set per layer. Another door's `RunInfo.kind` says what the ids
    are, which layer and KV head each set is of, and what the door cannot tell: that is None, or ().
    """

    phase: Phase
    request_ids: tuple[str, ...]  # (B,)
    step_idx: tuple[int, ...]  # (B,) a request's own decode step, 0-based; below 0 in the prompt: -1 is its
    # last position
    seq_len: np.ndarray  # (B,) int32, positions visible to the query, itself included
    batch_size: int  # requests in the forward, recorded or not
    positions: np.ndarray  # (L, B, K) int32 ids, score order; the first min(K, seq_len) are valid, the rest
    # -1. Another door's are sets: -1 may stand anywhere, and a layer with fewer than K ids leaves -1
    score_stats: np.ndarray | None  # (L, B, NUM_STATS) float32
    scores: np.ndarray | None  # (L, B, K) float32, scores[i] belongs to positions[i]; None unless stored
    prefixes: tuple[RequestPrefix, ...]  # (B,)
    forward_idx: int  # the run's forward pass, 0-based
    step_wall_us: float | None  # wall time around the forward
    step_synced: bool | None  # the device was synchronised before the clock was read
    needles: tuple[tuple[int, ...], ...] = ()  # (B,) prompt positions of the answer; () when none has any
    fetches: StepFetches | None = None  # which tier held each position; None where all is in HBM
    goes_on: bool = False  # more rows of the forward that was captured before
    wait: Callable[[], None] = lambda: None  # returns when the arrays are whole; the writer calls it first
    release: Callable[[], None] = lambda: None  # lets the arrays be reused; the writer calls it last
