"""Replays requests: their selections, and nulls of the same sizes, through buffers of every size asked for.

A piece of work (whole requests) is replayed on its own, and results add; so pieces go to processes, to
machines or to a cluster alike, and those that are done are kept.

    work = find_work([Path("outputs/mine")], settings)
    result = replay_all(work, settings, jobs=2, keep=Path("outputs/replay/parts"))
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.processes import call_in_processes, in_order
from dsatrace.selection_replay.buffers import Buffer, Member, buffers_of
from dsatrace.selection_replay.kept import KeptResults
from dsatrace.selection_replay.layer_overlap import LayerOverlap
from dsatrace.selection_replay.locality import MEASURES
from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.nulls import NULLS, null_of, seed_of
from dsatrace.selection_replay.on_ray import call_on_ray
from dsatrace.selection_replay.policies import POLICIES, misses
from dsatrace.selection_replay.predictors import predictions_of
from dsatrace.selection_replay.replayed import Replayed
from dsatrace.selection_replay.result import (
    RUN,
    AnswerSteps,
    Asked,
    Cell,
    Curve,
    Misses,
    Result,
    SharedTokens,
    Tree,
    add_to,
)
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.streams import Recorded, layer_steps, up_to
from dsatrace.selection_replay.sums import histogram_of
from dsatrace.selection_replay.work import About, Work
from dsatrace.trace.selections import RequestSelections, read_part

NUM_SEEDS = 5
"""Times that a policy which draws lots is replayed."""
_NULL_POLICIES = ("lru", "opt")
_NULL_MEASURES = ("lags", "working_sets")


def replay_all(
    work: Sequence[Work],
    settings: ReplaySettings,
    jobs: int = 1,
    keep: Path | None = None,
    advance: Callable[[int], None] = lambda records: None,
    on_ray: bool = False,
) -> Result:
    """The sum of all parts, replayed in `jobs` processes or on a ray cluster.

    In the folder `keep` each part's result is kept, and those there are taken. The sum does not depend on
    who replayed what, nor on the order in which they were done.
    """
    total: Result | None = None
    for part, result in zip(work, in_order(_results(work, settings, jobs, keep, on_ray)), strict=True):
        if total is None:
            total = result
        else:
            total.add(result, str(part.folder))
        advance(part.num_records)
    assert total is not None, "there is at least one part"
    if not total.requests:
        raise UserError(
            "no request has a step that counts: each saw at most top-k ids, which are all selected, or has "
            "too few steps; trace longer prompts, with --ignore-eos if the answers are short"
        )
    return total


def _results(
    work: Sequence[Work], settings: ReplaySettings, jobs: int, keep: Path | None, on_ray: bool
) -> Iterator[tuple[int, Result]]:
    """Each part's index and result, as they are done; kept by this process, which all workers report to."""
    kept = None if keep is None else KeptResults(keep)
    todo = []
    for index, part in enumerate(work):
        if kept is not None and (result := kept.get(part.key)) is not None:
            yield index, result
        else:
            todo.append(index)
    one, parts = functools.partial(replay_part, settings=settings), [work[index] for index in todo]
    call = call_on_ray if on_ray else functools.partial(call_in_processes, jobs=jobs)
    for done, result in call(one, parts):
        if kept is not None:
            kept.put(parts[done].key, result)
        yield todo[done], result


def replay_part(work: Work, settings: ReplaySettings) -> Result:
    """The sum of a part's requests."""
    total = Result(work.header, {}, {}, {}, {})
    for requests in _together(itertools.chain.from_iterable(map(read_part, work.parts)), work):
        total.add(replay_requests(requests, work, settings), work.name)
    return total


def _together(requests: Iterable[RequestSelections], work: Work) -> Iterable[list[RequestSelections]]:
    """One by one; those that share buffers, in the order in which they came."""
    prefixes = {name: about.prefix for name, about in work.about.items() if about.prefix is not None}
    if not prefixes:
        return ([request] for request in requests)
    groups: dict[str, list[RequestSelections]] = {}
    for request in requests:
        groups.setdefault(prefixes[request.request_id].group, []).append(request)
    places = {name: place for place, name in enumerate(prefixes)}
    return (sorted(group, key=lambda one: places[one.request_id]) for group in groups.values())


def replay_requests(requests: Sequence[RequestSelections], work: Work, settings: ReplaySettings) -> Result:
    """The result of one request, or of several that share buffers. Empty if none of their steps counts."""
    result, recorded = Result(work.header, {}, {}, {}, {}), work.recorded
    members: list[list[Member]] = []
    counting: list[str] = []
    for request in requests:
        layers = _members(request, work, settings)
        if not any(member.steps.num_steps for member in layers):
            continue
        members.append(layers)
        if not any(member.steps.counted.any() for member in layers):
            continue  # though others find what it has fetched
        counting.append(request.request_id)
        result.requests[f"{work.name}/{request.request_id}"] = _told(request, work)
        for member in layers:
            add_to(result.locality, {member.name: {RUN: _locality(member.steps, recorded)}})
        _compare_layers(result, layers)
    if not counting:
        return result
    seed = seed_of(settings.seed, counting[0])
    for buffer in buffers_of(members, recorded, settings):
        for stream in (RUN, *NULLS):
            _add_stream(result, buffer, stream, seed_of(seed, stream, buffer.name), counting)
    result.requests[f"{work.name}/{counting[0]}"]["misses"] = _of_request(result.buffers)
    return result


def _add_stream(result: Result, buffer: Buffer, stream: str, seed: int, counting: Sequence[str]) -> None:
    """Adds what the buffer's members find, or a null of them: each as large as they are, so one at a time."""
    recorded, settings = buffer.recorded, buffer.settings
    steps = [_stream(stream, member, settings, recorded) for member in buffer.members]
    streams = [one for one in steps if one is not None]
    if len(streams) < len(steps):
        return
    replayed = _replay(buffer, streams, stream == RUN, settings, seed)
    add_to(result.buffers, {buffer.name: {stream: replayed}})
    for member, one in zip(buffer.members, streams, strict=True):
        if stream != RUN and member.request_id in counting:
            found = _locality(one, recorded, _NULL_MEASURES)
            add_to(result.locality, {member.name: {stream: found}})


def _members(request: RequestSelections, work: Work, settings: ReplaySettings) -> list[Member]:
    """The request's layers, as far as its steps are asked for."""
    about = work.about.get(request.request_id, About())
    if settings.steps == "answer":
        if about.answer_tokens is None:
            raise UserError(
                f"{work.folder}: --steps answer: request {request.request_id} did not end, so nothing says "
                "where its answer does; use --steps all"
            )
        request = up_to(request, about.answer_tokens)
    has_heads = any(layer.kv_head for layer in request.layers)
    return [
        Member(
            request.request_id,
            layer,
            ".".join(map(str, layer if has_heads else layer[:1])),
            layer_steps(request, layer, work.recorded, settings),
            about.prefix,
        )
        for layer in request.layers
    ]


def _told(request: RequestSelections, work: Work) -> Tree:
    """Sums of what is known of a request beside its selections."""
    about = work.about.get(request.request_id, About())
    told: Tree = {}
    if work.tells_answers:
        num_steps = max(int(np.count_nonzero(layer.step_idx >= 0)) for layer in request.layers.values())
        if about.answer_tokens is None:
            told["answer"] = AnswerSteps(num_steps, 0, num_steps)
        else:
            told["answer"] = AnswerSteps(num_steps, max(0, num_steps - about.answer_tokens), 0)
    if (prefix := about.prefix) is not None:
        told["prefix"] = SharedTokens(int(prefix.shared_tokens > 0), prefix.shared_tokens, prefix.untold)
    return told


def _stream(stream: str, member: Member, settings: ReplaySettings, recorded: Recorded) -> Steps | None:
    """The member's own steps, or a null of them."""
    if stream == RUN:
        return member.steps
    seed = seed_of(seed_of(settings.seed, member.request_id), *member.layer)
    return null_of(member.steps, stream, seed, recorded.is_position)


def _locality(steps: Steps, recorded: Recorded, measures: Iterable[str] = MEASURES) -> Tree:
    return {measure: MEASURES[measure].of(steps, recorded.is_position) for measure in measures}


def _compare_layers(result: Result, layers: Sequence[Member]) -> None:
    """Adds what a layer says of the next: as a guess, and as an index that it could share."""
    for group in _comparable(layers):
        for member, before in zip(group, [None, *group], strict=False):
            predicted = predictions_of(member.steps, None if before is None else before.steps)
            known = {name: found for name, found in predicted.items() if found is not None}
            add_to(result.locality, {member.name: {RUN: {"predictors": known}}})
        overlap = LayerOverlap.of({member.layer.layer_id: member.steps for member in group})
        add_to(result.between, {",".join(member.name for member in group): {"layer_overlap": overlap}})


def _comparable(layers: Sequence[Member]) -> list[list[Member]]:
    """Layers that choose from the same ids, ascending; each KV head apart."""
    groups: dict[tuple[int, bytes], list[Member]] = {}
    for member in sorted(layers, key=lambda one: one.layer):
        key = (member.layer.kv_head, member.steps.visible.tobytes())
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _of_request(buffers: Tree) -> Tree:
    """A request's cells, its buffers added."""
    cells: dict[str, dict[str, Misses]] = {}
    for buffer in buffers.values():
        for policy, sizes in buffer[RUN]["policies"].items():
            for size, cell in sizes.items():
                one = Misses(cell.selected, cell.missed)
                known = cells.setdefault(policy, {})
                known[size] = known[size] + one if size in known else one
    return cells


def _replay(
    buffer: Buffer, streams: Sequence[Steps], is_run: bool, settings: ReplaySettings, seed: int
) -> Tree:
    """What one buffer gives: the curve of LRU, and each policy at each size."""
    steps, num_ids = buffer.asked_for(streams)
    largest, per_id = int(steps.sizes.max(initial=0)), buffer.recorded.per_block(settings)
    asked = Asked.of(steps)
    sizes = {size.label: -(-size.ids(buffer.top_k, num_ids * per_id) // per_id) for size in settings.sizes}
    fitting = {label: size for label, size in sizes.items() if size >= largest}
    start: Any = "first-b" if settings.start == "first-b" else "empty"
    at_all = lru(steps, list(fitting.values()), start=start, pin_newest=settings.pin_newest)
    seeds, without_newest = [seed_of(seed, i) for i in range(NUM_SEEDS)], steps.without_newest()
    policies: dict[str, dict[str, Cell]] = {}
    for policy in settings.policies if is_run else _NULL_POLICIES:
        if policy not in settings.policies:
            continue
        num_lots = NUM_SEEDS if "seed" in POLICIES[policy].takes else 0
        pins = settings.pin_newest or POLICIES[policy].pins_newest
        of_buffer = without_newest if pins else steps  # the newest id hits in a slot outside
        cells = policies[policy] = {}
        for label, size in sizes.items():
            ages = None
            if label not in fitting:
                cells[label] = Cell.unfit(num_lots, has_ages=policy == "lru")
                continue
            if policy == "lru":
                column = list(fitting).index(label)
                replays = [Replayed(at_all.misses[:, column], int(at_all.evictions[column]))]
                ages = at_all.ages[column]
            else:
                drawn = seeds[: max(num_lots, 1)]
                replays = [misses(of_buffer, policy, size, seed=s, start=start) for s in drawn]
            cells[label] = _cell(asked, steps.counted, size, replays, num_lots, ages)
    return {"asked": asked, "curve": Curve.of(at_all), "policies": policies}


def _cell(
    asked: Asked,
    counted: np.ndarray,
    size: int,
    replays: Sequence[Replayed],
    num_seeds: int,
    ages: np.ndarray | None,
) -> Cell:
    """Of several replays, which differ in the lots drawn, the first counts; of each, its missed ids."""
    missed = replays[0].misses[counted]
    return Cell(
        buffers=1,
        too_small=0,
        ids=size,
        steps=asked.steps,
        selected=asked.selected,
        missed=int(missed.sum()),
        missed_steps=int(np.count_nonzero(missed)),
        evictions=replays[0].evictions,
        misses=histogram_of(missed),
        by_seed=tuple(int(one.misses[counted].sum()) for one in replays) if num_seeds else None,
        ages=None
        if ages is None
        else Counter({int(age): int(ages[age]) for age in np.flatnonzero(ages) if age}),
        never=None if ages is None else int(ages[0]),
        missed_at=None if ages is None else Counter(dict(enumerate(missed.tolist()))),
    )
