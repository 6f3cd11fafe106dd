"""One forward's input: flat token rows and where each of them lives in the paged cache.

No padding: requests of any length lie one after another. Knows block tables as plain
lists of ids; knows neither the pool they come from nor the requests behind them.

    batch = Batch.build([Span(block_ids=[3, 4], first_pos=0, tokens=[7, 8, 9])], block_size=16)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive tokens of one request, at positions `first_pos, first_pos + 1, ...`.

    `block_ids[i]` holds positions `i * block_size ...`; it covers every position up to the
    span's last. `wants_logits`: the last token's logits are asked for.
    """

    block_ids: Sequence[int]
    first_pos: int
    tokens: Sequence[int]
    wants_logits: bool = True


@dataclasses.dataclass(frozen=True)
class Segment:
    """A span inside a batch: rows `row .. row + num_rows` sit at `first_pos ..`."""

    row: int
    num_rows: int
    first_pos: int
    blocks: torch.Tensor  # (num_blocks,) int64, the blocks of positions 0 .. context_len
    first_slot: int | None  # slot of position 0 when the blocks are consecutive, else None

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.num_rows)

    @property
    def context_len(self) -> int:
        """Positions visible to the segment's last row."""
        return self.first_pos + self.num_rows


@dataclasses.dataclass(frozen=True)
class Batch:
    """N token rows of R requests. A slot is `block id * block size + offset`."""

    tokens: torch.Tensor  # (N,) int64
    positions: torch.Tensor  # (N,) int64, absolute, 0-based
    row_to_request: torch.Tensor  # (N,) int64, row of slot_table
    slots: torch.Tensor  # (N,) int64, where each row's own KV is written
    slot_table: torch.Tensor  # (R, longest context) int64, slot of every position
    logit_rows: torch.Tensor  # (M,) int64
    segments: tuple[Segment, ...]  # (R,)

    @classmethod
    def build(cls, spans: Sequence[Span], block_size: int, device: torch.device | str = "cpu") -> Batch:
        """Lays `spans` one after another; O(blocks) host work a request, one copy a tensor."""
        segments: list[Segment] = []
        slot_rows: list[np.ndarray] = []
        row = 0
        longest = max(span.first_pos + len(span.tokens) for span in spans)
        for span in spans:
            context_len = span.first_pos + len(span.tokens)
            blocks = np.asarray(span.block_ids[: -(-context_len // block_size)], dtype=np.int64)
            assert len(blocks) * block_size >= context_len, "the block table is shorter than the context"
            slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:context_len]
            slot_rows.append(np.pad(slots, (0, longest - context_len)))
            consecutive = bool((np.diff(blocks) == 1).all())
            first_slot = int(blocks[0]) * block_size if consecutive else None
            table = torch.from_numpy(blocks).to(device)
            segments.append(Segment(row, len(span.tokens), span.first_pos, table, first_slot))
            row += len(span.tokens)

        positions = [np.arange(s.first_pos, s.context_len) for s in segments]
        own_slots = [slot_rows[i][s.first_pos : s.context_len] for i, s in enumerate(segments)]
        row_to_request = np.repeat(np.arange(len(segments)), [s.num_rows for s in segments])
        last_rows = [
            s.row + s.num_rows - 1 for s, span in zip(segments, spans, strict=True) if span.wants_logits
        ]

        def tensor(values: np.ndarray | list[int]) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        return cls(
            tokens=tensor([token for span in spans for token in span.tokens]),
            positions=tensor(np.concatenate(positions)),
            row_to_request=tensor(row_to_request),
            slots=tensor(np.concatenate(own_slots)),
            slot_table=tensor(np.stack(slot_rows)),
            logit_rows=tensor(last_rows),
            segments=tuple(segments),
        )
