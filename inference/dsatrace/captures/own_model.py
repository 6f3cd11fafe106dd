"""Selections of a model of the caller's own, handed over layer by layer, as torch tensors or numpy arrays.

Knows no model: where a step ends and where a request begins is told by the positions.

    with OwnModelRun(config, own_kind(num_layers=2, top_k=16)) as run:
        for layer in range(2):
            run.selection(layer, ids, positions)         # ids (B, K) of B sequences, positions (B,)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsatrace.captures.attached_run import AttachedRun
from dsatrace.errors import UserError
from dsatrace.kv.layout import CacheLayout
from dsatrace.trace.capture import Phase, StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.kind import Layer, SelectionKind
from dsatrace.trace.manifest import RunInfo


def own_kind(
    num_layers: int | None = None,
    top_k: int | None = None,
    heads: int = 1,
    unit: Any = "token",
    unit_tokens: int = 1,
) -> SelectionKind:
    """What the caller says its selections are, in every layer; raises `UserError` naming what is wrong."""
    for name, value in (("num_layers", num_layers), ("top_k", top_k), ("heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"attach: {name} {value}: a model of your own needs it, 1 or more")
    assert num_layers is not None and top_k is not None
    try:
        return SelectionKind(
            layers=(Layer(top_k, heads),) * num_layers,
            unit=unit,
            unit_tokens=unit_tokens,
            door="attach",
            missing=("scores", "timing", "tiers", "prefix"),
        )
    except ValueError as error:
        raise UserError(f"attach: {error}") from error


class OwnModelRun(AttachedRun):
    """Records what `selection` is given. A step is whole when every layer has given its ids."""

    def __init__(self, config: TraceConfig, kind: SelectionKind, **about: Any) -> None:
        """`about`: fields of `RunInfo`."""
        info = RunInfo(
            model_config={"num_layers": len(kind.layers)},
            layouts=(CacheLayout("own", 0, 0),),
            device="",
            seed=config.seed,
            kind=kind,
            **about,
        )
        super().__init__(config, info)
        self._kind = kind
        self._caught: dict[int, np.ndarray] = {}  # layer -> (B, S, heads, K)
        self._positions = np.zeros((0, 0), dtype=np.int64)  # (B, S) of the step under way
        self._live: list[str] = []  # (B,)
        self._next = np.zeros(0, dtype=np.int64)  # (B,) position that goes on
        self._num_prompt = np.zeros(0, dtype=np.int64)  # (B,)
        self._num_steps = 0

    def selection(self, layer: int, ids: Any, positions: Any) -> None:
        """What `layer` selected for each query of a step: call it for every layer, in any order.

        `positions` (B,) or (B, S): of each query in its sequence, 0-based; S queries where a prompt is
        computed. `ids` (B, K) or (B, S, K), with an axis for the heads before K where there are several;
        -1 for none. A sequence whose position does not follow the one before is a new request. Raises
        `UserError` for shapes, layers or positions that fit no step.
        """
        layers, heads = len(self._kind.layers), self._kind.layers[0].heads
        if not 0 <= layer < layers:
            raise UserError(f"trace.selection: layer {layer}: num_layers is {layers}")
        where = f"trace.selection, layer {layer}"
        given = _array(where, "positions", positions)
        given = given.reshape(len(given), -1) if given.ndim else given.reshape(1, 1)
        chosen = _array(where, "ids", ids)
        rows, width = given.size, chosen.shape[-1] if chosen.ndim else 0
        if chosen.size != rows * heads * width or width == 0:
            raise UserError(
                f"{where}: ids {np.shape(ids)} do not fit positions {np.shape(positions)}; give {heads} x K "
                "ids for each of them"
            )
        if self._caught and (layer in self._caught or not np.array_equal(given, self._positions)):
            self._require_whole()
        if not self._caught:
            self._positions = given
        self._caught[layer] = chosen.reshape(*given.shape, heads, width)
        if len(self._caught) == layers:
            self._put()

    def finish(self) -> None:
        self._require_whole()
        self._end_all()
        if not self._num_steps:
            raise UserError("trace.selection was not called, or only for a prompt, with prefill='off'")

    def _require_whole(self) -> None:
        missing = set(range(len(self._kind.layers))) - self._caught.keys()
        if self._caught and missing:
            raise UserError(
                f"trace.selection: layer {min(missing)}: it has given nothing for positions "
                f"{self._positions[:, -1].tolist()}, and other layers have; call it for every layer"
            )

    def _put(self) -> None:
        positions, width = self._positions, self._kind.max_width
        batch = len(positions)
        if (np.diff(positions, axis=1) != 1).any() or (positions < 0).any():
            raise UserError("trace.selection: positions must ascend by 1 along a sequence, from 0 or above")
        follows = len(self._next) == batch and np.array_equal(positions[:, 0], self._next)
        if not follows:
            self._begin(positions)
        self._next = positions[:, -1] + 1
        step_idx = positions - self._num_prompt[:, None]  # (B, S), below 0 in the prompt
        is_prefill = bool((step_idx < 0).any())
        kept = self._kept(step_idx)
        caught, self._caught = self._caught, {}
        if not kept.any():
            return
        ids = np.full((len(self._kind.set_layers), int(kept.sum()), width), -1, dtype=np.int32)
        heads = self._kind.layers[0].heads
        for layer, chosen in caught.items():
            of_layer = chosen[kept].swapaxes(0, 1)  # (heads, R, K)
            of_layer = np.where(of_layer < self._visible(positions[kept] + 1)[None, :, None], of_layer, -1)
            if (of_layer >= 0).sum(-1).max() > width:
                raise UserError(f"trace.selection, layer {layer}: more ids than top_k, {width}")
            of_layer = -np.sort(-of_layer)[..., :width]
            ids[layer * heads : layer * heads + heads, :, : of_layer.shape[-1]] = of_layer
        sequence = np.nonzero(kept)[0]
        phase: Phase = "prefill" if is_prefill else "decode"
        self.tracer.put(
            StepCapture(
                phase=phase,
                request_ids=tuple(self._live[b] for b in sequence),
                step_idx=tuple(step_idx[kept].tolist()),
                seq_len=(positions[kept] + 1).astype(np.int32),
                batch_size=batch,
                positions=ids,
                score_stats=None,
                scores=None,
                prefixes=(),
                forward_idx=self._num_steps,
                step_wall_us=None,
                step_synced=None,
            )
        )
        self._num_steps += 1

    def _begin(self, positions: np.ndarray) -> None:
        """New requests: their prompts end with these positions or, where there is one of each, before it."""
        self._end_all()
        is_prompt = positions.shape[1] > 1 or bool((positions == 0).all())
        self._num_prompt = positions[:, -1] + 1 if is_prompt else positions[:, 0].copy()
        if (self._num_prompt < 1).any():
            raise UserError("trace.selection: positions: a sequence begins at 0 among others that go on")
        self._live = [self.begin_request(range(count)) for count in self._num_prompt.tolist()]

    def _end_all(self) -> None:
        """The last token of each was never fed back."""
        for b, request_id in enumerate(self._live):
            num_steps = int(self._next[b] - self._num_prompt[b])
            self.end_request(request_id, num_steps + 1, "length", None)
        self._live = []

    def _kept(self, step_idx: np.ndarray) -> np.ndarray:
        """(B, S) bool: rows that the run records and that have anything to select."""
        prefill = self.tracer.config.prefill
        first = {"off": 0, "last": -1, "all": -(2**62)}[prefill]
        sampled = [[step < 0 or self.tracer.wants(step) for step in row] for row in step_idx.tolist()]
        sees_any = self._visible(self._positions + 1) > 0
        return np.asarray((step_idx >= first) & np.array(sampled) & sees_any)

    def _visible(self, seq_len: np.ndarray) -> np.ndarray:
        return self._kind.visible(seq_len.astype(np.int64))


def _array(where: str, name: str, values: Any) -> np.ndarray:
    """Whole numbers, from torch or from anything that numpy takes."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise UserError(f"{where}: {name} are {array.dtype}, not whole numbers")
    return array.astype(np.int64)
