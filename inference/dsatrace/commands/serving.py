"""What a serving command needs beside its flags, and the answering of prompts from a file."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsatrace.commands.interrupt import on_interrupt
from dsatrace.commands.progress import totals_bar
from dsatrace.engine.engine import Engine
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import is_rank_0
from dsatrace.model.transformer import Transformer
from dsatrace.runner.settings import ModelSettings
from dsatrace.runner.setup import load_model, open_engine
from dsatrace.text import counted, plain, plain_lines
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.request import Request

PAST_ANSWER = "past its answer"
"""Stands before what a model was made to say after the end of its answer."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """A loaded model and how it is asked."""

    model: Transformer
    settings: ModelSettings
    device: torch.device
    chat: Chat
    max_new_tokens: int
    temperature: float
    system_prompt: str
    run: RunSettings

    @property
    def is_rank_0(self) -> bool:
        return self.model.setup.group.rank == 0

    def encode(self, turns: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, behind the system prompt when there is one."""
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return self.chat.encode([*system, *turns])

    def open(self, num_requests: int, longest: int | None = None) -> AbstractContextManager[Engine]:
        """`open_engine` for this model."""
        run = dataclasses.replace(self.run, num_requests=num_requests, longest=longest)
        return open_engine(self.model, self.settings, self.device, run)


def load_model_shown(settings: ModelSettings, device: torch.device) -> Transformer:
    """`load_model`, with progress on rank 0's stderr."""
    elsewhere = "loading {} of weights ..."
    with totals_bar("loading weights", shown=is_rank_0(), elsewhere=elsewhere) as progress:
        return load_model(settings, device, progress)


def answer_prompts(serving: Serving, prompts: Sequence[str]) -> int:
    """Answers each prompt by itself and prints the answers in order. Returns 130 when interrupted, 1 when
    a prompt failed because a tier lost its KV, or the trace did."""
    encoded = [serving.encode([Message("user", prompt)]) for prompt in prompts]
    longest = max(map(len, encoded)) + serving.max_new_tokens
    with serving.open(len(prompts), longest) as engine:
        requests = [
            Request(f"r{i}", tuple(ids), serving.max_new_tokens, serving.temperature, source_row=i)
            for i, ids in enumerate(encoded)
        ]
        live = [engine.submit(request) for request in requests]
        with on_interrupt(engine.request_abort):
            report = _run_with_progress(engine, live, serving.is_rank_0)
        if serving.is_rank_0:
            for request in live:
                failed = request.error is not None
                said = f"error: {request.error}" if failed else serving.chat.text(request.answer)
                print(f"[{request.request_id}] {plain_lines(said)}\n")
                if rest := serving.chat.text(request.past_answer):
                    print(f"[{request.request_id}, {PAST_ANSWER}] {plain_lines(rest)}\n")
            print(report)
            if engine.tell_tiers is not None:
                print(plain_lines(engine.tell_tiers()))
        if any(request.state == "aborted" for request in live):
            engine.mark_incomplete()
            if serving.is_rank_0:
                print("interrupted", file=sys.stderr)
            return 130
    if serving.run.trace is not None:
        print(f"trace: {plain(serving.run.trace.out)}")
    num_failed = sum(request.state == "failed" for request in live)
    if num_failed and serving.is_rank_0:
        why = "each says why where its answer would stand"
        print(f"error: {num_failed} of {len(live)} prompts failed; {why}", file=sys.stderr)
    trace_failed = engine.tracer is not None and engine.tracer.has_failed
    return int(num_failed > 0 or trace_failed)


def _run_with_progress(engine: Engine, live: Sequence[LiveRequest], shown: bool) -> str:
    """Runs to the end under a progress bar of tokens; returns a line of what it took."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    prompt_tokens = sum(request.prompt_len for request in live)
    started = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        bar = progress.add_task("prefill", total=prompt_tokens + sum(r.request.max_new_tokens for r in live))
        while engine.scheduler.has_work:
            engine.step()
            under_way = [request for request in live if not request.ended]
            in_prefill = any(request.in_prefill for request in under_way)
            done = sum(r.prompt_len + r.request.max_new_tokens for r in live if r.ended)
            done += sum(request.num_computed for request in under_way)
            progress.update(bar, completed=done, description="prefill" if in_prefill else "decode")
    seconds = time.perf_counter() - started
    generated = sum(request.num_answered for request in live)
    cached_tokens = sum(request.prefix_hit_tokens or 0 for request in live)
    cached = f" ({cached_tokens} from the prefix cache)" if cached_tokens else ""
    requests = counted(len(live), "request")
    report = f"{requests}, {prompt_tokens} tokens in{cached}, {generated} out in {seconds:.1f} s"
    if engine.num_decode_tokens:
        report += f" ({engine.num_decode_tokens / engine.decode_s:.1f} tokens/s in decode)"
    return report
