"""Transcripts: token ids whose prompt's end may be marked. The rows of some of them are recorded.

Knows neither a model nor how text becomes ids.

    transcript = Transcript("r0", ids, prompt_tokens=8000)
    recorded = recorded_rows([transcript], Rows.of("answer"))
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dsatrace.errors import UserError
from dsatrace.layerwise.asked import Rows

FOREIGN, OWN = "foreign", "own"
"""Who wrote a transcript: somebody else, or this model. Its label `transcript` in requests.jsonl."""


@dataclasses.dataclass(frozen=True, eq=False)
class Transcript:
    """A conversation as ids. They are hashed and counted, never written."""

    request_id: str
    token_ids: np.ndarray  # (S,) int64
    prompt_tokens: int | None = None
    written_by: str = FOREIGN
    source_row: int | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needle_positions: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A transcript in the sweep: its rows `offset ..` of all rows, up to the last that is recorded."""

    transcript: Transcript
    positions: range  # that are recorded
    offset: int  # of its first row among all transcripts'
    offset_recorded: int  # of its first recorded row among all recorded ones

    @property
    def num_rows(self) -> int:
        """Rows to compute: what follows the last recorded one has no effect on it."""
        return self.positions.stop

    def rows(self, start: int, stop: int) -> slice:
        """Its rows at positions `start .. stop`, among all transcripts'."""
        return slice(self.offset + start, self.offset + stop)

    def recorded(self, start: int, stop: int) -> slice:
        """The same among all recorded ones."""
        first = self.positions.start
        return slice(self.offset_recorded + start - first, self.offset_recorded + stop - first)


def recorded_rows(transcripts: Sequence[Transcript], rows: Rows) -> list[Recorded]:
    """Raises `UserError` naming a transcript that does not have them."""
    found: list[Recorded] = []
    offset = num_recorded = 0
    for one in transcripts:
        positions = rows.positions(one.request_id, len(one.token_ids), one.prompt_tokens)
        found.append(Recorded(one, positions, offset, num_recorded))
        offset, num_recorded = offset + positions.stop, num_recorded + len(positions)
    return found


def check_vocabulary(transcripts: Sequence[Transcript], vocab_size: int) -> None:
    """Raises `UserError` naming the first token id that the model does not have."""
    for one in transcripts:
        beyond = np.flatnonzero((one.token_ids < 0) | (one.token_ids >= vocab_size))
        if len(beyond):
            raise UserError(
                f"transcript {one.request_id}: token {beyond[0]} is {one.token_ids[beyond[0]]}, and the "
                f"model has ids 0 to {vocab_size - 1}; use a transcript of its vocabulary"
            )


def digest(recorded: Sequence[Recorded]) -> str:
    """Of what is computed and recorded, so that a resume goes on with the same."""
    sha256 = hashlib.sha256()
    for one in recorded:
        ids = one.transcript.token_ids[: one.num_rows]
        sha256.update(f"{one.transcript.request_id} {one.positions} {len(ids)}\n".encode())
        sha256.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return sha256.hexdigest()[:16]
