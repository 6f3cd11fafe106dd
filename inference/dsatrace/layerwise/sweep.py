"""Runs transcripts through a model layer by layer, and keeps what each layer selects for the recorded rows.

With the tokens fixed, a row's selection depends only on the tokens up to it and on the layers below: so all
rows go through one layer, its weights are dropped, and the next layer is read. A layer is attention over all
rows, chunk by chunk, then its gate, then each expert once over all its rows. The layers are the model's own.

    sweep = Sweep(setup, recorded, layers, work, stored, folder, SweepSettings(chunk_rows=512))
    sweep.run()
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from dsatrace.errors import UserError
from dsatrace.layerwise.folder import RowFile, WorkFolder
from dsatrace.layerwise.transcripts import Recorded
from dsatrace.layerwise.weights import EMBEDDING, LayerWork, Unit, read_ahead, units_of
from dsatrace.model.batch import Batch, Span
from dsatrace.model.cache import KVCache
from dsatrace.model.checkpoint import fill_part
from dsatrace.model.layers import ModelSetup
from dsatrace.model.moe import MoE, rows_by_expert
from dsatrace.model.rotary import rope_frequencies, rope_of
from dsatrace.model.selection import Selection
from dsatrace.model.shards import StoredTensor, read_tensor
from dsatrace.model.transformer import Block
from dsatrace.trace.observe import Selected, SelectionRing

CACHE_BLOCK = 64
"""Tokens in a block of a transcript's cache."""
EXPERT_ROWS = 1024
"""Rows that go through an expert at a time."""
CHUNK_ROWS = {"cpu": 256, "cuda": 2048}

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""

IDS, STATS, SCORES, EXPERTS = "ids", "stats", "scores", "experts"
"""What is kept of a layer's recorded rows: (R, K) int32, (R, 4) and (R, K) float32, (R, A) int32."""


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """How a sweep is computed, and what it keeps."""

    device: str = "cpu"
    chunk_rows: int | None = None  # at a time through attention; None: the device's own
    with_scores: bool = False
    with_experts: bool = False

    @property
    def rows_at_a_time(self) -> int:
        return self.chunk_rows or CHUNK_ROWS[torch.device(self.device).type]


class LayerDone(NamedTuple):
    """How far a sweep is, told after each layer."""

    layer: int
    num_done: int
    num_layers: int
    bytes_read: int
    bytes_left: int
    seconds: float  # of this process
    unit: int = 0  # within the layer, of `num_units`; a layer's last is told when it is done
    num_units: int = 0


class _Piece(NamedTuple):
    """Consecutive rows of one transcript, all recorded or none."""

    start: int
    stop: int
    is_recorded: bool


@dataclasses.dataclass
class _DeviceRows:
    """What `RowFile` is on a CPU."""

    rows: torch.Tensor

    def release(self) -> None:
        """They stay."""


class _LayerRows(NamedTuple):
    """What a layer reads of all rows, and what it writes."""

    source: RowFile  # (N, dim)
    target: RowFile | _DeviceRows | None  # (N, dim)
    shared: RowFile | None  # (N, K): the selection it uses, where that is another layer's
    passed_on: RowFile | None  # (N, K): its selection, where the next layer uses it

    def release(self) -> None:
        for rows in self:
            if rows is not None:
                rows.release()


class Sweep:
    """`run` goes on where the folder says that an earlier one stopped."""

    def __init__(
        self,
        setup: ModelSetup,
        recorded: Sequence[Recorded],
        layers: range,
        work: Sequence[LayerWork],
        stored: Mapping[str, StoredTensor],
        folder: WorkFolder,
        settings: SweepSettings = SweepSettings(),
        tell: Callable[[LayerDone], None] = lambda done: None,
        layer_done: Callable[[int], None] = lambda num_done: None,
    ) -> None:
        """`layers` are recorded, of those in `work`; `stored` holds what those that are not done need.

        `tell` hears of progress, `layer_done` how many are.
        """
        self._setup, self._args = setup, setup.args
        self._recorded, self._layers, self._work = recorded, layers, work
        self._embedding = stored.get(EMBEDDING)
        self._units = units_of(setup.args, work[folder.layers_done :], stored)
        self._folder, self._settings = folder, settings
        self._tell, self._on_layer = tell, layer_done
        self._device = torch.device(settings.device)
        self._frequencies = rope_frequencies(setup.args, setup.precise_dtype).to(self._device)
        self._num_rows = recorded[-1].offset + recorded[-1].num_rows
        self._num_recorded = recorded[-1].offset_recorded + len(recorded[-1].positions)
        self._bytes_read = int(folder.progress["bytes_read"])
        self._bytes_left = 0

    @torch.inference_mode()
    def run(self) -> None:
        """Computes the layers that are not done. Raises `UserError`; what is done stays done."""
        num_done, num_layers = self._folder.layers_done, len(self._work)
        if num_done == num_layers:
            return
        _give_back_large_blocks()
        before, started = float(self._folder.progress["seconds"]), time.monotonic()
        if num_done == 0:
            self._embed()
        units = [unit for one in self._work[num_done:] for unit in self._units[one.layer]]
        self._bytes_left = sum(unit.num_bytes for unit in units)
        parts = self._parts = read_ahead(units)
        with contextlib.closing(parts):
            for index, work in enumerate(self._work[num_done:], num_done):
                self._index, self._of_layer, self._started = index, 0, started
                arrays = self._compute(index, work)
                seconds = before + time.monotonic() - started
                self._folder.layer_done(index, work.layer, arrays, self._bytes_read, seconds)
                self._on_layer(index + 1)

    def _embed(self) -> None:
        """The first layer's rows: of the embedding only what the transcripts hold is read."""
        tokens = [one.transcript.token_ids[: one.num_rows] for one in self._recorded]
        assert self._embedding is not None, "nothing is done yet, so it is there"
        unique, which = np.unique(np.concatenate(tokens), return_inverse=True)
        table = read_tensor(self._embedding, unique.tolist()).to(self._setup.compute_dtype)
        self._require_finite(table, f"{self._embedding.path}: {self._embedding.name}")
        rows = self._hidden(0, new=True)
        indices = torch.from_numpy(which.reshape(-1))
        for part in _slices(self._num_rows, 4096):
            rows.rows[part] = table[indices[part]].to(rows.rows.dtype)
            rows.release()
        rows.flush()

    def _hidden(self, index: int, new: bool) -> RowFile:
        """In the precise dtype: the next norm sees the layer's sum before it is rounded."""
        shape = (self._num_rows, self._args.dim)
        return self._folder.hidden(index, shape, self._setup.precise_dtype, new)

    def _next_unit(self) -> tuple[Unit, dict[str, torch.Tensor]]:
        unit, tensors = next(self._parts)
        self._bytes_read += unit.num_bytes
        self._bytes_left -= unit.num_bytes
        return unit, tensors

    def _said(self, layer: int) -> None:
        """Tells how far the layer is: one more of its units is done."""
        self._of_layer += 1
        seconds = time.monotonic() - self._started
        num_units = len(self._units[layer])
        done = self._index + (self._of_layer == num_units)
        self._tell(
            LayerDone(
                layer,
                done,
                len(self._work),
                self._bytes_read,
                self._bytes_left,
                seconds,
                self._of_layer,
                num_units,
            )
        )

    def _compute(self, index: int, work: LayerWork) -> dict[str, np.ndarray]:
        """One layer: its rows for the next one, if there is one, and what is kept of its recorded rows."""
        layer, args = work.layer, self._args
        with torch.device("meta"):
            block = Block(self._setup, layer)
        unit, tensors = self._next_unit()
        fill_part(block, unit.tensors, tensors.__getitem__, self._device)
        del tensors
        is_recorded = layer in self._layers
        kept = _Kept(self, is_recorded and args.source_layers[layer] == layer)
        rows = self._rows_of_layer(index, work)
        for one in self._recorded:
            self._attend(block, work, one, rows, kept)
        self._said(layer)
        if rows.target is None:
            return kept.arrays
        if isinstance(block.ffn, MoE):
            with_experts = self._settings.with_experts and is_recorded
            kept.arrays |= self._mix(block, block.ffn, rows.target, with_experts, work.part == "all")
        else:
            for part in _slices(self._num_rows, self._settings.rows_at_a_time):
                x = rows.target.rows[part]
                rows.target.rows[part] = block.add(x, block.ffn(block.ffn_norm(x)))
                rows.target.release()
        if work.part == "all":
            self._keep_hidden(index + 1, rows.target)
        return kept.arrays

    def _rows_of_layer(self, index: int, work: LayerWork) -> _LayerRows:
        layer, shape = work.layer, (self._num_rows, self._args.dim)
        sources, selection_shape = self._args.source_layers, (self._num_rows, self._args.index_topk)
        target = shared = passed_on = None
        if work.part != "select":
            target = self._working_rows(f"hidden_{index + 1:03}" if work.part == "all" else "routed", shape)
        if sources[layer] != layer:
            shared = self._folder.shared(index, selection_shape, new=False)
        if index + 1 < len(self._work) and sources[layer + 1] != layer + 1:
            passed_on = self._folder.shared(index + 1, selection_shape, new=True)
        return _LayerRows(self._hidden(index, new=False), target, shared, passed_on)

    def _working_rows(self, name: str, shape: tuple[int, ...]) -> RowFile | _DeviceRows:
        """Rows that are read and written all over: in a file or, where there is one, on the device."""
        dtype = self._setup.precise_dtype
        if self._device.type != "cpu":
            return _DeviceRows(torch.empty(shape, dtype=dtype, device=self._device))
        return self._folder.scratch(name, shape, dtype)

    def _keep_hidden(self, index: int, rows: RowFile | _DeviceRows) -> None:
        if isinstance(rows, RowFile):
            rows.flush()
            return
        file = self._hidden(index, new=True)
        file.rows.copy_(rows.rows)
        file.flush()

    def _attend(
        self, block: Block, work: LayerWork, one: Recorded, of_layer: _LayerRows, kept: _Kept
    ) -> None:
        """One transcript's attention, with its residual, from the layer's source to its target."""
        layer, args = work.layer, self._args
        num_blocks = -(-one.num_rows // CACHE_BLOCK)
        cache = KVCache(self._setup, num_blocks, CACHE_BLOCK, self._device, only_layer=layer)
        source, target, shared, passed_on = of_layer
        for piece in self._pieces(one):
            rows = one.rows(piece.start, piece.stop)
            tokens = one.transcript.token_ids[piece.start : piece.stop].tolist()
            span = Span(range(num_blocks), piece.start, tokens, wants_logits=False)
            batch = Batch.build([span], CACHE_BLOCK, self._device)
            rope = rope_of(args, batch.positions, self._frequencies)
            x = source.rows[rows].to(self._device)
            normed = block.attn_norm(x)
            if work.part != "all" and not piece.is_recorded:
                # Of the last layer's other rows, what the recorded ones read.
                (block.attn if target else block.attn.indexer).remember(normed, rope, batch, cache)  # type: ignore[operator]
            elif target is None:
                block.attn.indexer.remember(normed, rope, batch, cache)  # type: ignore[operator]
                kept.add(one, piece, block.attn.select(normed, rope, batch, cache)[1])
            else:
                previous = None
                if shared is not None:
                    width = min(args.index_topk, piece.stop)
                    previous = _selection_of(shared.rows[rows, :width].to(self._device))
                attended, selection = block.attn(normed, rope, batch, cache, previous)
                x = block.add(x, attended)
                self._require_finite(x, f"layer {layer}", block, layer)
                target.rows[rows] = x
                if passed_on is not None:
                    positions = selection.positions.int().cpu()
                    passed_on.rows[rows, : positions.shape[1]] = positions
                if piece.is_recorded:
                    kept.add(one, piece, selection)
            of_layer.release()

    def _pieces(self, one: Recorded) -> Iterator[_Piece]:
        size, first, stop = self._settings.rows_at_a_time, one.positions.start, one.positions.stop
        for begin in range(0, first, size):
            yield _Piece(begin, min(begin + size, first), False)
        for begin in range(first, stop, size):
            yield _Piece(begin, min(begin + size, stop), True)

    def _mix(
        self, block: Block, moe: MoE, target: RowFile | _DeviceRows, with_experts: bool, is_whole: bool
    ) -> dict[str, np.ndarray]:
        """Adds the feed-forward layer's sum to the rows, unless only the choice of experts is asked for."""
        shape = (self._num_rows, self._args.dim)
        sums = self._working_rows("sums", shape) if is_whole else None
        weights, chosen = [], []
        for part in _slices(self._num_rows, self._settings.rows_at_a_time):
            normed = block.ffn_norm(target.rows[part])
            weight, choice = moe.gate(normed)
            weights.append(weight)
            chosen.append(choice)
            if sums is not None:
                sums.rows[part] = moe.common(normed)
                sums.release()
            target.release()
        weight, choice = torch.cat(weights), torch.cat(chosen)
        if sums is not None:
            routed = rows_by_expert(weight, choice, self._args.n_routed_experts)
            for _ in routed:
                self._add_expert(block, moe, target, sums, routed)
            for part in _slices(self._num_rows, self._settings.rows_at_a_time):
                target.rows[part] = block.add(target.rows[part], sums.rows[part])
                target.release()
                sums.release()
        return {EXPERTS: self._of_recorded(choice)} if with_experts else {}

    def _add_expert(
        self,
        block: Block,
        moe: MoE,
        target: RowFile | _DeviceRows,
        sums: RowFile | _DeviceRows,
        routed: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Reads the next expert and adds its share to the sums of its rows."""
        unit, tensors = self._next_unit()
        assert unit.expert is not None
        rows, share = routed[unit.expert]
        if len(rows):
            fill_part(block, unit.tensors, tensors.__getitem__, self._device)
            expert = moe.experts[str(unit.expert)]
            for some, of_some in zip(rows.split(EXPERT_ROWS), share.split(EXPERT_ROWS), strict=True):
                added = expert(block.ffn_norm(target.rows[some])) * of_some
                self._require_finite(added, f"layer {unit.layer}, expert {unit.expert}", block, unit.layer)
                sums.rows.index_add_(0, some, added)
                sums.release()
                target.release()
        del moe.experts[str(unit.expert)]
        self._said(unit.layer)

    def _of_recorded(self, choice: torch.Tensor) -> np.ndarray:
        """The experts (R, A) int32 of the recorded rows, of all rows' `choice`."""
        parts = [choice[one.rows(one.positions.start, one.positions.stop)] for one in self._recorded]
        experts: np.ndarray = torch.cat(parts).int().cpu().numpy()
        return experts

    def _require_finite(
        self, x: torch.Tensor, where: str, block: Block | None = None, layer: int | None = None
    ) -> None:
        """Raises `UserError` naming the tensor that holds NaN or infinity, where one does."""
        if bool(torch.isfinite(x).all()):
            return
        for name, parameter in block.named_parameters() if block is not None else ():
            if not parameter.is_meta and not bool(torch.isfinite(parameter.float()).all()):
                [stored] = [unit.tensors[name] for unit in self._units[layer or 0] if name in unit.tensors]
                raise UserError(
                    f"{stored.path}: {stored.name} (layer {layer}) holds NaN or infinity; fetch it again"
                )
        raise UserError(
            f"{where}: its output is not finite, though its weights are; the numbers outgrew the model's type"
            if block is not None
            else f"{where} holds NaN or infinity; fetch it again"
        )


class _Kept:
    """What is kept of one layer's recorded rows; nothing unless `is_kept`."""

    def __init__(self, sweep: Sweep, is_kept: bool) -> None:
        args, settings = sweep._args, sweep._settings
        self.arrays: dict[str, np.ndarray] = {}
        if not is_kept:
            return
        num_rows, top_k = sweep._num_recorded, args.index_topk
        self.arrays = {
            IDS: np.full((num_rows, top_k), -1, np.int32),
            STATS: np.zeros((num_rows, 4), np.float32),
        }
        if settings.with_scores:
            self.arrays[SCORES] = np.full((num_rows, top_k), -np.inf, np.float32)
        self._ring = SelectionRing(
            1, settings.rows_at_a_time, top_k, sweep._device, settings.with_scores, num_slots=1
        )

    def add(self, one: Recorded, piece: _Piece, selection: Selection) -> None:
        """The selection of a piece of recorded rows."""
        if not self.arrays:
            return
        recording = self._ring.record(piece.stop - piece.start)
        assert recording is not None
        recording.on_select(0, cast(Selected, selection))
        recording.finish()
        recording.wait()
        rows = one.recorded(piece.start, piece.stop)
        for name, array in zip((IDS, STATS, SCORES), recording.arrays(), strict=True):
            if array is not None:
                self.arrays[name][rows] = array[0]
        recording.release()


def _give_back_large_blocks() -> None:
    """Lets glibc return freed blocks of more than 4 MiB to the system at once.

    Else it comes to keep blocks of up to 32 MiB and splits them, and holds a third more than is in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def _selection_of(positions: torch.Tensor) -> Selection:
    """A selection of which only the positions (N, K) are known."""
    chosen = positions.long()
    nothing = torch.zeros(0, device=positions.device)
    return Selection(chosen, nothing, nothing, chosen)


def _slices(length: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, length)) for start in range(0, length, size))
