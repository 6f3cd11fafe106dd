"""The request: what every workload yields and the engine serves.

Request("r0", prompt_token_ids=(0, 17, 4), max_new_tokens=8)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    `arrival_s` is seconds from the run's start; `source_row` is the row of the data
    set the prompt came from. `labels` name the groups its score is averaged in, such as
    `{"task": "vt"}`. `needle_positions` are the token positions of the prompt that hold
    the answer, ascending, where the workload knows them. Without `stop_at_eos` the answer
    always has `max_new_tokens` tokens. Token ids never leave the
    process unless asked for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    arrival_s: float = 0.0
    source_row: int | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needle_positions: tuple[int, ...] = ()
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id}: the prompt is empty")
        if self.max_new_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_new_tokens must be at least 1")
        if any(not 0 <= position < len(self.prompt_token_ids) for position in self.needle_positions):
            raise ValueError(f"request {self.request_id}: a needle position lies outside the prompt")
