"""From a run's selections to the streams of sets that buffers are asked for.

One stream per request and layer, as the buffers of serving engines have it, and one of several where they
share a buffer. Says which rows count: those past top-k, since below it everything is
selected; earlier ones warm the buffer up. Refuses runs whose steps do not follow one another.

    recorded = Recorded.of(run.manifest, settings, "outputs/mine")
    steps = layer_steps(request, LayerSet(3), recorded, settings)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.steps import NO_ID, Steps
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.manifest import selection_kind
from dsatrace.trace.selections import LayerSelections, LayerSet, RequestSelections, copy_runs

PROMPT_ROWS = 32
"""Of the prompt's end, which warm a buffer up: as many as ESS takes (arXiv 2512.10576)."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the recorded ids of a run are, as its manifest says."""

    selection: SelectionKind
    id_tokens: int  # tokens that a recorded id covers: a block's, where touched blocks stand for tokens
    bytes_per_id: int | None  # latents of one layer and id of the run's unit; None: unknown
    index_bytes_per_id: int | None  # the indexer's keys, the same

    @classmethod
    def of(cls, manifest: Mapping[str, Any], settings: ReplaySettings, name: str) -> Recorded:
        """Raises `UserError` for a run that cannot be replayed so, with `name` and the reason."""
        selection, trace, block = selection_kind(manifest), manifest["trace"], settings.block
        if manifest["selections"] == "none" or selection is None:
            raise UserError(f"{name}: no model ran, so there are no selections to replay")
        if trace["sample_rate"] < 1:
            raise UserError(
                f"{name}: only a share of {trace['sample_rate']} of its steps was recorded; misses depend on "
                "the step before, so trace every step (--trace-sample-rate 1)"
            )
        id_tokens = selection.unit_tokens
        if trace["level"] == "stats":
            raise UserError(f"{name}: recorded at level stats, which holds no ids; use --trace-level full")
        if trace["level"] == "blocks":
            id_tokens = trace["block_size_tokens"]
            if block is None:
                raise UserError(
                    f"{name}: recorded at level blocks, so replay blocks: --unit block:{id_tokens}"
                )
        if block is not None and block % id_tokens:
            raise UserError(f"{name}: --unit block:{block}: use a multiple of {id_tokens} tokens")
        latent, index = _bytes_per_token(manifest)
        if selection.unit == "expert":
            latent = index = None  # what an expert weighs is not recorded
        unit_tokens = selection.unit_tokens
        recorded = cls(selection, id_tokens, latent and latent * unit_tokens, index and index * unit_tokens)
        for given, flag in ((block, "--unit block:N"), (settings.pin_newest, "--pin-newest")):
            if given and not recorded.is_position:
                raise UserError(f"{name}: its ids are no positions, so {flag} has no meaning; leave it out")
        if settings.share == "prefix":
            recorded._require_prefixes(name, block, trace["block_size_tokens"])
        if settings.steps == "answer" and "answer_end" not in manifest:
            raise UserError(
                f"{name}: --steps answer: nothing kept its answers from ending, so its requests do not say "
                "where they end; leave it out"
            )
        return recorded

    def _require_prefixes(self, name: str, block: int | None, prefix_block: int) -> None:
        if not self.selection.holds("prefix"):
            raise UserError(
                f"{name}: --share prefix: its records say nothing of prefixes ({self.selection.unit}s, door "
                f"{self.selection.door}); leave it out"
            )
        if block is None and self.selection.unit != "block":
            raise UserError(
                f"{name}: --share prefix: requests share blocks, and its unit is {self.selection.unit}; add "
                f"--unit block:{prefix_block}"
            )

    @property
    def is_position(self) -> bool:
        """Whether ids have an order in time."""
        return self.selection.id_kind == "position" and self.selection.unit != "expert"

    def visible(self, seq_len: np.ndarray) -> np.ndarray:
        """(T,) int64, recorded ids that each row can choose from."""
        if self.id_tokens != self.selection.unit_tokens:
            return -(-seq_len // self.id_tokens)
        return self.selection.visible(seq_len)

    def newest(self, seq_len: np.ndarray) -> np.ndarray:
        """(T,) int32, the id that the query's own token belongs to; NO_ID where it belongs to none yet."""
        if not self.is_position:
            return np.full(len(seq_len), NO_ID, np.int32)
        last = seq_len - 1
        newest = last // self.id_tokens
        if self.selection.unit == "entry" and self.id_tokens == self.selection.unit_tokens:
            newest = np.where(seq_len % self.id_tokens == 0, newest, NO_ID)  # whole entries only
        return newest.astype(np.int32)

    def tokens_per_id(self, settings: ReplaySettings) -> int:
        """Of what moves as one."""
        return settings.block or self.selection.unit_tokens

    def per_block(self, settings: ReplaySettings) -> int:
        """Ids of the run's unit that move as one."""
        return 1 if settings.block is None else settings.block // self.selection.unit_tokens


def _bytes_per_token(manifest: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Per layer, of latents and of indexer keys, in the layout that the run counts with; the layout of a door
    that does not know them has 0."""
    for layout in manifest["cache_layouts"]:
        if layout["name"] == manifest["cache_layout"]:
            latent: int = layout["latent_bytes_per_token"]
            return (latent, layout["index_bytes_per_token"]) if latent else (None, None)
    return None, None


def layer_steps(
    request: RequestSelections, name: LayerSet, recorded: Recorded, settings: ReplaySettings
) -> Steps:
    """One layer's rows of a request, as the settings want them: in blocks, several rows to a step."""
    layer, layer_id = request.layers[name], name.layer_id
    first = int(np.searchsorted(layer.step_idx, 0))  # prompt rows have step_idx -1 and come first
    _require_all_steps(request, layer_id, layer.step_idx[first:])
    if settings.start == "prefill" and not first:
        raise UserError(
            f"request {request.request_id}: --start prefill needs prompt rows, and there are none; trace "
            "with --trace-prefill last, or use another --start"
        )
    begin = max(0, first - PROMPT_ROWS) if settings.start == "prefill" else first
    ids = layer.ids[layer.ptr[begin] :].astype(np.int32, copy=False)
    ptr, seq_len = layer.ptr[begin:] - layer.ptr[begin], layer.seq_len[begin:]
    visible, newest = recorded.visible(seq_len), recorded.newest(seq_len)
    is_dense = recorded.selection.visible(seq_len) <= recorded.selection.layers[layer_id].top_k
    # They come first, since a request's context only grows.
    num_warm = max(first - begin, int(np.count_nonzero(is_dense)))
    when = np.asarray(layer.forward_idx[begin:], np.int64)
    steps = Steps(ids, ptr, newest, visible, _num_ids(ids, newest), num_warm, when)
    if settings.block is not None:
        steps = in_blocks(steps, settings.block // recorded.id_tokens)
    if settings.union > 1:
        steps = in_unions(steps, settings.union)
    if settings.start == "first-set":
        steps = dataclasses.replace(steps, num_warm=max(steps.num_warm, 1))
    return steps


def _require_all_steps(request: RequestSelections, layer_id: int, step_idx: np.ndarray) -> None:
    gaps = np.flatnonzero(step_idx != np.arange(len(step_idx)))
    if len(gaps):
        raise UserError(
            f"request {request.request_id}, layer {layer_id}: step {int(gaps[0])} was not recorded; misses "
            "depend on the step before, so a run that lost steps cannot be replayed"
        )


def _num_ids(ids: np.ndarray, newest: np.ndarray) -> int:
    return int(max(ids.max(initial=-1), newest.max(initial=-1))) + 1


def in_blocks(steps: Steps, block: int) -> Steps:
    """Each step's distinct blocks of `block` ids, in the order in which its ids name them first."""
    ids, row = steps.ids // block, np.repeat(np.arange(steps.num_steps), steps.sizes)
    num_ids = (steps.num_ids + block - 1) // block
    _, first = np.unique(row * num_ids + ids, return_index=True)
    first.sort()
    newest = np.where(steps.newest == NO_ID, NO_ID, steps.newest // block).astype(np.int32)
    sizes = np.bincount(row[first], minlength=steps.num_steps)
    ptr = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    visible = -(-steps.visible // block)
    return Steps(ids[first].astype(np.int32), ptr, newest, visible, num_ids, steps.num_warm, steps.when)


def in_unions(steps: Steps, rows: int) -> Steps:
    """Every `rows` rows as one step that asks for what any of them selects; the last may be shorter.

    Its newest id is the last row's: the others have been written by the same step.
    """
    group = np.repeat(np.arange(steps.num_steps) // rows, steps.sizes)
    _, first = np.unique(group * steps.num_ids + steps.ids, return_index=True)
    first.sort()
    last = np.minimum(np.arange(rows - 1, steps.num_steps + rows - 1, rows), steps.num_steps - 1)
    ptr = np.concatenate(([0], np.cumsum(np.bincount(group[first], minlength=len(last))))).astype(np.int64)
    return Steps(
        steps.ids[first],
        ptr,
        steps.newest[last],
        steps.visible[last],
        steps.num_ids,
        -(-steps.num_warm // rows),
        None if steps.when is None else steps.when[last],
    )


def numbered_anew(steps: Steps) -> Steps:
    """The same with ids from 0 without gaps, in their old order."""
    known, ids = np.unique(steps.ids, return_inverse=True)
    assert np.all(steps.newest == NO_ID), "only ids that are positions have a newest one"
    return dataclasses.replace(steps, ids=ids.astype(np.int32), num_ids=len(known))


def pooled(layers: Sequence[Steps]) -> Steps:
    """A request's layers in one buffer, in the order of time: step by step, each step layer by layer.

    An id is another in every layer. A step is still one layer's set.
    """
    offsets = np.cumsum([0] + [layer.num_ids for layer in layers])
    ids = [np.arange(start, stop) for start, stop in itertools.pairwise(offsets.tolist())]
    together = in_order(layers, ids, [np.arange(layer.num_steps) for layer in layers])
    return dataclasses.replace(
        together, num_warm=max(layer.num_warm for layer in layers) * len(layers), is_counted=None
    )


def in_order(streams: Sequence[Steps], names: Sequence[np.ndarray], when: Sequence[np.ndarray]) -> Steps:
    """The steps of all streams as one buffer is asked for them, by `when` (T,) and in the order of streams.

    `names[s][i]` is what id i of stream s is called there. A step counts where it did.
    """
    order = np.argsort(np.concatenate(when), kind="stable")
    ptr = np.concatenate(([0], np.cumsum(np.concatenate([one.sizes for one in streams])[order])))
    starts = np.empty(len(order), np.int64)
    starts[order] = ptr[:-1]
    ids = np.empty(ptr[-1], np.int32)
    num_before = 0
    for one, called in zip(streams, names, strict=True):
        targets = starts[num_before : num_before + one.num_steps]
        copy_runs(called[one.ids].astype(np.int32), one.ptr[:-1], one.ptr[1:], targets, ids)
        num_before += one.num_steps
    newest = [np.append(called, NO_ID)[one.newest] for one, called in zip(streams, names, strict=True)]
    return Steps(
        ids,
        ptr.astype(np.int64),
        np.concatenate(newest)[order].astype(np.int32),
        np.concatenate([one.visible for one in streams])[order],
        max((int(called.max(initial=-1)) for called in names), default=-1) + 1,
        is_counted=np.concatenate([one.counted for one in streams])[order],
    )


def up_to(request: RequestSelections, num_steps: int) -> RequestSelections:
    """The request without its steps from `num_steps` on."""
    layers = {}
    for name, layer in request.layers.items():
        end = int(np.searchsorted(layer.step_idx, num_steps))
        layers[name] = LayerSelections(
            layer.step_idx[:end],
            layer.seq_len[:end],
            layer.forward_idx[:end],
            layer.phase[:end],
            layer.ids[: layer.ptr[end]],
            layer.ptr[: end + 1],
        )
    return dataclasses.replace(request, layers=layers)
