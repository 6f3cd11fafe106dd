"""The four workloads as traces, and several traces as one.

    chat_single     the first turns of conversations
    chat_multi      their turns with history
    qa              short questions over shared contexts
    summarization   long documents

Chats may be real; the other two are always synthetic. Knows no tokenizer and no cache.

    traces = [workload_rows(name, formatter, num_requests=500) for name in WORKLOADS]
    rows = interleave(traces)                                     # by arrival
    rows = interleave(traces, ("qa", "qa", "chat_multi", "chat_single", "summarization"))
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from dsatrace.errors import UserError
from dsatrace.workloads.chat_format import ChatTemplateFormatter
from dsatrace.workloads.request_generator import (
    DEFAULT_ARRIVAL_RATE,
    DEFAULT_SEED,
    DEFAULT_TURN_DELAY_S,
    RequestGenerator,
)
from dsatrace.workloads.shared_context import (
    ChatSettings,
    QaSettings,
    SummarizationSettings,
    chat_conversations,
    qa_conversations,
    summarization_conversations,
)
from dsatrace.workloads.sharegpt import Conversation
from dsatrace.workloads.trace_rows import TraceRow

CHAT_SINGLE, CHAT_MULTI, QA, SUMMARIZATION = "chat_single", "chat_multi", "qa", "summarization"
WORKLOADS = (CHAT_SINGLE, CHAT_MULTI, QA, SUMMARIZATION)
DEFAULT_NUM_REQUESTS = 1000

_SYNTHETIC: dict[str, Callable[[int, int], list[Conversation]]] = {
    CHAT_SINGLE: lambda count, seed: chat_conversations(ChatSettings(num_conversations=count), seed),
    CHAT_MULTI: lambda count, seed: chat_conversations(ChatSettings(num_conversations=count), seed),
    QA: lambda count, seed: qa_conversations(QaSettings(num_requests=count), seed),
    SUMMARIZATION: lambda count, seed: summarization_conversations(
        SummarizationSettings(num_requests=count), seed
    ),
}


def workload_rows(
    name: str,
    formatter: ChatTemplateFormatter,
    conversations: Sequence[Conversation] | None = None,
    *,
    num_requests: int = DEFAULT_NUM_REQUESTS,
    arrival_rate: float = DEFAULT_ARRIVAL_RATE,
    turn_delay: float = DEFAULT_TURN_DELAY_S,
    seed: int = DEFAULT_SEED,
) -> Iterator[TraceRow]:
    """The rows of one workload by arrival, labelled with its name.

    From `conversations` if given (real ones, or those of `shared_context` with settings of
    your own), else synthetic: `num_requests` of them, for `chat_multi` so many conversations.
    Every workload draws texts and arrivals of its own from `seed`. In a mix, give `chat_single`
    and `chat_multi` different conversations, or each hits what the other has cached.
    """
    if name not in WORKLOADS:
        raise UserError(f"unknown workload {name!r}; use one of {', '.join(WORKLOADS)}")
    own_seed = seed + WORKLOADS.index(name) * 1_000_003  # else all would arrive at the same times
    if conversations is None:
        conversations = _SYNTHETIC[name](num_requests, own_seed)
    generator = RequestGenerator(conversations, arrival_rate, seed=own_seed, workload=name)
    if name == CHAT_MULTI:
        return generator.multi_turn_traces(formatter, turn_delay)
    return generator.single_turn_traces(formatter)


def interleave(
    traces: Sequence[Iterable[TraceRow]], pattern: Sequence[str] | None = None
) -> Iterator[TraceRow]:
    """One trace of several, each sorted by time.

    Without a pattern, by arrival; of two at the same time, the earlier trace's comes first.
    With one, a fixed round of workload names: each takes its workload's next row, and one that
    has run out is passed over. The rows then get the traces' arrival times in the new order,
    so that time still runs forwards; a turn's delay is no longer what it was.
    """
    if pattern is None:
        yield from heapq.merge(*traces, key=lambda row: row.timestamp)
        return
    rows = [row for trace in traces for row in trace]
    waiting: dict[str, collections.deque[TraceRow]] = collections.defaultdict(collections.deque)
    for row in rows:
        waiting[row.workload].append(row)
    missing = sorted(set(waiting).symmetric_difference(pattern))
    if missing:
        raise UserError(
            f"the pattern and the workloads differ in {', '.join(map(repr, missing))}; "
            "name each workload of the traces at least once, and no other"
        )
    times = iter(sorted(row.timestamp for row in rows))
    for name in itertools.cycle(pattern):
        if waiting[name]:
            yield dataclasses.replace(waiting[name].popleft(), timestamp=next(times))
        elif not any(waiting.values()):
            return
