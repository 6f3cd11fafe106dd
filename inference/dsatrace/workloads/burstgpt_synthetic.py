"""A BurstGPT row, a generator of such rows, and prompts for rows that have lengths only.

Gaps are Gamma distributed and lengths follow Zipf's law up to a largest one, as the data
set's authors model them; the other shares are ours. All of it is synthetic: it supports no
claim about what people ask or about locality. Knows no tokenizer.

    rows = list(generate_burstgpt(BurstSettings(num_rows=100, seed=7)))
    prompts = SyntheticPrompts(first_token_id=3, num_token_ids=256, shared_share=0.5)
    prompts.token_ids(rows[0])
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import uuid
from collections.abc import Iterator

from dsatrace.errors import UserError

API_LOG, CONVERSATION_LOG = "API log", "Conversation log"


@dataclasses.dataclass(frozen=True)
class BurstRow:
    """One logged request."""

    source_row: int
    timestamp_s: float  # since the service's first midnight
    request_tokens: int
    response_tokens: int  # 0: the request failed
    model: str = ""
    log_type: str = ""
    session_id: str | None = None  # of conversations only
    elapsed_s: float | None = None  # to the whole response, as the service measured it

    @property
    def failed(self) -> bool:
        return self.response_tokens == 0


@dataclasses.dataclass(frozen=True)
class BurstSettings:
    """The generator's parameters. Gap mean = shape x scale; a shape below 1 makes bursts.

    A length k from 1 to the largest has a probability proportional to k ** -zipf_exponent.
    Shape, scale and exponent are the defaults of the authors' generator.
    """

    num_rows: int = 2000
    seed: int = 0
    gap_shape: float = 0.25
    gap_scale_s: float = 2.0
    zipf_exponent: float = 1.1
    max_request_tokens: int = 4096
    max_response_tokens: int = 1024
    num_open_sessions: int = 16
    mean_session_rows: float = 4.0
    api_share: float = 0.5
    gpt4_share: float = 0.15
    failure_share: float = 0.07

    def __post_init__(self) -> None:
        for name in ("num_rows", "max_request_tokens", "max_response_tokens", "num_open_sessions"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("gap_shape", "gap_scale_s"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive")
        self._require("zipf_exponent", 0 <= self.zipf_exponent < 100, "from 0 to 100")
        self._require("mean_session_rows", 1 <= self.mean_session_rows < math.inf, "at least 1")
        for name in ("api_share", "gpt4_share", "failure_share"):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")

    def _require(self, name: str, holds: bool, range_: str) -> None:
        if not holds:
            raise UserError(f"{name} of generated arrivals must be {range_}, not {getattr(self, name)}")

    def text(self) -> str:
        """All parameters on one line."""
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


def generate_burstgpt(settings: BurstSettings) -> Iterator[BurstRow]:
    """`num_rows` rows, the same for the same settings; timestamps from 0, to the millisecond.

    API rows have no session. A conversation row joins one of `num_open_sessions`; a session
    ends after `mean_session_rows` rows on average, and a new one takes its place. Half of the
    failures have no request tokens either, like many of the real ones.
    """
    draw = random.Random(settings.seed)
    requests = _zipf_weights(settings.max_request_tokens, settings.zipf_exponent)
    responses = _zipf_weights(settings.max_response_tokens, settings.zipf_exponent)
    sessions = [_session_id(draw) for _ in range(settings.num_open_sessions)]
    time_s = 0.0
    for row in range(settings.num_rows):
        api = draw.random() < settings.api_share
        failed = draw.random() < settings.failure_share
        lost = failed and draw.random() < 0.5
        place = draw.randrange(len(sessions))
        yield BurstRow(
            source_row=row,
            timestamp_s=round(time_s, 3),
            request_tokens=0 if lost else _zipf(draw, requests),
            response_tokens=0 if failed else _zipf(draw, responses),
            model="GPT-4" if draw.random() < settings.gpt4_share else "ChatGPT",
            log_type=API_LOG if api else CONVERSATION_LOG,
            session_id=None if api else sessions[place],
        )
        if not api and draw.random() < 1 / settings.mean_session_rows:
            sessions[place] = _session_id(draw)
        time_s += draw.gammavariate(settings.gap_shape, settings.gap_scale_s)


def _zipf_weights(largest: int, exponent: float) -> list[float]:
    """Cumulative weights of the lengths 1 to `largest`."""
    return list(itertools.accumulate(k**-exponent for k in range(1, largest + 1)))


def _zipf(draw: random.Random, cumulative: list[float]) -> int:
    return draw.choices(range(1, len(cumulative) + 1), cum_weights=cumulative)[0]


def _session_id(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


@dataclasses.dataclass(frozen=True)
class SyntheticPrompts:
    """Prompts of random ids: `num_token_ids` ids from `first_token_id` on.

    The first `shared_share` of a row's prompt (rounded down) is the beginning of its session's
    stream of ids, so two prompts of a session share the shorter of these beginnings. The rest
    is the row's own. A row without a session shares nothing. Seed, session and row decide all.
    """

    first_token_id: int
    num_token_ids: int
    shared_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first_token_id < 0 or self.num_token_ids < 1:
            raise UserError(
                f"synthetic prompts need token ids to draw from, not {self.num_token_ids} of them "
                f"from {self.first_token_id} on"
            )
        if not 0 <= self.shared_share <= 1:
            raise UserError(f"shared_share must lie between 0 and 1, not {self.shared_share}")

    def token_ids(self, row: BurstRow) -> tuple[int, ...]:
        """As many ids as the row's request had tokens; one if it had none: no prompt can be empty."""
        num_tokens = max(1, row.request_tokens)
        num_shared = 0 if row.session_id is None else math.floor(num_tokens * self.shared_share)
        shared = self._draw(f"session {row.session_id}", num_shared)
        own = self._draw(f"row {row.source_row}", num_tokens - num_shared)
        return (*shared, *own)

    def _draw(self, stream: str, num_ids: int) -> list[int]:
        draw = random.Random(f"{self.seed} {stream}").random
        first, count = self.first_token_id, self.num_token_ids
        return [first + int(draw() * count) for _ in range(num_ids)]
