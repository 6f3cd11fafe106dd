"""The tensor side of the tracer: catches every layer's selection, copies once a step.

Each layer's tensors are kept until the forward is over, then gathered into one slot of a
ring: on CUDA through a device buffer that is copied to a pinned slot in one go, on a CPU
by the writer's thread. Knows nothing of requests or files; the only file of `trace` that
imports torch.

    ring = SelectionRing(num_layers=61, max_rows=8, topk=2048)
    recording = ring.record(num_rows=2)
    with hooked(model.indexers, recording.on_select):
        model(batch, cache)
    recording.finish()
    recording.wait()          # in the writer's thread; then read recording.arrays()
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

NUM_STATS = 4  # min, mean, max over the selection; k-th margin


class Selected(Protocol):
    """What is read of the model's `Selection`."""

    @property
    def positions(self) -> torch.Tensor: ...  # (N, K) int64 in score order, -1 padded
    @property
    def scores(self) -> torch.Tensor: ...  # (N, K) descending, -inf where positions is -1
    @property
    def margin(self) -> torch.Tensor: ...  # (N,)
    @property
    def own_positions(self) -> torch.Tensor: ...  # (N, K)


OnSelect = Callable[[int, Selected], None]
HostArrays = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@contextlib.contextmanager
def hooked(indexers: Sequence[torch.nn.Module], *callbacks: OnSelect) -> Iterator[None]:
    """Sets every indexer's `on_select` for the forwards run inside, and takes it off again."""

    def on_select(layer_id: int, selection: Selected) -> None:
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
        """On `device`, or in host memory (pinned when there is CUDA) for None."""
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
    """`num_slots` steps of room, reused when the writer has released them."""

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
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(num_slots):
            self._free.put(Slot(num_layers, max_rows, topk, with_scores, device=None))
        on_cuda = self.device.type == "cuda"
        self.staging = Slot(num_layers, max_rows, topk, with_scores, self.device) if on_cuda else None

    def record(self, num_rows: int, rows: Sequence[int] | None = None, wait: bool = True) -> Recording | None:
        """Room for a forward of which `num_rows` rows are kept: those at `rows`, or all of them.

        Waits until a slot is free; without `wait` it returns None where none is.
        """
        try:
            slot = self._free.get(block=wait)
        except queue.Empty:
            return None
        return Recording(self, slot, num_rows, rows)

    def release(self, slot: Slot) -> None:
        self._free.put(slot)


class Recording:
    """One step being caught; the host arrays hold it after `finish` and `wait`.

    The model thread only keeps each layer's tensors, which a forward makes anew and nobody
    changes. They are gathered once a step: on CUDA by `finish`, into the staging buffer;
    on a CPU by `wait`, in the writer's thread.
    """

    def __init__(self, ring: SelectionRing, slot: Slot, num_rows: int, rows: Sequence[int] | None) -> None:
        self.ring = ring
        self.slot = slot
        self.num_rows = num_rows
        self.rows = None if rows is None else torch.tensor(rows, device=ring.device)
        self.caught: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # by layer
        self.copied: torch.cuda.Event | None = None

    def on_select(self, layer_id: int, selection: Selected) -> None:
        """Takes one layer's selection; layers come in order, each once."""
        assert layer_id == len(self.caught)
        caught = (selection.positions, selection.scores, selection.margin)
        if self.rows is not None:  # a few rows of many: do not keep the others alive
            caught = (caught[0][self.rows], caught[1][self.rows], caught[2][self.rows])
        self.caught.append(caught)

    def finish(self) -> None:
        """The forward is over. On CUDA this starts the one copy to the host."""
        if self.ring.staging is not None:
            self._gather(self.ring.staging)
            self.slot.copy_from(self.ring.staging, self.num_rows)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> None:
        """Returns when the host arrays are whole; the writer thread calls it, not the model's."""
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
        kept = slice(self.num_rows)
        return positions[:, kept], stats[:, kept], None if scores is None else scores[:, kept]

    def release(self) -> None:
        """Gives the slot back to the ring."""
        self.ring.release(self.slot)


class SelectionMismatch(RuntimeError):
    """Two ranks chose different tokens, so a trace would describe only one of them."""


class SelectionDigest:
    """Compares, every `interval` steps, what each rank chose before rank 0's choice was broadcast.

    One int64 a layer and step: the sum of a mixed hash of the selected positions, which
    does not depend on their order.
    """

    def __init__(self, num_layers: int, device: torch.device | str, interval: int = 16) -> None:
        self.interval = interval
        self.digests = torch.zeros(interval, num_layers, dtype=torch.int64, device=device)
        self.num_steps = 0

    def on_select(self, layer_id: int, selection: Selected) -> None:
        rows = torch.arange(1, selection.own_positions.shape[0] + 1, device=self.digests.device)
        mixed = (selection.own_positions + 2) * 0x1E3779B97F4A7C15 + rows.unsqueeze(1) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB  # wraps: int64 arithmetic is modulo 2^64
        self.digests[self.num_steps % self.interval, layer_id] = (mixed ^ (mixed >> 32)).sum()

    def step_done(self) -> None:
        """Call on every rank after each forward; raises `SelectionMismatch` on all of them together."""
        self.num_steps += 1
        if self.num_steps % self.interval == 0:
            self.compare(self.interval)

    def compare(self, num_steps: int | None = None) -> None:
        """Compares the steps since the last comparison; the run's end calls it without a number."""
        pending = self.num_steps % self.interval if num_steps is None else num_steps
        if pending == 0:
            return
        mine = self.digests[:pending].contiguous()
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        for rank, theirs in enumerate(everyone):
            different = (theirs != everyone[0]).nonzero()
            if len(different):
                step, layer = different[0].tolist()
                raise SelectionMismatch(
                    f"rank {rank} selected other tokens than rank 0 in forward "
                    f"{self.num_steps - pending + step}, layer {layer}; the run ends here"
                )
