"""A request while it is being served: its tokens so far, its blocks, its times.

Knows no model and no pool. The scheduler is the only one that changes it, but for its score
and the time of its prefill, which the engine adds.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsatrace.kv.block_keys import KeyChain
from dsatrace.kv.prefix_pool import HeldBlocks
from dsatrace.workloads.request import Request

State = Literal["waiting", "running", "stop", "length", "aborted", "rejected", "failed"]


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """`num_computed` tokens have their KV in the cache; `tokens` holds prompt and answer.

    Times are seconds from the run's start; None: it has not come to that.
    """

    request: Request
    tokens: list[int]
    held: HeldBlocks | None = None  # from the start of its prefill until it leaves
    key_chain: KeyChain | None = None  # of `tokens`, where prefixes are cached
    num_promised_blocks: int = 0  # for its table, before it has one
    num_computed: int = 0
    state: State = "waiting"
    num_decode_steps: int = 0  # what is computed again counts once
    num_preemptions: int = 0
    num_recomputes: int = 0  # times it is computed again because a tier lost its KV
    recomputes_in_vain: int = 0  # of those, since its last token
    prefix_hit_tokens: int | None = None  # found cached when its prefill first began
    resumed_tokens: int = 0  # looked up when it was computed again: prompt and answer so far
    resumed_hit_tokens: int = 0  # found cached of those
    num_prefill_tokens: int = 0  # computed in chunks, again after a preemption or a loss
    prefill_s: float = 0.0  # what those chunks took
    admitted_s: float | None = None  # for the first time
    first_token_s: float | None = None
    finish_s: float | None = None
    error: str | None = None  # why it was rejected or failed, in a line without its text
    score: float | None = None  # the task's, where there is a judge
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
    def answer(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_len :]

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

        A request that lost its blocks behind its prompt, to a preemption or a tier, recomputes all
        tokens but the last, which then goes through the decode step that was taken away: its steps
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
