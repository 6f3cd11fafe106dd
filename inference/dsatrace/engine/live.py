"""A request while it is being served: its tokens so far, its blocks, its clock.

Knows no model and no pool; the scheduler is the only one that changes it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..workloads.request import Request

State = Literal["waiting", "running", "stop", "length", "aborted"]


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """`num_computed` tokens have their KV in the cache; `tokens` holds prompt and answer."""

    request: Request
    tokens: list[int]
    block_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    state: State = "waiting"
    num_decode_steps: int = 0
    first_token_s: float | None = None
    finish_s: float | None = None

    @classmethod
    def of(cls, request: Request) -> LiveRequest:
        return cls(request, list(request.prompt_token_ids))

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def answer(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_len :]

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.prompt_len

    @property
    def max_len(self) -> int:
        """Tokens whose KV may have to be held: the last generated token is never read."""
        return self.prompt_len + self.request.max_new_tokens - 1
