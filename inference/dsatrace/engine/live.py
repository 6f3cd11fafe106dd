"""A request while it is being served: its tokens so far, its blocks, its times.

Knows no model and no pool. The scheduler changes it; the engine adds the time of its prefill and,
when it has ended, its score and what its line in the trace says of its answer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsatrace.kv.prefix import KeyChain
from dsatrace.kv.prefix_pool import HeldBlocks
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.workloads.request import Request

State = Literal["waiting", "running", "stop", "length", "aborted", "rejected", "failed"]


@dataclasses.dataclass(eq=False)
class LiveRequest(RequestFacts):
    """The facts of a request, and what it takes to serve it.

    `num_computed` tokens have their KV in the cache; `tokens` holds prompt and answer.
    """

    request: Request
    tokens: list[int]
    held: HeldBlocks | None = None  # from the start of its prefill until it leaves
    key_chain: KeyChain | None = None  # of `tokens`, where prefixes are cached
    num_promised_blocks: int = 0  # for its table, before it has one
    num_computed: int = 0
    state: State = dataclasses.field(default="waiting", kw_only=True)
    num_decode_steps: int = 0  # what is computed again counts once
    answer_end: int | None = None  # tokens generated when it first ended its answer and went on
    recomputes_in_vain: int = 0  # of `num_recomputes`, since its last token
    resumed_tokens: int = 0  # looked up when it was computed again: prompt and answer so far
    resumed_hit_tokens: int = 0  # found cached of those
    prompt_len: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_token_ids)

    @classmethod
    def of(cls, request: Request) -> LiveRequest:
        return cls(request, list(request.prompt_token_ids))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def block_ids(self) -> list[int]:
        """Its block table."""
        return self.held.block_ids if self.held is not None else []

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_len :]

    @property
    def answer(self) -> list[int]:
        """The generated tokens, up to where the answer ended if it went on past its end."""
        return self.generated[: self.answer_end]

    @property
    def past_answer(self) -> list[int]:
        """What it generated after its answer, the end of sequence included."""
        return [] if self.answer_end is None else self.generated[self.answer_end :]

    @property
    def num_answered(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def tokens_left(self) -> int:
        """Tokens it may still generate."""
        return self.request.max_new_tokens - self.num_answered

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def prefill_end(self) -> int:
        """Tokens that are computed in chunks: the prompt, whose last one gives the first token.

        A request that lost its blocks after its prompt, to a preemption or a tier, recomputes all
        tokens but the last, which then repeats the decode step that was interrupted: so its steps
        are those of an undisturbed run.
        """
        num_tokens = len(self.tokens)
        return num_tokens - 1 if num_tokens > self.prompt_len else num_tokens

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.prefill_end

    @property
    def max_len(self) -> int:
        """Tokens whose KV may have to be held: the last generated token is never read."""
        return self.prompt_len + self.request.max_new_tokens - 1
