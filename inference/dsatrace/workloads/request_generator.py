"""Conversations to requests with arrival times: their first turns alone, or every turn with its history.

    conversations = ShareGPTLoader("chats.json", max_conversations=1000).get_conversations()
    generator = RequestGenerator(conversations, arrival_rate=2.0, use_poisson=True, seed=42)
    formatter = ChatTemplateFormatter(tokenizer)
    single = generator.generate_single_turn_traces(formatter)
    multi = generator.generate_multi_turn_traces(formatter, turn_delay=1.0)

Answers are the recorded ones. When a turn came is not known, so turns follow each other after an
assumed time to write the answer and to think (`ThinkTime`), or at a fixed delay.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence

from dsatrace.errors import UserError
from dsatrace.workloads.chat_format import ChatTemplateFormatter
from dsatrace.workloads.sharegpt import ChatPrompt, Conversation
from dsatrace.workloads.trace_rows import MULTI_TURN, SINGLE_TURN, TraceRow

DEFAULT_ARRIVAL_RATE = 2.0
DEFAULT_SEED = 42
SLOWEST_RATE, FASTEST_RATE = 1e-6, 1e9  # so that no arrival time is beyond what a log can hold
MAX_TURN_DELAY_S = 1e6


@dataclasses.dataclass(frozen=True)
class ThinkTime:
    """Seconds from a turn to the next: its answer is written, then a person reads and thinks.

    Thinking is log-normal. Assumed for every chat; the defaults are rounded from the 66 gaps in 33
    sessions of BurstGPT_3's first 105 rows: median 112 s, sigma 1.45, 14 tokens a second.
    """

    median_s: float = 110.0
    sigma: float = 1.4  # of the logarithm: two thirds of the times lie within a factor of four
    words_per_s: float = 10.0  # of the answer

    def __post_init__(self) -> None:
        if not 0 < self.median_s <= MAX_TURN_DELAY_S:
            raise UserError(
                f"a median think time must be seconds above 0 and up to {MAX_TURN_DELAY_S:g}, "
                f"not {self.median_s}"
            )

    def delay_s(self, draw: random.Random, answer: str) -> float:
        writing = len(answer.split()) / self.words_per_s
        return writing + draw.lognormvariate(math.log(self.median_s), self.sigma)


class RequestGenerator:
    """Draws when each conversation begins, from the seed, the rate and their number alone.

    Conversation 0 begins at 0 s. With `use_poisson` the gaps to the following ones are
    exponential with mean 1 / `arrival_rate` seconds, else all equal to it. `arrival_rate` is
    in conversations per second, which in single-turn traces are requests per second.
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

    def generate_single_turn_traces(self, formatter: ChatTemplateFormatter) -> list[TraceRow]:
        """A row per conversation: its first human turn, after the system's text if it has one."""
        return [
            self._row(formatter, prompt, name, begin_s, SINGLE_TURN)
            for conversation, name, begin_s in self._begun()
            for prompt in itertools.islice(conversation.prompts("per_user_turn"), 1)
        ]

    def generate_multi_turn_traces(
        self, formatter: ChatTemplateFormatter, turn_delay: float | ThinkTime = ThinkTime()
    ) -> list[TraceRow]:
        """A row per human turn: its prompt is the history with the recorded answers, then the turn.

        Turn t of a conversation arrives after t delays of a `ThinkTime`, drawn from the seed and the
        conversation's id, or `turn_delay` x t seconds after the conversation began.
        Rows are sorted by arrival; at the same time, the earlier conversation's comes first.
        The last turn's response is empty if nobody answered it.
        """
        if not isinstance(turn_delay, ThinkTime) and not 0 <= turn_delay <= MAX_TURN_DELAY_S:
            raise UserError(
                f"turn_delay must be a number of seconds from 0 to {MAX_TURN_DELAY_S:g}, not {turn_delay}"
            )
        rows = [
            self._row(formatter, prompt, name, begin_s + after_s, MULTI_TURN)
            for conversation, name, begin_s in self._begun()
            for prompt, after_s in self._turns(conversation, name, turn_delay)
        ]
        return sorted(rows, key=lambda row: row.timestamp)

    def _turns(
        self, conversation: Conversation, name: str, turn_delay: float | ThinkTime
    ) -> Iterator[tuple[ChatPrompt, float]]:
        """Each prompt of a conversation, and how many seconds after its beginning it arrives."""
        draw, after_s = random.Random(f"{self.seed} think {name}"), 0.0
        for prompt in conversation.prompts("per_user_turn"):
            if not isinstance(turn_delay, ThinkTime):
                yield prompt, turn_delay * prompt.turn
                continue
            yield prompt, after_s
            after_s += turn_delay.delay_s(draw, prompt.answer)

    def _begun(self) -> Iterator[tuple[Conversation, str, float]]:
        """Each conversation, its id, and when it begins."""
        draw = random.Random(self.seed)
        begin_s = 0.0
        for conversation, name in zip(self.conversations, _unique_ids(self.conversations), strict=True):
            yield conversation, name, begin_s
            begin_s += draw.expovariate(self.arrival_rate) if self.use_poisson else 1 / self.arrival_rate

    def _row(
        self, formatter: ChatTemplateFormatter, prompt: ChatPrompt, name: str, arrival_s: float, mode: str
    ) -> TraceRow:
        return TraceRow(
            prompt=formatter.format_conversation(prompt.messages),
            response=prompt.answer,
            conversation_id=name,
            turn_index=prompt.turn,
            timestamp=arrival_s,
            mode=mode,
            workload=self.workload,
        )


def num_turns(conversation: Conversation) -> int:
    """The number of requests that a conversation makes: its human turns."""
    return sum(message.role == "user" for message in conversation.messages)


def _unique_ids(conversations: Sequence[Conversation]) -> list[str]:
    """The conversations' ids; another conversation of the same id gets its row's number added."""
    seen: set[str] = set()
    ids = []
    for conversation in conversations:
        name = conversation.conversation_id
        while name in seen:
            name += f"#{conversation.source_row}"
        seen.add(name)
        ids.append(name)
    return ids
