"""Drives a workload through the engine: source, model or simulator, trace, progress, the end.

The runners differ in their flags only; everything else is here.

    return run_workload(args, argv, RULER)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsatrace.commands.arguments import end_settings_from_args, settings_from_args
from dsatrace.commands.damage import damage_named
from dsatrace.commands.interrupt import on_interrupt
from dsatrace.commands.progress import Advance, requests_bar
from dsatrace.commands.run_arguments import find_rows
from dsatrace.engine.clock import Clock, RealClock, VirtualClock
from dsatrace.engine.engine import Engine, serve
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Admission
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import is_rank_0
from dsatrace.runner.distributed import from_rank_0
from dsatrace.text import counted, plain, plain_lines
from dsatrace.trace.config import TraceConfig, run_config_from_args
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.resume import Resumed, prepare_resume
from dsatrace.workloads.chat import PLAIN_TEXT, SAID_OF_PLAIN_TEXT, Chat, choose_chat
from dsatrace.workloads.data_set import DataSet, OpenedWorkload, Source, Workload
from dsatrace.workloads.request import Request
from dsatrace.workloads.tokenizer import check_vocabulary, choose_tokenizer


@dataclasses.dataclass(frozen=True)
class ServingSettings:
    """How requests are served; by default all of them are there from the start."""

    admission: Admission = "continuous"
    clock: str | None = None  # None: nothing arrives over time, so no latency is claimed

    def new_clock(self, start_s: float) -> Clock:
        return VirtualClock(start_s) if self.clock == "virtual" else RealClock(start_s)


def run_workload(
    args: argparse.Namespace,
    argv: Sequence[str],
    data_set: DataSet,
    serving: ServingSettings = ServingSettings(),
) -> int:
    """Serves every request of the data set; returns the exit code: 130 when interrupted, 1 when a request
    or the trace failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names in a data set may be what a terminal cannot show
    tokenizer = choose_tokenizer(args.tokenizer, args.ckpt_path)
    chat = choose_chat(tokenizer, args.ckpt_path, template=args.chat_template, thinking=args.thinking)
    run = _Run(args, tuple(argv), data_set, chat, serving)
    with run.on_model() if args.runner == "model" else run.on_simulator() as (engine, opened, done):
        tally = _serve(engine, opened, done, chat)
        interrupted = tally.states["aborted"] > 0 or tally.stopped
        if engine.tracer is not None:
            described = opened.workload.describe()
            if chat.thinking:
                described["counts"] = {**described["counts"], "only_thoughts": tally.num_only_thoughts}
            engine.tracer.describe_workload(described)
        if interrupted:
            engine.mark_incomplete()
        folder = None if engine.tracer is None else engine.tracer.config.out
        tiers = None if engine.tell_tiers is None else engine.tell_tiers()
    if folder is not None:
        _print_results(folder, tally, tiers)
        if interrupted:
            print(f"interrupted; go on with --resume {plain(folder)}", file=sys.stderr)
    if interrupted:
        return 130
    trace_failed = engine.tracer is not None and engine.tracer.has_failed
    return int(tally.states["failed"] > 0 or trace_failed)


class ResumePoint(NamedTuple):
    """Where a resumed run continues; all ranks must agree on it."""

    done: frozenset[str] = frozenset()
    next_forward_idx: int = 0
    elapsed_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run as its flags describe it, on the model or on the simulator."""

    args: argparse.Namespace
    argv: tuple[str, ...]
    data_set: DataSet
    chat: Chat
    serving: ServingSettings

    @contextlib.contextmanager
    def on_model(self) -> Iterator[tuple[Engine, OpenedWorkload, frozenset[str]]]:
        """Engine, workload and the requests that are done, in the process group of all ranks."""
        from dsatrace.commands.serving import load_model_shown
        from dsatrace.runner.distributed import process_group
        from dsatrace.runner.setup import open_engine

        settings = settings_from_args(self.args)
        check_vocabulary(self.chat.tokenizer, settings.model_args().vocab_size)
        with process_group(settings.device) as device:
            opened, resumed, resume_point = self._begin()
            run = self._run_settings(opened, resumed, resume_point, step_time="measured")
            model = load_model_shown(settings, device)
            with open_engine(model, settings, device, run) as engine:
                yield engine, opened, resume_point.done

    @contextlib.contextmanager
    def on_simulator(self) -> Iterator[tuple[Engine, OpenedWorkload, frozenset[str]]]:
        """The same without model and torch; answers are the recorded ones."""
        from dsatrace.engine.simulator import echo, open_simulator

        opened, resumed, resume_point = self._begin()

        def respond(request: Request) -> Sequence[int]:
            return opened.workload.recorded(request) or echo(request)

        run = self._run_settings(opened, resumed, resume_point, step_time="modelled")
        with open_simulator(settings_from_args(self.args), run, respond) as engine:
            yield engine, opened, resume_point.done

    def _run_settings(
        self, opened: OpenedWorkload, resumed: Resumed | None, resume_point: ResumePoint, step_time: str
    ) -> RunSettings:
        return RunSettings(
            stop_tokens=self.chat.stop_tokens,
            end=end_settings_from_args(self.args),
            admission=self.serving.admission,
            clock=self.serving.new_clock(resume_point.elapsed_s),
            judge=self._judge(opened.workload) if is_rank_0() else None,
            answer_text=self.chat.text if self.args.save_text else None,
            save_tokens=self.args.save_tokens,
            trace=self._trace_config(resumed) if is_rank_0() else None,
            traced=not self.args.no_trace,
            info=partial(
                RunInfo,
                argv=self.argv,
                tokenizer=self.chat.tokenizer.name,
                chat=opened.chat_form,
                data_source=opened.description,
                serving=self._serving_facts(step_time),
            ),
            resumed=resumed,
            first_forward_idx=resume_point.next_forward_idx,
        )

    def _begin(self) -> tuple[OpenedWorkload, Resumed | None, ResumePoint]:
        """The workload, and where a resumed run goes on; its folder is rank 0's to change."""
        resumed = None
        if self.args.resume and is_rank_0():
            with damage_named(self.args.resume):
                resumed = prepare_resume(self.args.resume)
        resume_point = ResumePoint()
        if resumed is not None:
            resume_point = ResumePoint(resumed.done, resumed.next_forward_idx, resumed.elapsed_s)
        resume_point = from_rank_0(lambda: resume_point)
        opened = self.data_set.open(self.args, self.chat, self._find)
        if is_rank_0():
            print(plain(opened.terminal_line))
            if opened.chat_form == PLAIN_TEXT:
                print(SAID_OF_PLAIN_TEXT, file=sys.stderr)
        return opened, resumed, resume_point

    def _find(self, repo: str | None = None) -> Source:
        """Rank 0 finds the rows for all ranks; they might disagree about a slow hub."""
        return from_rank_0(lambda: find_rows(self.args, self.data_set, repo))

    def _trace_config(self, resumed: Resumed | None) -> TraceConfig:
        if resumed is None:
            return run_config_from_args(self.args, self.data_set.name, self.args.seed)
        self.args.trace_out = None  # it is the folder that holds the run
        return dataclasses.replace(run_config_from_args(self.args, None, self.args.seed), out=resumed.folder)

    def _serving_facts(self, step_time: str) -> dict[str, object] | None:
        if self.serving.clock is None:
            return None
        return {
            "mode": self.serving.admission,
            "clock": self.serving.clock,
            "max_batch_size": self.args.max_batch_size,
            "step_time": step_time,
        }

    def _judge(self, workload: Workload) -> Callable[[LiveRequest], float | None]:
        def judge(live: LiveRequest) -> float | None:
            answer = self.chat.answer(live.answer) or []  # thoughts without an end are no answer
            return workload.judge(live.request_id, self.chat.tokenizer.decode(answer))

        return judge


@dataclasses.dataclass
class _Tally:
    """The results of the requests served now."""

    states: Counter[str]
    num_skipped: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    num_only_thoughts: int = 0  # answers whose thoughts never ended
    seconds: float = 0.0
    stopped: bool = False
    first_failure: str | None = None

    def text(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))
        line = f"{counted(self.states.total(), 'request')} ({states}), " if states else "no requests, "
        cached = f" ({self.cached_tokens:,} from the prefix cache)" if self.cached_tokens else ""
        line += f"{self.prompt_tokens:,} tokens in{cached}, {self.new_tokens:,} out in {self.seconds:.1f} s"
        return line + (f"; {self.num_skipped} served before" if self.num_skipped else "")


def _serve(engine: Engine, opened: OpenedWorkload, done: frozenset[str], chat: Chat) -> _Tally:
    """Serves what is not done yet, under a progress bar and until Ctrl-C."""
    tally, workload = _Tally(Counter()), opened.workload

    def still_to_do() -> Iterator[Request]:
        for request in workload.requests():
            if request.request_id not in done:
                yield request
                continue
            engine.skip(request)
            workload.forget(request.request_id)
            tally.num_skipped += 1
            advance(1)

    def stop() -> None:
        tally.stopped = True
        engine.request_abort()

    bar: contextlib.AbstractContextManager[Advance] = contextlib.nullcontext(lambda amount: None)
    if is_rank_0():
        bar = requests_bar(opened.num_requests, lambda: _status(engine))
    started = time.perf_counter()
    with on_interrupt(stop), bar as advance:
        for live in serve(engine, still_to_do()):
            workload.forget(live.request_id)
            tally.states[live.state] += 1
            tally.num_only_thoughts += live.state in ("stop", "length") and chat.answer(live.answer) is None
            if live.state == "failed" and tally.first_failure is None:
                tally.first_failure = live.error
            tally.prompt_tokens += live.prompt_len
            tally.cached_tokens += live.prefix_hit_tokens or 0
            tally.new_tokens += live.num_answered
            advance(1)
    tally.seconds = time.perf_counter() - started
    return tally


def _status(engine: Engine) -> str:
    """One line. The bar's own thread calls this while the engine works."""
    running = list(engine.scheduler.running)
    prefill = [(live.num_computed, live.prefill_end) for live in running if live.in_prefill]
    computed, total = (sum(column) for column in zip(*prefill, strict=True)) if prefill else (0, 0)
    shown = [f"{len(running)} running"]
    if engine.num_decode_tokens:
        shown.append(f"{engine.num_decode_tokens / engine.decode_s:,.1f} tokens/s in decode")
    if prefill:
        shown.append(f"prefill {computed:,}/{total:,} tokens")
    return ", ".join(shown)


def _print_results(folder: Path, tally: _Tally, tiers: str | None) -> None:
    from dsatrace.report.grid import show
    from dsatrace.report.workload_tables import workload_tables
    from dsatrace.trace.reader import RunReader

    print(tally.text())
    if tally.num_only_thoughts:
        print(f"answers of thoughts alone, which never ended: {tally.num_only_thoughts}, judged as empty")
    if tiers is not None:
        print(plain_lines(tiers))
    if tally.first_failure is not None:
        print(
            f"error: {tally.states['failed']} failed, the first: {plain(tally.first_failure)}",
            file=sys.stderr,
        )
    show(workload_tables(RunReader(folder).summary()))
    print(f"run: {plain(folder)}\nmore: dsatrace report {plain(folder)}")
