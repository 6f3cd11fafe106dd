"""One forward's input: flat token rows and where each of them lives in the paged cache.

No padding: requests of any length lie one after another. Knows block tables as plain
lists of ids; knows neither the pool they come from nor the requests behind them.

    batch = Batch.build([Span(block_ids=[3, 4], first_pos=0, tokens=[7, 8, 9])], block_size=16)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
        """Lays `spans` one after another; O(blocks) host work per request, one copy per tensor."""
        contexts = [span.first_pos + len(span.tokens) for span in spans]
        slot_table = torch.zeros(len(spans), max(contexts), dtype=torch.int64)
        segments: list[Segment] = []
        positions, slots, logit_rows = [], [], []
        row = 0
        for i, (span, context_len) in enumerate(zip(spans, contexts, strict=True)):
            blocks = torch.tensor(span.block_ids[: -(-context_len // block_size)])
            assert len(blocks) * block_size >= context_len, "the block table is shorter than the context"
            all_slots = (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).view(-1)
            slot_table[i, :context_len] = all_slots[:context_len]
            consecutive = bool((blocks.diff() == 1).all())
            first_slot = int(blocks[0]) * block_size if consecutive else None
            segments.append(Segment(row, len(span.tokens), span.first_pos, blocks.to(device), first_slot))
            positions.append(torch.arange(span.first_pos, context_len))
            slots.append(all_slots[span.first_pos : context_len])
            row += len(span.tokens)
            if span.wants_logits:
                logit_rows.append(row - 1)

        rows_of = torch.tensor([len(span.tokens) for span in spans])
        return cls(
            tokens=torch.tensor([token for span in spans for token in span.tokens]).to(device),
            positions=torch.cat(positions).to(device),
            row_to_request=torch.arange(len(spans)).repeat_interleave(rows_of).to(device),
            slots=torch.cat(slots).to(device),
            slot_table=slot_table.to(device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64).to(device),
            segments=tuple(segments),
        )
