"""Which buffers a replay has, and what each is asked for.

One per request and layer, as serving engines have hot buffers; one for a request's layers; or one per layer
for the requests that begin alike, as an engine has it whose HBM is a cache of KV blocks: a layer keeps one
map of its resident blocks for all requests, and a shared prefix lies there once.

    for buffer in buffers_of(members, recorded, settings):
        steps, context = buffer.asked_for([member.steps for member in buffer.members])
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsatrace.selection_replay.prefixes import Prefix, span_of_blocks
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.streams import Recorded, in_order, numbered_anew, pooled
from dsatrace.trace.selections import LayerSet


class Member(NamedTuple):
    """One layer of one request."""

    request_id: str
    layer: LayerSet
    name: str  # of the layer, as results have it
    steps: Steps
    prefix: Prefix | None  # where requests share


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Who shares it, and how much it holds at a time."""

    name: str  # the layer, or "all"
    members: list[Member]  # that share it
    top_k: int  # of what it holds at a time, together
    recorded: Recorded
    settings: ReplaySettings

    def asked_for(self, streams: Sequence[Steps]) -> tuple[Steps, int]:
        """What the buffer is asked for if these are its members' steps, and from how many distinct ids their
        last steps choose."""
        if not self.recorded.is_position:
            streams = [numbered_anew(steps) for steps in streams]
        if self.settings.share == "prefix":
            names = self._names(streams)
            when = [member.steps.when for member in self.members]
            seen = [one[: steps.visible[-1]] for one, steps in zip(names, streams, strict=True)]
            together = in_order(streams, names, [one for one in when if one is not None])
            return together, len(np.unique(np.concatenate(seen)))
        context = sum(int(steps.visible[-1]) for steps in streams)
        return (streams[0] if len(streams) == 1 else pooled(streams)), context

    def _names(self, streams: Sequence[Steps]) -> list[np.ndarray]:
        """What each member's ids are called in the buffer: a shared one as its first owner's is."""
        block = self.recorded.tokens_per_id(self.settings)
        num_ids = {
            member.request_id: max(steps.num_ids, int(steps.visible.max(initial=0)))
            for member, steps in zip(self.members, streams, strict=True)
        }
        spans = {member.request_id: member.prefix.spans if member.prefix else () for member in self.members}
        absent: dict[str, int] = {}  # owners without a step
        for end, owner in itertools.chain.from_iterable(spans.values()):
            if owner not in num_ids:
                absent[owner] = max(absent.get(owner, 0), -(-end // block))
        sizes = absent | num_ids
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        return [
            np.array([*(starts[owner] for _, owner in spans[name]), starts[name]])[
                span_of_blocks(spans[name], size, block)
            ]
            + np.arange(size)
            for name, size in num_ids.items()
        ]


def buffers_of(
    requests: Sequence[Sequence[Member]],  # the layers of each
    recorded: Recorded,
    settings: ReplaySettings,
) -> list[Buffer]:
    """The buffers of these requests, which share them if any do."""

    def of(name: str, members: list[Member], num_sets: int = 1) -> Buffer:
        top_k = num_sets * recorded.selection.layers[members[0].layer.layer_id].top_k
        return Buffer(name, members, top_k, recorded, settings)

    if settings.share == "none":
        return [of(member.name, [member]) for layers in requests for member in layers]
    if settings.share == "request":
        top_k = [recorded.selection.layers[member.layer.layer_id].top_k for member in requests[0]]
        return [dataclasses.replace(of("all", list(layers)), top_k=sum(top_k)) for layers in requests]
    by_layer: dict[LayerSet, list[Member]] = {}
    for member in (member for layers in requests for member in layers):
        by_layer.setdefault(member.layer, []).append(member)
    return [of(members[0].name, members, _most_at_once(members)) for members in by_layer.values()]


def _most_at_once(members: Sequence[Member]) -> int:
    """Members that ever ran together: from its first to its last forward pass each."""
    spans = [one.steps.when for one in members if one.steps.when is not None]
    begins = np.sort([when[0] for when in spans])
    ends = np.sort([when[-1] for when in spans])
    running = np.arange(1, len(begins) + 1) - np.searchsorted(ends, begins, side="left")
    return int(running.max())
