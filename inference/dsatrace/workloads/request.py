"""The request: what every workload yields and the engine serves.

Request("r0", prompt_token_ids=(0, 17, 4), max_new_tokens=8)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered. Token ids never leave the process unless asked for."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    arrival_s: float = 0.0  # since the run started, in whole nanoseconds as the engine's clock
    source_row: int | None = None  # of the data set
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The groups its score is averaged in, such as `{"task": "vt"}`."""
    needle_positions: tuple[int, ...] = ()
    """The token positions of the prompt that hold the answer, ascending, if the workload knows them."""
    stop_at_eos: bool = True  # else the answer always has `max_new_tokens` tokens

    def __post_init__(self) -> None:
        # Else a rounding error makes a request arrive after the time at which it is admitted.
        object.__setattr__(self, "arrival_s", round(self.arrival_s * 1e9) / 1e9)
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id}: the prompt is empty")
        if self.max_new_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_new_tokens must be at least 1")
        if any(not 0 <= position < len(self.prompt_token_ids) for position in self.needle_positions):
            raise ValueError(f"request {self.request_id}: a needle position lies outside the prompt")
