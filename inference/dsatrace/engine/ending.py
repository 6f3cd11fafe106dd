"""When an answer may end, as the flags ask: later than the model wants, or at its full length only.

What a model says past its answer is no answer. So the place where it first ended it is kept, whether that
end of sequence was sampled and ignored, or came too early and gave way to the next best token.

    end = EndSettings(min_new_tokens=64)
    end.asked                                 # True: lines of requests.jsonl have `answer_tokens`
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from dsatrace.flags import Flag, check


@dataclasses.dataclass(frozen=True)
class EndSettings:
    """Every field is a flag; the default is that an answer ends where the model ends it."""

    min_new_tokens: Annotated[
        int,
        Flag(
            "no answer ends before so many new tokens: an end of sequence gives way to the next best token",
            at_least=0,
        ),
    ] = 0
    ignore_eos: Annotated[bool, Flag("every answer goes on to its limit, whatever is sampled")] = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def asked(self) -> bool:
        """Whether an answer may go on past its end."""
        return self != ENDS_BY_ITSELF

    def to_json(self) -> dict[str, Any] | None:
        """The manifest's `answer_end`."""
        return dataclasses.asdict(self) if self.asked else None


ENDS_BY_ITSELF = EndSettings()
