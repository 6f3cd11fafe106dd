"""Runs the model for one scheduled step, and hands what the indexer chose to the tracer.

The tracer is an optional attribute: without one the forward is the model's and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import time

import numpy as np
import torch

from dsatrace.engine.live import LiveRequest
from dsatrace.engine.runner import Step, Work
from dsatrace.errors import UserError
from dsatrace.kv.tiers.fetches import LayerFetch, StepFetches
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.transformer import Transformer
from dsatrace.runner.offload.cache import OffloadedCache
from dsatrace.runner.offload.layer_units import UnitsLost
from dsatrace.runner.offload.totals import TierTotals
from dsatrace.runner.sampler import Sampler
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.observe import OnSelect, Recording, SelectionDigest, SelectionRing, hooked
from dsatrace.trace.tracer import Tracer


class ModelRunner:
    """The `Runner` that owns the model, its KV cache, the sampler and, while tracing, the ring of
    selections. A forward is one step: its tokens must be seen before the next can be computed.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        sampler: Sampler,
        device: torch.device | str = "cpu",
        tracer: Tracer | None = None,
        max_batch_size: int = 8,
        first_forward_idx: int = 0,
    ) -> None:
        """`tracer` is rank 0's; the other ranks of a traced run take part in the digest only.

        `first_forward_idx` is the number of forwards a resumed run has behind it.
        """
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.device = torch.device(device)
        self.tracer = tracer
        self.forward_idx = first_forward_idx
        self.ring: SelectionRing | None = None
        self.digest: SelectionDigest | None = None
        self.tier_totals: TierTotals | None = None
        if isinstance(cache, OffloadedCache):
            self.tier_totals = TierTotals(cache, first_forward_idx)
        if tracer is not None and tracer.config.records_steps:
            args = model.args
            self.ring = SelectionRing(
                args.n_layers,
                max_batch_size,
                args.index_topk,
                device,
                tracer.config.needs_scores,
                num_slots=tracer.config.queue_steps + 2,  # beside those waiting: one written, one filled
            )

    def compare_ranks(self) -> None:
        """Turns the digest on; every rank of a traced run calls it."""
        if self.model.setup.group.size > 1:
            self.digest = SelectionDigest(self.model.args.n_layers, self.device)

    def run(self, step: Step) -> list[list[int]]:
        """Raises `BlocksLost` where a tier has lost what the step needs.

        Where ranks serve together it is a `UserError` that ends the run: this rank's tiers are its
        own, and the others already wait for its part of the layer.
        """
        try:
            logits = self.forward(step)
        except UnitsLost as lost:
            assert self.tier_totals is not None
            blocks_lost = self.tier_totals.lose(lost)
            group = self.model.setup.group
            if group.size > 1:
                raise UserError(
                    f"rank {group.rank}: {blocks_lost.cause}; several ranks cannot compute it again: "
                    "mend the store, then start again (with --resume, where the command has it)"
                ) from lost
            raise blocks_lost from lost
        return [[token] for token in self.sampler(logits, step.sampled)]

    def lookahead(self, live: LiveRequest) -> int:
        return 1

    def modelled_ns(self, step: Step, num_steps: int) -> int | None:
        return None

    def forget(self, request_id: str) -> None:
        self.sampler.forget(request_id)

    def forward(self, step: Step) -> torch.Tensor:
        """Logits `(len(step.sampled), vocabulary)`."""
        spans = [_span(work) for work in step.work]
        batch = Batch.build(spans, self.cache.block_size, self.device)
        started = time.perf_counter()
        recorded = self._recorded_work(step)
        callbacks: list[OnSelect] = [self.digest.on_select] if self.digest else []
        recording = self._new_recording(step, batch, recorded)
        if recording is None:
            with hooked(self.model.indexers, *callbacks) if callbacks else contextlib.nullcontext():
                logits = self.model(batch, self.cache)
        else:
            prepared_s = time.perf_counter() - started
            logits = self._traced_forward(step, batch, recorded, recording, callbacks, prepared_s)
        self.forward_idx += 1
        if self.digest is not None:
            self.digest.step_done()
        return logits

    def _recorded_work(self, step: Step) -> list[Work]:
        """What of a step is recorded: its sampled decode rows, or a prompt's last position."""
        if self.tracer is None:
            return []
        if step.is_prefill:
            return [w for w in step.work if w.wants_logits and self.tracer.config.prefill == "last"]
        return [w for w in step.work if self.tracer.wants(w.live.num_decode_steps)]

    def _new_recording(self, step: Step, batch: Batch, recorded: list[Work]) -> Recording | None:
        """Room for what is recorded; None when that is nothing, or when the step is dropped."""
        if not recorded:
            return None
        assert self.ring is not None and self.tracer is not None
        whole = len(recorded) == len(batch.tokens)
        rows = None if whole else _last_rows(step, recorded)
        may_wait = self.tracer.config.queue_policy == "block"
        recording = self.ring.record(len(recorded), rows, may_wait) if self.tracer.accepts else None
        if recording is None:
            self.tracer.drop_step()
        return recording

    def _traced_forward(
        self,
        step: Step,
        batch: Batch,
        recorded: list[Work],
        recording: Recording,
        callbacks: list[OnSelect],
        prepared_s: float,
    ) -> torch.Tensor:
        """`prepared_s` went by until there was room to record."""
        assert self.tracer is not None
        started = time.perf_counter()
        fetches: list[LayerFetch] = []
        try:
            with hooked(self.model.indexers, *callbacks, recording.on_select), self._reporting(fetches):
                logits = self.model(batch, self.cache)
        except BaseException:
            recording.release()
            raise
        computed = time.perf_counter()
        synced = self._synchronise()
        ended = time.perf_counter()
        recording.finish()
        capture = self._capture(step, recorded, recording, ended - started, synced, fetches)
        handover_s = prepared_s + (time.perf_counter() - ended)
        self.tracer.put(capture, handover_us=handover_s * 1e6, sync_us=(ended - computed) * 1e6)
        return logits

    def _reporting(self, fetches: list[LayerFetch]) -> contextlib.AbstractContextManager[None]:
        """Appends what each layer is served, where there are tiers."""
        if self.tier_totals is None:
            return contextlib.nullcontext()
        return self.tier_totals.cache.reporting(fetches.append)

    def _capture(
        self,
        step: Step,
        recorded: list[Work],
        recording: Recording,
        wall_s: float,
        synced: bool,
        layers: list[LayerFetch],
    ) -> StepCapture:
        assert self.tracer is not None
        fetches = None
        if self.tier_totals is not None:
            rows = [0] if step.is_prefill else _last_rows(step, recorded)
            fetches = StepFetches.of(layers, rows, self.model.args.index_topk)
            self.tier_totals.record(fetches)
        positions, stats, scores = recording.arrays()
        request_ids = tuple(work.live.request.request_id for work in recorded)
        return StepCapture(
            phase="prefill" if step.is_prefill else "decode",
            request_ids=request_ids,
            step_idx=tuple(-1 if step.is_prefill else work.live.num_decode_steps for work in recorded),
            seq_len=np.array([work.first_pos + work.num_tokens for work in recorded], dtype=np.int32),
            batch_size=len(step.work),
            positions=positions,
            score_stats=stats,
            scores=scores,
            prefixes=self.tracer.prefixes(
                request_ids, [work.live.prefix_hit_tokens or 0 for work in recorded]
            ),
            forward_idx=self.forward_idx,
            step_wall_us=wall_s * 1e6,
            step_synced=synced,
            fetches=fetches,
            wait=recording.wait,
            release=recording.release,
        )

    def _synchronise(self) -> bool:
        """Waits for the device unless told not to; True when the clock can be trusted."""
        assert self.tracer is not None
        if self.device.type != "cuda":
            return True
        if self.tracer.config.sync_cuda:
            torch.cuda.synchronize(self.device)
        return self.tracer.config.sync_cuda


def _span(work: Work) -> Span:
    live: LiveRequest = work.live
    tokens = live.tokens[work.first_pos : work.first_pos + work.num_tokens]
    return Span(live.block_ids, work.first_pos, tokens, work.wants_logits)


def _last_rows(step: Step, recorded: list[Work]) -> list[int]:
    """The batch row of each recorded work's last token."""
    ends = itertools.accumulate(work.num_tokens for work in step.work)
    return [end - 1 for work, end in zip(step.work, ends, strict=True) if work in recorded]
