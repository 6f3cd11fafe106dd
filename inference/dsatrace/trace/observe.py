"""The tensor side of the tracer: records what every layer of a forward selects.

Each layer's tensors are kept until the forward is over, then gathered into one slot of a ring:
on CUDA through a device buffer and one copy to a pinned slot, on a CPU by the writer's thread.
Knows the rows of a forward and the ids of their requests; no scheduler, no cache and no file.
The only file of `trace` that imports torch.

    hook = partial(hooked, model.indexers)
    recorder = ForwardRecorder(hook, num_layers=61, max_rows=8, top_k=2048, tracer=tracer)
    rows = [ForwardRow("r0", 0, seq_len=2001, step_idx=0), ForwardRow("r1", 1, seq_len=300, step_idx=7)]
    with recorder.recording("decode", rows, num_rows=2, batch_size=2):
        model(batch, cache)
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from dsatrace.kv.tiers.fetches import LayerFetch, StepFetches
from dsatrace.trace.capture import NUM_STATS, SPARE_STEPS, Phase, StepCapture
from dsatrace.trace.tracer import Tracer


class Selected(Protocol):
    """A layer's selection, as it is recorded: N rows, up to K positions each."""

    positions: torch.Tensor  # (N, K) int64 in score order, -1 padded
    scores: torch.Tensor  # (N, K) descending, -inf where positions is -1
    margin: torch.Tensor  # (N,)


OnSelect = Callable[[int, Any], None]
"""Called for each layer, in order, with its number and its selection."""

Hook = Callable[..., contextlib.AbstractContextManager[None]]
"""`hook(*callbacks)` calls each `OnSelect` for every layer of the forwards run inside."""

HostArrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""Ids (L, B, K) int32, statistics of their scores (L, B, 4) and scores (L, B, K); None where unknown."""


class Recorded(Protocol):
    """Some rows of one forward, being recorded."""

    def on_select(self, layer_id: int, selection: Any) -> None:
        """Takes one layer's selection, of all rows of the forward."""

    def finish(self) -> None:
        """Ends the forward."""

    def wait(self) -> None:
        """Returns when `arrays` are whole; the writer's thread calls it, not the model's."""

    def arrays(self) -> HostArrays: ...

    def release(self) -> None:
        """Lets the arrays be used again."""


class Room(Protocol):
    """Where what is recorded of a forward is kept until it is written."""

    max_rows: int  # in one `Recorded`

    def record(self, num_rows: int, rows: Sequence[int] | None = None, wait: bool = True) -> Recorded | None:
        """Room for a forward's `num_rows` recorded rows: those at `rows`, or all of them.

        Without `wait` it returns None when there is none now.
        """


@contextlib.contextmanager
def hooked(indexers: Sequence[torch.nn.Module], *callbacks: OnSelect) -> Iterator[None]:
    """Sets every indexer's `on_select` for the forwards run inside, and takes it off again."""

    def on_select(layer_id: int, selection: Any) -> None:
        for callback in callbacks:
            callback(layer_id, selection)

    for indexer in indexers:
        indexer.on_select = on_select  # type: ignore[assignment]
    try:
        yield
    finally:
        for indexer in indexers:
            indexer.on_select = None  # type: ignore[assignment]


class Slot:
    """Room for one step: L layers, up to B rows, K positions each."""

    def __init__(
        self, num_layers: int, max_rows: int, topk: int, with_scores: bool, device: torch.device | None
    ) -> None:
        """On `device`; None: in host memory, pinned where there is CUDA."""
        pinned = device is None and torch.cuda.is_available()

        def buffer(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_layers, max_rows, width, dtype=dtype, device=device, pin_memory=pinned)

        self.positions = buffer(topk, torch.int32)
        self.stats = buffer(NUM_STATS, torch.float32)
        self.scores = buffer(topk, torch.float32) if with_scores else None
        # Made once: views of the tensors cost the model thread 0.1 ms when it has just waited.
        self.arrays: HostArrays | None = None
        if device is None:
            scores = None if self.scores is None else self.scores.numpy()
            self.arrays = self.positions.numpy(), self.stats.numpy(), scores

    def copy_from(self, other: Slot, num_rows: int) -> None:
        self.positions[:, :num_rows].copy_(other.positions[:, :num_rows], non_blocking=True)
        self.stats[:, :num_rows].copy_(other.stats[:, :num_rows], non_blocking=True)
        if self.scores is not None and other.scores is not None:
            self.scores[:, :num_rows].copy_(other.scores[:, :num_rows], non_blocking=True)


class SelectionRing:
    """Room for `num_slots` steps; a slot is used again once the writer has released it."""

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        topk: int,
        device: torch.device | str = "cpu",
        with_scores: bool = False,
        num_slots: int = 8,
    ) -> None:
        self.device = torch.device(device)
        self.max_rows = max_rows
        self.free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(num_slots):
            self.free.put(Slot(num_layers, max_rows, topk, with_scores, device=None))
        on_cuda = self.device.type == "cuda"
        self.staging = Slot(num_layers, max_rows, topk, with_scores, self.device) if on_cuda else None

    def record(self, num_rows: int, rows: Sequence[int] | None = None, wait: bool = True) -> Recording | None:
        """Room for a forward's `num_rows` recorded rows: those at `rows`, or all of them.

        Waits until a slot is free; without `wait` it returns None when none is.
        """
        try:
            return Recording(self, self.free.get(block=wait), num_rows, rows)
        except queue.Empty:
            return None


class Recording:
    """One step being recorded; the host arrays hold it after `finish` and `wait`.

    The model thread only keeps each layer's tensors, which every forward makes anew. They are
    gathered once per step: on CUDA by `finish`, into the staging buffer; on a CPU by `wait`, in
    the writer's thread.
    """

    def __init__(self, ring: SelectionRing, slot: Slot, num_rows: int, rows: Sequence[int] | None) -> None:
        self.ring = ring
        self.slot = slot
        self.num_rows = num_rows
        self.rows = None if rows is None else torch.tensor(rows, device=ring.device)
        self.caught: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # by layer
        self.copied: torch.cuda.Event | None = None

    def on_select(self, layer_id: int, selection: Selected) -> None:
        """Takes one layer's selection; call it once per layer, in order."""
        assert layer_id == len(self.caught)
        caught = (selection.positions, selection.scores, selection.margin)
        if self.rows is not None:  # a few rows of many: do not keep the others alive
            caught = (caught[0][self.rows], caught[1][self.rows], caught[2][self.rows])
        self.caught.append(caught)

    def finish(self) -> None:
        """Ends the forward. On CUDA this starts the one copy to the host."""
        if self.ring.staging is not None:
            self._gather(self.ring.staging)
            self.slot.copy_from(self.ring.staging, self.num_rows)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> None:
        """Returns when the host arrays are complete; called by the writer's thread, not the model's."""
        if self.copied is not None:
            self.copied.synchronize()
        elif self.caught:
            self._gather(self.slot)

    @torch.no_grad()
    def _gather(self, target: Slot) -> None:
        """All layers into `target`, with the statistics of their scores."""
        positions, scores, margin = (torch.stack(parts) for parts in zip(*self.caught, strict=True))
        self.caught.clear()
        width = positions.shape[2]
        kept = target.positions[:, : self.num_rows]
        kept[..., :width] = positions
        kept[..., width:] = -1
        stats = target.stats[:, : self.num_rows]
        # Scores descend, -inf where there is no position; sums skip those, and keep a nan.
        count = width + kept[..., :width].clamp(max=0).sum(2)
        total = scores.nan_to_num(nan=float("nan"), posinf=float("inf"), neginf=0.0).sum(2)
        stats[..., 0] = scores.gather(2, count.unsqueeze(2) - 1).squeeze(2)
        stats[..., 1] = total / count
        stats[..., 2] = scores[..., 0]
        stats[..., 3] = margin
        if target.scores is not None:
            target.scores[:, : self.num_rows, :width] = scores

    def arrays(self) -> HostArrays:
        """Views `positions (L, B, K) int32`, `stats (L, B, 4)` and `scores (L, B, K)` or None."""
        assert self.slot.arrays is not None
        positions, stats, scores = self.slot.arrays
        assert stats is not None
        kept = slice(self.num_rows)
        return positions[:, kept], stats[:, kept], None if scores is None else scores[:, kept]

    def release(self) -> None:
        """Gives the slot back to the ring."""
        self.ring.free.put(self.slot)


class SelectionMismatch(RuntimeError):
    """Two ranks selected different tokens, so a trace would describe only one of them."""


class SelectionDigest:
    """Compares, every `interval` steps, what each rank selected before rank 0's choice was broadcast.

    Keeps one int64 per layer and step: a sum of hashes of the selected positions, which does not
    depend on their order.
    """

    def __init__(self, num_layers: int, device: torch.device | str, interval: int = 16) -> None:
        self.interval = interval
        self.digests = torch.zeros(interval, num_layers, dtype=torch.int64, device=device)
        self.num_steps = 0
        self._num_pending = 0  # steps since the last comparison

    def on_select(self, layer_id: int, selection: Any) -> None:
        own = selection.own_positions  # (N, K) int64, selected before rank 0's choice replaced it
        rows = torch.arange(1, own.shape[0] + 1, device=self.digests.device)
        mixed = (own + 2) * 0x1E3779B97F4A7C15 + rows.unsqueeze(1) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB  # wraps: int64 arithmetic is modulo 2^64
        self.digests[self._num_pending, layer_id] = (mixed ^ (mixed >> 32)).sum()

    def step_done(self) -> None:
        """Call on every rank after each forward; raises `SelectionMismatch` on all of them together."""
        self.num_steps += 1
        self._num_pending += 1
        if self._num_pending == self.interval:
            self.compare()

    def compare(self) -> None:
        """Compares the steps since the last comparison."""
        if self._num_pending == 0:
            return
        first_step, mine = self.num_steps - self._num_pending, self.digests[: self._num_pending].contiguous()
        self._num_pending = 0
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        for rank, theirs in enumerate(everyone):
            different = (theirs != everyone[0]).nonzero()
            if len(different):
                step, layer = different[0].tolist()
                raise SelectionMismatch(
                    f"rank {rank} selected other tokens than rank 0 in forward {first_step + step}, "
                    f"layer {layer}; the run ends here"
                )


class ForwardRow(NamedTuple):
    """The row of a request's last token in a forward, from which its next token is sampled."""

    request_id: str
    row: int  # of the forward's N rows
    seq_len: int  # positions visible to it, itself included
    step_idx: int = -1  # the request's own decode step, 0-based; -1 in prefill
    prefix_hit_tokens: int = 0  # found in the prefix cache, where the run has one


class TierReports(Protocol):
    """Tiers that report where each layer of a forward read its positions from."""

    def reporting(self, on_fetch: Callable[[LayerFetch], None]) -> contextlib.AbstractContextManager[None]:
        """Reports every layer of the forwards run inside; for a prefill its last row only."""

    def record(self, fetches: StepFetches) -> None:
        """Counts these as recorded."""


class ForwardRecorder:
    """Hands the tracer what every layer selected, for the rows it wants of each forward.

    The caller runs the forward, so any model whose layers can be hooked can be recorded.
    """

    def __init__(
        self,
        hook: Hook,
        num_layers: int,
        max_rows: int,
        top_k: int,
        device: torch.device | str = "cpu",
        tracer: Tracer | None = None,
        *,
        tiers: TierReports | None = None,
        compare_ranks: bool = False,
        first_forward_idx: int = 0,
        room: Room | None = None,
    ) -> None:
        """A capture holds at most `max_rows` rows of a forward, of at most `top_k` selected positions each.
        Without `room` they are the engine's, and lie in a ring.

        Only rank 0 has a `tracer`; with `compare_ranks` the other ranks have a recorder for its digest.
        `first_forward_idx` counts the forwards that a resumed run has behind it.
        """
        self.tracer = tracer
        self.forward_idx = first_forward_idx
        self.ring: SelectionRing | None = None
        self._room = room
        self._hook = hook
        self._top_k = top_k
        self._device = torch.device(device)
        self._tiers = tiers
        self._digest = SelectionDigest(num_layers, device) if compare_ranks else None
        self._synchronises = tracer is not None and tracer.config.sync_cuda and self._device.type == "cuda"
        if room is None and tracer is not None and tracer.config.records_steps:
            num_slots = tracer.config.queue_steps + SPARE_STEPS
            scores = tracer.config.needs_scores
            self._room = self.ring = SelectionRing(num_layers, max_rows, top_k, device, scores, num_slots)

    @contextlib.contextmanager
    def recording(
        self, phase: Phase, rows: Sequence[ForwardRow], num_rows: int, batch_size: int
    ) -> Iterator[None]:
        """Records the forward run inside, which computes `num_rows` rows for `batch_size` requests.

        `rows` may be recorded; the tracer takes all, some or none of them. A forward that raises is not
        recorded.
        """
        started = time.perf_counter()
        wanted = [row for row in rows if self._wants(phase, row)]
        parts = self._new_recordings(wanted, num_rows) if wanted else []
        callbacks = [recorded.on_select for _, recorded in parts]
        if self._digest is not None:
            callbacks.insert(0, self._digest.on_select)
        fetches: list[LayerFetch] = []
        began = time.perf_counter()
        try:
            with contextlib.ExitStack() as watched:
                if callbacks:
                    watched.enter_context(self._hook(*callbacks))
                if parts and self._tiers is not None:
                    watched.enter_context(self._tiers.reporting(fetches.append))
                yield
        except BaseException:
            for _, recorded in parts:
                recorded.release()
            raise
        if parts:
            computed = time.perf_counter()
            if self._synchronises:
                torch.cuda.synchronize(self._device)
            ended = time.perf_counter()
            handover_s, sync_s = began - started - ended, ended - computed
            for i, (part, recorded) in enumerate(parts):
                recorded.finish()
                capture = self._capture(phase, part, batch_size, recorded, fetches, ended - began, i > 0)
                handover_s += time.perf_counter()
                assert self.tracer is not None
                self.tracer.put(capture, handover_us=handover_s * 1e6, sync_us=sync_s * 1e6)
                handover_s, sync_s = -time.perf_counter(), 0.0
        self.forward_idx += 1
        if self._digest is not None:
            self._digest.step_done()

    def close(self) -> None:
        """Compares the last forwards; every rank calls it at the end of the run."""
        if self._digest is not None:
            self._digest.compare()

    def _wants(self, phase: Phase, row: ForwardRow) -> bool:
        if self.tracer is None:
            return False
        return self.tracer.config.prefill != "off" if phase == "prefill" else self.tracer.wants(row.step_idx)

    def _new_recordings(
        self, wanted: Sequence[ForwardRow], num_rows: int
    ) -> list[tuple[Sequence[ForwardRow], Recorded]]:
        """Room for these rows, by parts of `max_rows`; without what is dropped."""
        assert self._room is not None and self.tracer is not None
        may_wait = self.tracer.config.queue_policy == "block"
        parts = []
        for first in range(0, len(wanted), self._room.max_rows):
            part = wanted[first : first + self._room.max_rows]
            rows = None if len(part) == num_rows else [row.row for row in part]
            recorded = self._room.record(len(part), rows, may_wait) if self.tracer.accepts else None
            if recorded is None:
                self.tracer.drop_step()
            else:
                parts.append((part, recorded))
        return parts

    def _capture(
        self,
        phase: Phase,
        rows: Sequence[ForwardRow],
        batch_size: int,
        recorded: Recorded,
        layers: Sequence[LayerFetch],
        wall_s: float,
        goes_on: bool,
    ) -> StepCapture:
        assert self.tracer is not None
        fetches = None
        if self._tiers is not None:
            reported = [0] if phase == "prefill" else [row.row for row in rows]
            fetches = StepFetches.of(layers, reported, self._top_k)
            self._tiers.record(fetches)
        positions, score_stats, scores = recorded.arrays()
        request_ids = tuple(row.request_id for row in rows)
        return StepCapture(
            phase=phase,
            request_ids=request_ids,
            step_idx=tuple(row.step_idx for row in rows),
            seq_len=np.array([row.seq_len for row in rows], dtype=np.int32),
            batch_size=batch_size,
            positions=positions,
            score_stats=score_stats,
            scores=scores,
            prefixes=self.tracer.prefixes(request_ids, [row.prefix_hit_tokens for row in rows]),
            needles=self.tracer.needles(request_ids),
            forward_idx=self.forward_idx,
            step_wall_us=wall_s * 1e6,
            step_synced=self._synchronises or self._device.type != "cuda",
            fetches=fetches,
            wait=recorded.wait,
            release=recorded.release,
            goes_on=goes_on,
        )
