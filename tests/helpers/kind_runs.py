"""Small runs of every kind of selection, written through the tracer from captures made by hand.

folder = write_kind(tmp_path / "run", "entry")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.kv.layout import CacheLayout
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.kind import Always, Layer, SelectionKind
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.tracer import Tracer
from helpers.trace_samples import SECRET, SampleRequest, config_for

LAYOUT = CacheLayout("demo", 1152, 132)
PROMPTS = {"r0": 21, "r1": 150}  # tokens; the first begins dense
NUM_STEPS = 12

KINDS: Mapping[str, SelectionKind] = {
    "two heads": SelectionKind(
        layers=(Layer(8, heads=2), Layer(8, heads=2), Layer(8, heads=2, source_layer=1)), door="attach"
    ),
    "uneven layers": SelectionKind(
        layers=(Layer(16), Layer(0, heads=0), Layer(6)), door="layerwise", missing=("timing", "prefix")
    ),
    "entry": SelectionKind(
        layers=(Layer(5, always_selected=Always(window=128)), Layer(5)),
        unit="entry",
        unit_tokens=4,
        door="attach",
        missing=("scores",),
    ),
    "block": SelectionKind(
        layers=(Layer(2, heads=2), Layer(2, heads=2)),
        unit="block",
        unit_tokens=12,
        door="attach",
        missing=("scores", "tiers"),
    ),
    "expert": SelectionKind(
        layers=(Layer(0, heads=0), Layer(8), Layer(8)),
        unit="expert",
        num_ids=256,
        door="import",
        missing=("scores", "timing", "tiers", "prefix"),
    ),
    "slots": SelectionKind(
        layers=(Layer(8), Layer(8, source_layer=0), Layer(8)),
        id_kind="slot",
        door="import",
        missing=("scores", "tiers", "prefix"),
    ),
}


def sets_of(
    kind: SelectionKind, rng: np.random.Generator, seq_lens: list[int], last: np.ndarray | None = None
) -> np.ndarray:
    """(S, B, K) ids, -1 anywhere; about half of a set is as in `last`."""
    num_sets, batch = len(kind.set_layers), len(seq_lens)
    ids = np.full((num_sets, batch, kind.max_width), -1, dtype=np.int32)
    visible = kind.visible(np.array(seq_lens, dtype=np.int64)).tolist()
    for b, count in enumerate(visible):
        limit = 5000 if kind.id_kind == "slot" else count
        for s in range(num_sets):
            source = kind.set_sources[s]
            if source is not None:
                same = np.flatnonzero(kind.set_layers == source)
                ids[s, b] = ids[same[(kind.set_heads[s] or 0)], b]
                continue
            size = min(int(kind.top_k[s]), count)
            if size > 2 and kind.door == "attach" and rng.random() < 0.3:
                size -= 1  # a set may hold fewer
            before = [] if last is None else [i for i in last[s, b].tolist() if i >= 0][: size // 2]
            chosen = list(before)
            while len(chosen) < size:
                new = int(rng.integers(limit))
                if new not in chosen:
                    chosen.append(new)
            places = np.sort(rng.choice(kind.max_width, size, replace=False))
            ids[s, b, places] = chosen
    return ids


def captures(kind: SelectionKind, tracer: Tracer, seed: int = 0) -> list[StepCapture]:
    rng = np.random.default_rng(seed)
    names, last, steps = tuple(PROMPTS), None, []
    for step in range(NUM_STEPS):
        seq_lens = [tokens + step + 1 for tokens in PROMPTS.values()]
        last = sets_of(kind, rng, seq_lens, last)
        scores = rng.normal(size=last.shape).astype(np.float32)
        held = np.where(last >= 0, scores, np.nan)
        stats = np.stack([np.nanmin(held, -1), np.nanmean(held, -1), np.nanmax(held, -1)], -1)
        margins = rng.random((*stats.shape[:2], 1))
        stats = np.concatenate([stats, margins], -1).astype(np.float32)
        for of_sets in (scores, stats):
            for s, source in enumerate(kind.set_sources):
                if source is not None:
                    same = np.flatnonzero(kind.set_layers == source)
                    of_sets[s] = of_sets[same[kind.set_heads[s] or 0]]
        timed = "timing" in kind.tells
        steps.append(
            StepCapture(
                phase="layerwise" if kind.door == "layerwise" else "decode",
                request_ids=names,
                step_idx=(step,) * len(names),
                seq_len=np.array(seq_lens, dtype=np.int32),
                batch_size=len(names),
                positions=last,
                score_stats=stats if "scores" in kind.tells else None,
                scores=scores if "scores" in kind.tells else None,
                prefixes=tracer.prefixes(names),
                forward_idx=step,
                step_wall_us=100.0 + step if timed else None,
                step_synced=True if timed else None,
                needles=tracer.needles(names),
            )
        )
    return steps


def write_kind(
    folder: Path,
    name: str,
    change: Callable[[StepCapture], StepCapture] = lambda capture: capture,
    kind: SelectionKind | None = None,
    **config: Any,
) -> Path:
    """A complete run of two requests; `change` is applied to each capture, `config` is TraceConfig's."""
    kind = kind or KINDS[name]
    run = RunInfo(
        model_config={"name": name}, layouts=(LAYOUT,), device="cpu", selections="synthetic", kind=kind
    )
    settings = config_for(folder, **({"block_size": 8, "compared_block_sizes": (8, 10, 16)} | config))
    with Tracer(settings, run, secret=SECRET) as tracer:
        requests = [
            SampleRequest(
                name,
                [1] * 18 + [i + 2] * (tokens - 18),
                arrival_s=i / 10,
                needle_positions=(3, 4, 19) if i else (),
            )
            for i, (name, tokens) in enumerate(PROMPTS.items())
        ]
        for request in requests:
            tracer.add_request(request)
        for capture in captures(kind, tracer):
            tracer.put(change(capture))
        for request in requests:
            facts = RequestFacts(
                num_output_tokens=NUM_STEPS + 1, state="length", first_token_s=0.5, finish_s=9.0
            )
            tracer.finish_request(request, facts)
    return folder


def with_ids(capture: StepCapture, ids: np.ndarray) -> StepCapture:
    return dataclasses.replace(capture, positions=ids)
