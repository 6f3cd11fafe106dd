"""Collects requests one by one and packs them into the flat arrays of `StudyRequests`.

Knows no file and no tokenizer.

    builder = RequestsBuilder()
    builder.add(0.5, prompt_ids=[5, 6, 7], response_ids=[8], conversation=("c0",), turn=0)
    requests = builder.build()
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsatrace.errors import UserError
from dsatrace.study.requests import UNKNOWN, StudyRequests, offsets_of

MAX_ID = 2**31 - 1


class RequestsBuilder:
    """Collects requests one by one, in the order of their arrivals; 4 bytes an id (8 for block ids)."""

    def __init__(self, tokens_per_id: int = 1) -> None:
        self._tokens_per_id = tokens_per_id
        self._arrival_s = array("d")
        self._columns = {
            name: array("i")
            for name in (
                "conversation", "turn", "workload", "mode", "num_prompt_tokens", "num_response_tokens"
            )
        }  # fmt: skip
        self._num_prompt_ids, self._num_response_ids = array("q"), array("q")
        self._prompt_ids, self._response_ids = array("i" if tokens_per_id == 1 else "q"), array("i")
        self._conversations: dict[tuple[str, ...], int] = {}
        self._workloads: dict[str, int] = {}
        self._modes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._arrival_s)

    @property
    def num_prompt_ids(self) -> int:
        return len(self._prompt_ids)

    def add(
        self,
        arrival_s: float,
        prompt_ids: array[int] | Sequence[int],
        response_ids: array[int] | Sequence[int] = (),
        *,
        num_prompt_tokens: int | None = None,
        num_response_tokens: int | None = None,
        conversation: tuple[str, ...] = (),
        turn: int = UNKNOWN,
        workload: str = "",
        mode: str = "",
    ) -> None:
        """Numbers of tokens are those of the ids unless given.

        `conversation` is whatever tells one from another, its name last; empty if not known.
        Raises a `UserError` for an empty prompt or an arrival before the last one's.
        """
        if not len(prompt_ids):
            raise UserError(f"request {len(self)} has an empty prompt; leave it out of the trace")
        if self._arrival_s and arrival_s < self._arrival_s[-1]:
            raise UserError(f"request {len(self)} arrives before the one above it; sort the trace by time")
        number = UNKNOWN
        if conversation:
            number = self._conversations.setdefault(conversation, len(self._conversations))
        self._arrival_s.append(arrival_s)
        self._num_prompt_ids.append(len(prompt_ids))
        self._num_response_ids.append(len(response_ids))
        self._prompt_ids.extend(prompt_ids)
        self._response_ids.extend(response_ids)
        row = {
            "conversation": number,
            "turn": turn,
            "workload": self._workloads.setdefault(workload, len(self._workloads)),
            "mode": self._modes.setdefault(mode, len(self._modes)),
            "num_prompt_tokens": len(prompt_ids) if num_prompt_tokens is None else num_prompt_tokens,
            "num_response_tokens": len(response_ids) if num_response_tokens is None else num_response_tokens,
        }
        for name, value in row.items():
            self._columns[name].append(value)

    def build(self) -> StudyRequests:
        return StudyRequests(
            arrival_s=np.array(self._arrival_s, dtype=np.float64),
            prompt_offsets=offsets_of(np.array(self._num_prompt_ids, dtype=np.int64)),
            prompt_ids=_narrow(np.array(self._prompt_ids)),
            response_offsets=offsets_of(np.array(self._num_response_ids, dtype=np.int64)),
            response_ids=np.array(self._response_ids, dtype=np.int32),
            conversation_ids=tuple(key[-1] for key in self._conversations),
            workload_names=tuple(self._workloads),
            mode_names=tuple(self._modes),
            tokens_per_id=self._tokens_per_id,
            **{name: np.array(column, dtype=np.int32) for name, column in self._columns.items()},
        )


def _narrow(ids: NDArray[np.integer]) -> NDArray[np.int32]:
    """The same ids, or where one needs more than 31 bits, their ranks: a cache asks only which are equal."""
    if len(ids) and ids.max() > MAX_ID:
        ids = np.unique(ids, return_inverse=True)[1]
    return ids.astype(np.int32, copy=False)
