"""Runs the model for one scheduled step; a recorder watches the forward if the run is traced."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial

import torch

from dsatrace.engine.live import LiveRequest
from dsatrace.engine.runner import Step, Work
from dsatrace.errors import RankError
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.transformer import Transformer
from dsatrace.runner.offload.cache import OffloadedCache
from dsatrace.runner.offload.layer_units import UnitsLost
from dsatrace.runner.offload.totals import TierTotals
from dsatrace.runner.sampler import Sampler
from dsatrace.trace.capture import Phase
from dsatrace.trace.observe import ForwardRecorder, ForwardRow, hooked
from dsatrace.trace.tracer import Tracer


class ModelRunner:
    """The `Runner` that owns the model, its KV cache, the sampler and, while tracing, a recorder.

    It looks one step ahead: a token must be known before the next can be computed.
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
        *,
        compare_ranks: bool = False,
    ) -> None:
        """Only rank 0 has a `tracer`; with several ranks all of them `compare_ranks` if the run is traced.

        `first_forward_idx`: forwards that a resumed run has behind it.
        """
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.device = torch.device(device)
        self.recorder: ForwardRecorder | None = None
        self.tier_totals: TierTotals | None = None
        if isinstance(cache, OffloadedCache):
            self.tier_totals = TierTotals(cache, first_forward_idx)
        if tracer is not None or compare_ranks:
            self.recorder = ForwardRecorder(
                partial(hooked, model.indexers),
                model.args.n_layers,
                max_batch_size,
                model.args.index_topk,
                device,
                tracer,
                tiers=self.tier_totals,
                compare_ranks=compare_ranks,
                first_forward_idx=first_forward_idx,
            )

    def run(self, step: Step) -> list[list[int]]:
        """Raises `BlocksLost` if a tier has lost what the step needs.

        With several ranks it raises a `UserError`, which ends the run: each rank has its own tiers, and the
        others already wait for its part of the layer.
        """
        try:
            logits = self.forward(step)
        except UnitsLost as lost:
            assert self.tier_totals is not None
            blocks_lost = self.tier_totals.lose(lost)
            group = self.model.setup.group
            if group.size > 1:
                raise RankError(
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
        batch = Batch.build([_span(work) for work in step.work], self.cache.block_size, self.device)
        with self._recording(step, batch):
            logits: torch.Tensor = self.model(batch, self.cache)
            return logits

    def _recording(self, step: Step, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Records the forward run inside, if the run is traced."""
        if self.recorder is None:
            return contextlib.nullcontext()
        phase: Phase = "prefill" if step.is_prefill else "decode"
        return self.recorder.recording(phase, _sampled_rows(step), len(batch.tokens), len(step.work))


def _span(work: Work) -> Span:
    live: LiveRequest = work.live
    tokens = live.tokens[work.first_pos : work.first_pos + work.num_tokens]
    return Span(live.block_ids, work.first_pos, tokens, work.wants_logits)


def _sampled_rows(step: Step) -> list[ForwardRow]:
    """The batch row of each sampled work's last token."""
    ends = itertools.accumulate(work.num_tokens for work in step.work)
    return [
        ForwardRow(
            work.live.request_id,
            row=end - 1,
            seq_len=work.first_pos + work.num_tokens,
            step_idx=-1 if step.is_prefill else work.live.num_decode_steps,
            prefix_hit_tokens=work.live.prefix_hit_tokens or 0,
        )
        for work, end in zip(step.work, ends, strict=True)
        if work.wants_logits
    ]
