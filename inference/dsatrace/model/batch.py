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
    slots: torch.Tensor  # (N,) int64, where each row's own KV is written
    table: torch.Tensor  # 1-D int64: of every request -1, for no position, then the slots of its positions
    table_starts: torch.Tensor  # (N, 1) int64: where in `table` position 0 of a row's request stands
    logit_rows: torch.Tensor  # (M,) int64
    segments: tuple[Segment, ...]  # (R,)

    @classmethod
    def build(cls, spans: Sequence[Span], block_size: int, device: torch.device | str = "cpu") -> Batch:
        """Lays `spans` one after another; O(blocks) host work per request, one copy per tensor."""
        segments: list[Segment] = []
        tokens: list[int] = []
        positions: list[int] = []
        starts: list[list[int]] = []
        logit_rows: list[int] = []
        slots: list[torch.Tensor] = []
        table: list[torch.Tensor] = []
        nowhere, offsets = torch.tensor([-1]), torch.arange(block_size)
        start = 1
        for span in spans:
            num_rows = len(span.tokens)
            context_len = span.first_pos + num_rows
            ids = span.block_ids[: -(-context_len // block_size)]
            assert len(ids) * block_size >= context_len, "the block table is shorter than the context"
            blocks = torch.tensor(ids)
            of_request = torch.add(offsets, blocks.unsqueeze(1), alpha=block_size).view(-1)[:context_len]
            consecutive = list(ids) == list(range(ids[0], ids[0] + len(ids)))
            first_slot = ids[0] * block_size if consecutive else None
            segments.append(Segment(len(tokens), num_rows, span.first_pos, blocks.to(device), first_slot))
            tokens += span.tokens
            positions += range(span.first_pos, context_len)
            starts += [[start]] * num_rows
            slots.append(of_request[span.first_pos :])
            table += (nowhere, of_request)
            start += context_len + 1
            if span.wants_logits:
                logit_rows.append(len(tokens) - 1)
        return cls(
            tokens=torch.tensor(tokens).to(device),
            positions=torch.tensor(positions).to(device),
            slots=torch.cat(slots).to(device),
            table=torch.cat(table).to(device),
            table_starts=torch.tensor(starts).to(device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64).to(device),
            segments=tuple(segments),
        )
