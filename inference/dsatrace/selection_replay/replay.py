"""Replays requests: their selections, and nulls of the same sizes, through buffers of every size asked for.

A part of a run (whole requests) is replayed on its own, and results add; so parts go to processes, to
machines or to a cluster alike, and those that are done are kept.

    work = find_work([Path("outputs/mine")], settings)
    result = replay_all(work, settings, jobs=2, keep=Path("outputs/replay/parts"))
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import digest_of
from dsatrace.processes import call_in_processes, in_order
from dsatrace.selection_replay.kept import KeptResults
from dsatrace.selection_replay.layer_overlap import LayerOverlap
from dsatrace.selection_replay.locality import MEASURES
from dsatrace.selection_replay.lru import lru
from dsatrace.selection_replay.nulls import nulls_of, seed_of
from dsatrace.selection_replay.on_ray import call_on_ray
from dsatrace.selection_replay.policies import POLICIES, misses
from dsatrace.selection_replay.predictors import predictions_of
from dsatrace.selection_replay.replayed import Replayed
from dsatrace.selection_replay.result import RUN, Asked, Cell, Curve, Misses, Result, Tree
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.steps import Steps
from dsatrace.selection_replay.streams import Recorded, layer_steps, numbered_anew, pooled
from dsatrace.selection_replay.sums import histogram_of
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import (
    LayerSet,
    RequestSelections,
    SelectionPart,
    read_part,
    selection_parts,
)
from dsatrace.version import __version__

MOST_WORK = 2048
"""Pieces that a run is cut into: a result takes some MB and a second to add, however much it sums up."""
NUM_SEEDS = 5
"""Times that a policy which draws lots is replayed."""
_NULL_POLICIES = ("lru", "opt")
_NULL_MEASURES = ("lags", "working_sets")


@dataclasses.dataclass(frozen=True)
class Work:
    """Some of a run's requests, with all that replaying them needs but their step files."""

    folder: Path
    name: str  # of the run, as results show it
    parts: tuple[SelectionPart, ...]
    content: str  # digests of the files that the parts lie in
    recorded: Recorded
    header: dict[str, Any]  # of its result

    @property
    def key(self) -> str:
        """Names its result: the same records, settings and version give the same one."""
        recorded = dataclasses.asdict(self.recorded)
        requests = [part.request_ids for part in self.parts]
        told = [self.name, self.content, requests, recorded, self.header, __version__]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    @property
    def num_records(self) -> int:
        return sum(part.num_records for part in self.parts)


def find_work(
    folders: Sequence[Path], settings: ReplaySettings, shard: tuple[int, int] = (0, 1)
) -> list[Work]:
    """The parts of these runs, or those of shard (i, n): every n-th file where files hold whole requests,
    else every n-th part. A shard may have none.

    Raises `UserError` for a run that cannot be replayed, naming why.
    """
    index, count = shard
    turns = itertools.count()
    work: list[Work] = []
    for folder in folders:
        run = RunReader(folder)
        recorded = Recorded.of(run.manifest, settings, str(folder))
        header, name = _header(run.manifest, recorded, settings), folder.absolute().name
        if run.is_for_replay:
            paths = [path for path in run.step_paths if next(turns) % count == index]
            parts = selection_parts(run, paths=paths)
        else:
            parts = [part for part in selection_parts(run) if next(turns) % count == index]
        known = {folder / file: told for file, told in (run.manifest.get("files") or {}).items()}
        paths = sorted({span.path for part in parts for span in part.spans})
        digests = {path: _digest(path, known.get(path)) for path in paths}
        size = -(-len(parts) // MOST_WORK) or 1
        for together in (tuple(parts[i : i + size]) for i in range(0, len(parts), size)):
            content = "".join(sorted(digests[span.path] for part in together for span in part.spans))
            work.append(Work(folder, name, together, content, recorded, header))
    if next(turns) == 0:
        raise UserError(
            f"{', '.join(map(str, folders))}: no step was recorded, so there is nothing to replay"
        )
    return work


def _digest(path: Path, known: Mapping[str, Any] | None) -> str:
    """As the manifest has it, of a file that still has its size."""
    if known is None or path.stat().st_size != known["bytes"]:
        known = digest_of(path)
    return str(known["sha256"])


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
    for request in itertools.chain.from_iterable(map(read_part, work.parts)):
        name = f"{work.name}/{request.request_id}"
        total.add(replay_request(request, name, work.recorded, settings, work.header), work.name)
    return total


def _header(manifest: Mapping[str, Any], recorded: Recorded, settings: ReplaySettings) -> dict[str, Any]:
    per_id, selection = recorded.per_block(settings), recorded.selection
    return {
        "settings": settings.to_json(),
        "unit": f"block of {settings.block}" if settings.block else selection.unit,
        "unit_tokens": settings.block or selection.unit_tokens,
        "id_kind": selection.id_kind,
        "door": selection.door,
        "top_k": [layer.top_k for layer in selection.layers if layer.heads],
        "bytes_per_id": recorded.bytes_per_id and recorded.bytes_per_id * per_id,
        "index_bytes_per_id": recorded.index_bytes_per_id and recorded.index_bytes_per_id * per_id,
        "model_config_digest": manifest["model_config_digest"],
        "selections": manifest["selections"],
        "keeps_order": bool(manifest["trace"]["keep_order"]),
    }


def replay_request(
    request: RequestSelections,
    name: str,
    recorded: Recorded,
    settings: ReplaySettings,
    header: dict[str, Any],
) -> Result:
    """One request's result, under `name`. Empty if none of its steps counts."""
    has_heads = any(layer.kv_head for layer in request.layers)
    layers = {layer: layer_steps(request, layer, recorded, settings) for layer in request.layers}
    names = {layer: ".".join(map(str, layer if has_heads else layer[:1])) for layer in layers}
    result = Result(header, {}, {}, {}, {})
    if not any(steps.num_steps > steps.num_warm for steps in layers.values()):
        return result
    seed = seed_of(settings.seed, request.request_id)
    streams: dict[str, dict[LayerSet, Steps]] = {RUN: layers}
    for layer, steps in layers.items():
        for null, of_layer in nulls_of(steps, seed_of(seed, *layer), recorded.is_position).items():
            if of_layer is not None:
                streams.setdefault(null, {})[layer] = of_layer
    for stream, of_stream in streams.items():
        for buffer in _buffers(of_stream, names, recorded, settings):
            replayed = _replay(buffer, stream == RUN, settings, seed_of(seed, stream, buffer.name))
            result.buffers.setdefault(buffer.name, {})[stream] = replayed
        for layer, steps in of_stream.items():
            measured = {
                measure: MEASURES[measure].of(steps, recorded.is_position)
                for measure in (MEASURES if stream == RUN else _NULL_MEASURES)
            }
            result.locality.setdefault(names[layer], {})[stream] = measured
    for group in _comparable(layers):
        for layer, before in zip(group, [None, *group], strict=False):
            predicted = predictions_of(layers[layer], None if before is None else layers[before])
            result.locality[names[layer]][RUN]["predictors"] = {
                predictor: found for predictor, found in predicted.items() if found is not None
            }
        overlap = LayerOverlap.of({layer.layer_id: layers[layer] for layer in group})
        result.between[",".join(names[layer] for layer in group)] = {"layer_overlap": overlap}
    result.requests[name] = {"misses": _of_request(result.buffers)}
    return result


def _comparable(layers: Mapping[LayerSet, Steps]) -> list[list[LayerSet]]:
    """Layers that choose from the same ids, ascending; each KV head apart."""
    groups: dict[tuple[int, bytes], list[LayerSet]] = {}
    for layer in sorted(layers):
        groups.setdefault((layer.kv_head, layers[layer].visible.tobytes()), []).append(layer)
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


@dataclasses.dataclass(frozen=True)
class _Buffer:
    name: str  # the layer, or "all"
    steps: Steps
    top_k: int  # of its layers together
    context: int  # ids that their last steps can choose from, together
    per_id: int  # ids of the run's unit that one id of the steps stands for


def _buffers(
    layers: Mapping[LayerSet, Steps],
    names: Mapping[LayerSet, str],
    recorded: Recorded,
    settings: ReplaySettings,
) -> list[_Buffer]:
    """A request's buffers: one per layer, or one."""
    if not recorded.is_position:
        layers = {layer: numbered_anew(steps) for layer, steps in layers.items()}
    per_id = recorded.per_block(settings)
    apart = [
        _Buffer(
            names[layer],
            steps,
            recorded.selection.layers[layer.layer_id].top_k,
            int(steps.visible[-1]),
            per_id,
        )
        for layer, steps in layers.items()
    ]
    if settings.share == "none":
        return apart
    together = pooled(list(layers.values()))
    top_k, context = sum(one.top_k for one in apart), sum(one.context for one in apart)
    return [_Buffer("all", together, top_k, context, per_id)]


def _replay(buffer: _Buffer, is_run: bool, settings: ReplaySettings, seed: int) -> Tree:
    """What one buffer gives: the curve of LRU, and each policy at each size."""
    steps, largest, per_id = buffer.steps, int(buffer.steps.sizes.max(initial=0)), buffer.per_id
    asked = Asked.of(steps)
    context = buffer.context * per_id
    sizes = {size.label: -(-size.ids(buffer.top_k, context) // per_id) for size in settings.sizes}
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
            cells[label] = _cell(asked, steps.num_warm, size, replays, num_lots, ages)
    return {"asked": asked, "curve": Curve.of(at_all), "policies": policies}


def _cell(
    asked: Asked,
    num_warm: int,
    size: int,
    replays: Sequence[Replayed],
    num_seeds: int,
    ages: np.ndarray | None,
) -> Cell:
    """Of several replays, which differ in the lots drawn, the first counts; of each, its missed ids."""
    missed = replays[0].misses[num_warm:]
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
        by_seed=tuple(int(one.misses[num_warm:].sum()) for one in replays) if num_seeds else None,
        ages=None
        if ages is None
        else Counter({int(age): int(ages[age]) for age in np.flatnonzero(ages) if age}),
        never=None if ages is None else int(ages[0]),
        missed_at=None if ages is None else Counter(dict(enumerate(missed.tolist()))),
    )
