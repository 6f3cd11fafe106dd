"""The request: what every workload yields and the engine serves.

Request("r0", prompt_token_ids=(0, 17, 4), max_new_tokens=8)
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    `arrival_s` is seconds from the run's start; `source_row` is the row of the data
    set the prompt came from. Token ids never leave the process unless asked for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    arrival_s: float = 0.0
    source_row: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id}: the prompt is empty")
        if self.max_new_tokens < 1:
            raise ValueError(f"request {self.request_id}: max_new_tokens must be at least 1")
