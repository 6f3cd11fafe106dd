"""Conversations to requests with arrival times: their first turns alone, or every turn with its history.

    conversations = ShareGPTLoader("chats.json", max_conversations=1000).get_conversations()
    generator = RequestGenerator(conversations, arrival_rate=2.0, use_poisson=True, seed=42)
    formatter = ChatTemplateFormatter(tokenizer)
    single = generator.generate_single_turn_traces(formatter)
    multi = generator.generate_multi_turn_traces(formatter, turn_delay=1.0)

Answers are the recorded ones: nothing is generated, and how long an answer takes is not
known, so turns follow each other at a fixed delay.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence

from dsatrace.errors import UserError
from dsatrace.workloads.chat_format import ChatTemplateFormatter
from dsatrace.workloads.sharegpt import ChatPrompt, Conversation
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN, TraceRow

DEFAULT_ARRIVAL_RATE = 2.0
DEFAULT_TURN_DELAY_S = 1.0
DEFAULT_SEED = 42
SLOWEST_RATE, FASTEST_RATE = 1e-6, 1e9  # so that no arrival time is beyond what a trace can hold
MAX_TURN_DELAY_S = 1e6


class RequestGenerator:
    """Draws when each conversation begins; the same for the same seed, rate and number, whatever they say.

    Conversation 0 begins at 0 s. With `use_poisson` the gaps to the following ones are
    exponential with mean 1 / `arrival_rate` seconds, else all equal to it. `arrival_rate` is
    in conversations a second, so requests a second in single-turn traces; multi-turn traces,
    which begin at the same times, have more requests in the same time.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        arrival_rate: float = DEFAULT_ARRIVAL_RATE,
        use_poisson: bool = True,
        seed: int = DEFAULT_SEED,
        *,
        workload: str = "",
    ) -> None:
        """`workload` labels the rows."""
        if not SLOWEST_RATE <= arrival_rate <= FASTEST_RATE:
            raise UserError(
                f"arrival_rate must be a number of requests a second from {SLOWEST_RATE:g} to "
                f"{FASTEST_RATE:g}, not {arrival_rate}"
            )
        self.conversations = conversations
        self.arrival_rate = arrival_rate
        self.use_poisson = use_poisson
        self.seed = seed
        self.workload = workload
        self._ids = _unique_ids(conversations)

    def generate_single_turn_traces(self, formatter: ChatTemplateFormatter) -> list[TraceRow]:
        """One row a conversation: its first human turn (behind the system's text, if it has one)."""
        return list(self.single_turn_traces(formatter))

    def generate_multi_turn_traces(
        self, formatter: ChatTemplateFormatter, turn_delay: float = DEFAULT_TURN_DELAY_S
    ) -> list[TraceRow]:
        """One row a human turn: its prompt is the history with the recorded answers, then the turn.

        Turn t of a conversation arrives `turn_delay` x t seconds after the conversation began.
        Rows stand by arrival; of two at the same time, the earlier conversation's comes first.
        The last turn's response is empty if nobody answered it.
        """
        return list(self.multi_turn_traces(formatter, turn_delay))

    def single_turn_traces(self, formatter: ChatTemplateFormatter) -> Iterator[TraceRow]:
        """The same rows one by one."""
        row = self._rows(formatter, SINGLE_TURN)
        for number, (begin_s, conversation) in enumerate(
            zip(self._begins_s(), self.conversations, strict=False)
        ):
            for prompt in conversation.prompts("per_user_turn"):
                yield row(number, prompt, begin_s)
                break

    def multi_turn_traces(
        self, formatter: ChatTemplateFormatter, turn_delay: float = DEFAULT_TURN_DELAY_S
    ) -> Iterator[TraceRow]:
        """The same rows one by one; holds the conversations that are under way, not their texts."""
        if not 0 <= turn_delay <= MAX_TURN_DELAY_S:
            raise UserError(
                f"turn_delay must be a number of seconds from 0 to {MAX_TURN_DELAY_S:g}, not {turn_delay}"
            )
        row = self._rows(formatter, MULTI_TURN)
        under_way: list[tuple[float, int, float, Iterator[ChatPrompt], ChatPrompt]] = []

        def advance(number: int, begin_s: float, prompts: Iterator[ChatPrompt]) -> None:
            prompt = next(prompts, None)
            if prompt is not None:
                arrival_s = begin_s + turn_delay * prompt.turn
                heapq.heappush(under_way, (arrival_s, number, begin_s, prompts, prompt))

        def due(until_s: float) -> Iterator[TraceRow]:
            while under_way and under_way[0][0] < until_s:
                arrival_s, number, begin_s, prompts, prompt = heapq.heappop(under_way)
                yield row(number, prompt, arrival_s)
                advance(number, begin_s, prompts)

        for number, (begin_s, conversation) in enumerate(
            zip(self._begins_s(), self.conversations, strict=False)
        ):
            yield from due(begin_s)
            advance(number, begin_s, conversation.prompts("per_user_turn"))
        yield from due(math.inf)

    def _begins_s(self) -> Iterator[float]:
        draw = random.Random(self.seed)
        begin_s = 0.0
        while True:
            yield begin_s
            begin_s += draw.expovariate(self.arrival_rate) if self.use_poisson else 1 / self.arrival_rate

    def _rows(
        self, formatter: ChatTemplateFormatter, mode: str
    ) -> Callable[[int, ChatPrompt, float], TraceRow]:
        def row(number: int, prompt: ChatPrompt, arrival_s: float) -> TraceRow:
            return TraceRow(
                prompt=formatter.format_conversation(prompt.messages),
                response=prompt.answer,
                conversation_id=self._ids[number],
                turn_index=prompt.turn,
                timestamp=arrival_s,
                mode=mode,
                workload=self.workload,
            )

        return row


def num_turns(conversation: Conversation) -> int:
    """How many requests a conversation makes: its human turns."""
    return sum(message.role == "user" for message in conversation.messages)


def _unique_ids(conversations: Sequence[Conversation]) -> list[str]:
    """The conversations' ids; one seen before gets its row's number, since it is another conversation."""
    seen: set[str] = set()
    ids = []
    for conversation in conversations:
        name = conversation.conversation_id
        while name in seen:
            name += f"#{conversation.source_row}"
        seen.add(name)
        ids.append(name)
    return ids
