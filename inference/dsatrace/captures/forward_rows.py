"""The rows of a transformers forward that are recorded, and what their indexers gave as sets of ids.

An indexer's output becomes ids in the writer's thread, by its dtype and its shape. Knows batches, columns
and padding; no model, no request and no file.

    columns = Columns.of(np.array([False, False, True, True, True]))      # two of padding, three tokens
    columns.positions(np.array([2, 4, 5]))                                # [0 2 3]: the last one is new
    room = SetRoom(selects)
    room.columns, room.num_new = [columns], 1                             # of the forward that comes next
    room.seq_len = {0: 4}                                                 # of its rows to record
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsatrace.captures.families import Selects
from dsatrace.errors import UserError

if TYPE_CHECKING:
    import torch

    from dsatrace.trace.observe import HostArrays

_CAPTURE_BYTES = 32 << 20
"""Of ids in one capture: the rows of a long prompt are written in parts of this size."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the tokens of one sequence stand in its batch: prompt columns, some of them padding, then new
    ones."""

    num_prompt: int  # columns of the prompt, padding included
    num_tokens: int  # of them that hold a token
    table: np.ndarray | None = (
        None  # (num_prompt,) int64 position of each, -1: padding; None: padding is left
    )

    @classmethod
    def of(cls, mask: np.ndarray) -> Columns:
        """`mask` (num_prompt,) bool: which columns hold a token."""
        num_prompt, num_tokens = len(mask), int(mask.sum())
        if mask[num_prompt - num_tokens :].all():
            return cls(num_prompt, num_tokens)
        return cls(num_prompt, num_tokens, np.where(mask, mask.cumsum() - 1, -1))

    @property
    def padding(self) -> str | None:
        """On which side of the prompt it stands: left, or right (or both); None where there is none."""
        if self.num_tokens == self.num_prompt:
            return None
        return "left" if self.table is None else "right"

    def positions(self, columns: np.ndarray) -> np.ndarray:
        """The tokens' positions; below 0 where there is none."""
        shifted = columns - (self.num_prompt - self.num_tokens)
        if self.table is None:
            return np.where(columns < 0, -1, shifted)
        of_prompt = self.table[np.clip(columns, 0, self.num_prompt - 1)]
        return np.where(columns < 0, -1, np.where(columns < self.num_prompt, of_prompt, shifted))

    def prompt_columns(self) -> np.ndarray:
        """(num_tokens,) the column of each token of the prompt."""
        if self.table is None:
            return np.arange(self.num_prompt - self.num_tokens, self.num_prompt)
        return np.flatnonzero(self.table >= 0)


class SetRoom:
    """Room for the sets of a forward's rows; its attributes are set before each forward."""

    def __init__(self, selects: Selects) -> None:
        kind = selects.kind
        self.selects = selects
        self.max_rows = max(1, _CAPTURE_BYTES // (4 * len(kind.set_layers) * kind.max_width))
        self.columns: Sequence[Columns] = ()  # (B,)
        self.num_new = 1  # S, columns that the forward computes
        self.seq_len: Mapping[int, int] = {}  # row of the forward's B x S -> positions visible to it

    def record(self, num_rows: int, rows: Sequence[int] | None = None, wait: bool = True) -> SetRecording:
        """See `observe.Room`. There is always room: the writer's queue says how much may wait."""
        return SetRecording(self, list(range(num_rows)) if rows is None else rows, rows is None)


class SetRecording:
    """Some rows of one forward: each indexer's output is kept until the writer reads it.

    On CUDA each output is copied to pinned memory as it comes, without waiting.
    """

    def __init__(self, room: SetRoom, rows: Sequence[int], are_all: bool) -> None:
        kind = room.selects.kind
        self._selects = room.selects
        self._rows = rows
        self._are_all = are_all
        self._columns = room.columns
        self._seq_len = np.array([room.seq_len[row] for row in rows], dtype=np.int64)
        self._num_new = room.num_new
        self._caught: dict[int, torch.Tensor] = {}  # by layer
        self._picked: torch.Tensor | None = None
        self._copied: dict[Any, torch.cuda.Event] = {}  # by device
        self._ids = np.empty((len(kind.set_layers), len(rows), kind.max_width), dtype=np.int32)

    def on_select(self, layer_id: int, selection: Any) -> None:
        """Takes (B, S, K) or (B, H, S, K) ids, or a (B, 1, S, T) mask."""
        if not self._are_all:  # a few rows of many: do not keep the others alive
            selection = _by_row(selection)
            selection = selection[self._picked_on(selection)]
        if selection.is_cuda:
            selection = self._to_host(selection)
        self._caught[layer_id] = selection

    def finish(self) -> None:
        """Raises `UserError` if an indexer did not run."""
        layers = self._selects.kind.layers
        missing = [
            i
            for i, layer in enumerate(layers)
            if layer.heads and layer.source_layer is None and i not in self._caught
        ]
        if missing:
            raise UserError(
                f"layer {missing[0]}: its indexer was not called in a forward; compiled models are not seen, "
                "pass disable_compile=True to generate"
            )
        if self._copied:
            import torch

            for device, event in self._copied.items():
                event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if not self._caught:
            return
        for event in self._copied.values():
            event.synchronize()
        kind = self._selects.kind
        by_row = [_by_row(tensor) if self._are_all else tensor for tensor in self._caught.values()]
        raw = np.stack([tensor.numpy() for tensor in by_row])  # (L, R, H, K or T)
        layers = list(self._caught)
        self._caught.clear()
        ids = self._read(raw)
        place = 0
        for i, layer in enumerate(kind.layers):
            of = layers.index(i if layer.source_layer is None else layer.source_layer) if layer.heads else 0
            for head in range(layer.heads):
                self._ids[place] = ids[of, :, head]
                place += 1

    def arrays(self) -> HostArrays:
        return self._ids, None, None

    def release(self) -> None:
        self._caught.clear()

    def _picked_on(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if self._picked is None or self._picked.device != tensor.device:
            self._picked = torch.tensor(self._rows, device=tensor.device)
        return self._picked

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if tensor.device not in self._copied:
            with torch.cuda.device(tensor.device):
                self._copied[tensor.device] = torch.cuda.Event()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _read(self, raw: np.ndarray) -> np.ndarray:
        """(L, R, H, K) ids, or (L, R, H, T) bool -> (L, R, H, max_width) int32 ids that the query can see."""
        kind = self._selects.kind
        ids = _columns_of(raw) if raw.dtype == np.bool_ else raw.astype(np.int64)
        if kind.unit == "token" or self._selects.comes_as_tokens:
            for r, row in enumerate(self._rows):
                columns = self._columns[row // self._num_new]
                if columns.padding is not None:
                    ids[:, r] = columns.positions(ids[:, r])
        visible = kind.visible(self._seq_len)
        if self._selects.comes_as_tokens:
            return _groups_of(ids, visible, kind.unit_tokens, kind.max_width)
        ids[(ids < 0) | (ids >= visible[None, :, None, None])] = -1
        return _fitted(ids, kind.max_width)


def _by_row(selection: torch.Tensor) -> torch.Tensor:
    """(B, S, K) or (B, H, S, K) -> (B * S, H, K)."""
    if selection.dim() == 3:
        return selection.flatten(0, 1).unsqueeze(1)
    return selection.transpose(1, 2).flatten(0, 1)


def _columns_of(mask: np.ndarray) -> np.ndarray:
    """(..., T) bool -> (..., most) int64 columns, -1 padded."""
    counts = mask.sum(-1)
    columns = np.full((*counts.shape, max(1, int(counts.max()))), -1, dtype=np.int64)
    *places, at = np.nonzero(mask)
    rank = mask.cumsum(-1)[mask] - 1
    columns[(*places, rank)] = at
    return columns


def _groups_of(positions: np.ndarray, visible: np.ndarray, size: int, width: int) -> np.ndarray:
    """Token positions (L, R, H, K) -> the whole groups that they make up.

    Tokens after the last whole group are the tail, which is read in any case. Raises `ValueError` for a
    group of which only some tokens are there.
    """
    positions[(positions < 0) | (positions >= (visible * size)[None, :, None, None])] = -1
    is_first = (positions >= 0) & (positions % size == 0)
    if ((positions >= 0).sum(-1) != size * is_first.sum(-1)).any():
        raise ValueError(f"an indexer selected part of a group of {size} tokens; its groups are others")
    return _fitted(np.where(is_first, positions // size, -1), width)


def _fitted(ids: np.ndarray, width: int) -> np.ndarray:
    """(..., K) -> (..., width) int32; of more than `width` the lowest go, which must be -1."""
    if ids.shape[-1] > width:
        ids = -np.sort(-ids)
        if (ids[..., width:] >= 0).any():
            raise ValueError(f"an indexer selected more than the {width} ids that the config tells")
        ids = ids[..., :width]
    fitted = np.full((*ids.shape[:-1], width), -1, dtype=np.int32)
    fitted[..., : ids.shape[-1]] = ids
    return fitted
