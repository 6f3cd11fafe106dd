"""The token simulator: a `Runner` that computes nothing, for the same scheduler and block pool.

It echoes the prompt or replays recorded responses, and its steps take a modelled time, so a
day of requests is served in seconds without weights and without torch. Its tokens say
nothing about a model, its times nothing about a machine. `simulate_prefixes` asks the same
scheduler which prefixes it would find cached.

    with open_simulator(EngineSettings(), RunSettings(stop_tokens=frozenset({1}))) as engine:
        for live in serve(engine, requests):
            live.answer      # the prompt again, and the end token
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import VirtualClock
from dsatrace.engine.ending import ENDS_BY_ITSELF, EndSettings
from dsatrace.engine.engine import Engine, serve
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.runner import Step
from dsatrace.engine.scheduler import Admission, Scheduler
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.errors import UserError
from dsatrace.kv.blocks import blocks_needed
from dsatrace.kv.layout import CacheLayout
from dsatrace.trace.tracer import Tracer
from dsatrace.workloads.request import Request

MAX_SEQ_LEN = 163_840
"""Tokens a simulated request may hold unless `--max-seq-len` says otherwise: DeepSeek-V3.2's own limit."""

Respond = Callable[[Request], Sequence[int]]
"""The tokens that answer a request. The end token follows or, for a request that does not stop there,
the same tokens again."""


def echo(request: Request) -> Sequence[int]:
    """The prompt."""
    return request.prompt_token_ids


def replay(responses: Mapping[str, Sequence[int]]) -> Respond:
    """Recorded token ids by request id."""

    def respond(request: Request) -> Sequence[int]:
        try:
            return responses[request.request_id]
        except KeyError:
            raise UserError(
                f"request {request.request_id}: no recorded response; record one or let the simulator echo"
            ) from None

    return respond


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The modelled time of a step: linear in what it computes and reads. Nanoseconds.

    The defaults have the order of magnitude of one large server; no machine was measured for them.
    """

    step_ns: int = 20_000_000  # any step
    prefill_token_ns: int = 100_000  # a prompt token computed
    decode_token_ns: int = 500_000  # a request in a decode step
    context_token_ns: int = 50  # a token that a decode step sees

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 0:
                raise UserError(f"{field.name} {value!r}: use a whole number of nanoseconds, at least 0")

    def of(self, step: Step, num_steps: int) -> int:
        """The sum over `num_steps` decode steps, whose contexts grow by a token each; or one chunk's."""
        if step.is_prefill:
            return self.step_ns + self.prefill_token_ns * sum(work.num_tokens for work in step.work)
        batch_size = len(step.work)
        seen = num_steps * sum(work.first_pos for work in step.work)
        seen += batch_size * num_steps * (num_steps + 1) // 2
        fixed_ns = self.step_ns + self.decode_token_ns * batch_size
        return num_steps * fixed_ns + self.context_token_ns * seen


class TokenSimulator:
    """Answers with what `respond` says, up to its first `end_token`, which is added where it has none.

    A request that does not stop there gets the answer over and over, as many tokens as it asks for; one
    that `end` lets go on past its answer gets it over and over until it may end.
    """

    def __init__(
        self,
        end_token: int,
        respond: Respond = echo,
        step_time: StepTime | None = None,
        end: EndSettings = ENDS_BY_ITSELF,
    ) -> None:
        self.end_token = end_token
        self.respond = respond
        self.step_time = step_time or StepTime()
        self.end = end
        self._answers: dict[str, list[int]] = {}  # of the running requests

    def run(self, step: Step) -> list[list[int]]:
        sampled = []
        for live in step.sampled:
            answer = self._answer(live)
            sampled.append(answer[live.num_answered : live.num_answered + step.num_steps])
        return sampled

    def lookahead(self, live: LiveRequest) -> int:
        return len(self._answer(live)) - live.num_answered

    def modelled_ns(self, step: Step, num_steps: int) -> int | None:
        return self.step_time.of(step, num_steps)

    def forget(self, request_id: str) -> None:
        self._answers.pop(request_id, None)

    def _answer(self, live: LiveRequest) -> list[int]:
        request = live.request
        answer = self._answers.get(request.request_id)
        if answer is None:
            answer = [*self.respond(request), self.end_token]
            if request.stop_at_eos:
                del answer[answer.index(self.end_token) + 1 :]
                answer = self._until_it_may_end(answer, live)
            else:
                answer = self._repeated(answer, request.max_new_tokens)
            self._answers[request.request_id] = answer
        return answer

    def _until_it_may_end(self, answer: list[int], live: LiveRequest) -> list[int]:
        """`answer` ends with the end token; notes in `live` where it ended if it goes on."""
        num_tokens, ignore = len(answer) - 1, self.end.ignore_eos
        if not ignore and num_tokens >= self.end.min_new_tokens:
            return answer
        live.answer_end = num_tokens
        if ignore:
            return self._repeated(answer, live.request.max_new_tokens)
        return [*self._repeated(answer, self.end.min_new_tokens), self.end_token]

    def _repeated(self, answer: list[int], num_tokens: int) -> list[int]:
        period = answer[:-1] or answer
        return (period * -(-num_tokens // len(period)))[:num_tokens]


@contextlib.contextmanager
def open_simulator(
    settings: EngineSettings,
    run: RunSettings,
    respond: Respond = echo,
    step_time: StepTime | None = None,
) -> Iterator[Engine]:
    """An engine without a model, `open_engine`'s counterpart; an answer ends with the least stop token.

    The pool has room for a batch of the longest requests, or `cache_blocks`. Leaving the block ends the
    trace, which holds the requests and never a selection.
    """
    max_seq_len = settings.max_seq_len or MAX_SEQ_LEN
    block_size = settings.cache_block_size
    num_blocks = settings.cache_blocks or settings.max_batch_size * blocks_needed(max_seq_len, block_size)
    end_token = min(run.stop_tokens)
    scheduler = Scheduler(
        new_pool(num_blocks, block_size, settings.prefix_caching),
        settings.max_batch_size,
        settings.prefill_chunk,
        frozenset({end_token}),
        max_seq_len=max_seq_len,
        admission=run.admission,
        end=run.end,
    )
    run = dataclasses.replace(run, clock=run.clock or VirtualClock())
    with contextlib.ExitStack() as stack:
        tracer = None
        if run.trace is not None:
            info = run.info(
                model_config={},
                layouts=[CacheLayout("none", 0, 0)],
                device="none: token simulator",
                seed=settings.seed,
                selections="none",
                prefix_source="cache" if settings.prefix_caching else "analysis",
                answer_end=run.end.to_json(),
            )
            tracer = stack.enter_context(Tracer(run.trace, info, resumed=run.resumed))
        yield Engine(scheduler, TokenSimulator(end_token, respond, step_time, run.end), tracer, run)


NO_TOKEN = -1
"""Ends answers: no vocabulary has it."""

Turn = tuple[float, Sequence[int], Sequence[int]]
"""Arrival in seconds since the start, token ids of the prompt, token ids of the answer."""


def simulate_prefixes(
    turns: Iterable[Turn],
    *,
    block_size: int,
    num_blocks: int,
    max_batch_size: int = 1,
    prefill_chunk: int = 256,
    prefix_caching: bool = True,
    admission: Admission = "continuous",
    step_time: StepTime | None = None,
) -> Iterator[LiveRequest]:
    """The requests as they end; `request_id` is the number in `turns`, which are sorted by arrival.

    `prefix_hit_tokens` is what a request found cached when its prefill first began, `resumed_hit_tokens`
    what it found after preemptions.

    Chunked prefill, decode, growth and preemption are the engine's own; only tokens and times are made
    up. `kv.simulation.replay` asks the block pool alone and is much faster. One request at a time the
    two agree: the engine never computes its last token, as under `schedule="continuous"`.

    `step_time` says how long a request stays, and so which requests are served together. A request whose
    answer is empty ends with its prompt.
    """
    answers: dict[str, Sequence[int]] = {}

    def requests() -> Iterator[Request]:
        for i, (arrival_s, prompt, answer) in enumerate(turns):
            answers[f"{i}"] = answer
            num_tokens = max(1, len(answer))  # the first token comes with the prompt and costs no slot
            yield Request(f"{i}", tuple(prompt), num_tokens, arrival_s=arrival_s, stop_at_eos=False)

    pool = new_pool(num_blocks, block_size, prefix_caching)
    runner = TokenSimulator(NO_TOKEN, lambda request: answers[request.request_id], step_time)
    engine = Engine(
        Scheduler(pool, max_batch_size, prefill_chunk), runner, run=RunSettings(clock=VirtualClock())
    )
    for live in serve(engine, requests()):
        del answers[live.request_id]
        yield live
