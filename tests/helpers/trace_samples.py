"""Made-up captures for the tracer's tests, and the same seen by the plain implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.schema import LEVELS, TIER_NAMES
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo, TierSettings
from dsatrace.trace.request_facts import RecordedRequest
from dsatrace.verify.plain_record import PlainFetches, PlainSelection, step_record

LAYOUT = CacheLayout("demo", 1152, 132)
WAYS: list[dict[str, Any]] = [
    *({"level": level} for level in LEVELS),
    {"store_scores": True},
    {"keep_order": True},
    {"store_scores": True, "keep_order": True},
]
"""Every way that `TraceConfig` lets a record be written."""
SECRET = b"not a secret, only a test's key."
RUN = RunInfo(model_config={"n_layers": 2}, layouts=(LAYOUT,), device="cpu")


SampleRequest = RecordedRequest


def sample_capture(
    rng: np.random.Generator,
    seq_lens: Sequence[int],
    num_layers: int = 2,
    k: int = 8,
    *,
    step_idx: int = 0,
    clustered: bool = False,
    cached_blocks: Sequence[int] | None = None,
    **changes: Any,
) -> StepCapture:
    """Selections of `k` (or all visible) positions in score order, with ties among the scores."""
    batch = len(seq_lens)
    positions = np.full((num_layers, batch, k), -1, dtype=np.int32)
    scores = np.zeros((num_layers, batch, k), dtype=np.float32)
    stats = np.zeros((num_layers, batch, 4), dtype=np.float32)
    for layer in range(num_layers):
        for b, seq_len in enumerate(seq_lens):
            count = min(k, seq_len)
            start = int(rng.integers(0, seq_len - count + 1))
            chosen = (
                np.arange(start, start + count) if clustered else rng.choice(seq_len, count, replace=False)
            )
            mine = rng.integers(-5, 5, count).astype(np.float32) * np.float32(0.1)
            order = np.argsort(-mine, kind="stable")  # ties in no particular order of positions
            positions[layer, b, :count] = rng.permutation(chosen) if clustered else chosen
            scores[layer, b, :count] = mine[order]
            stats[layer, b] = mine.min(), mine.mean(), mine.max(), rng.random()
    cached = cached_blocks or [0] * batch
    fields: dict[str, Any] = {
        "phase": "decode",
        "request_ids": tuple(f"r{b}" for b in range(batch)),
        "step_idx": (step_idx,) * batch,
        "seq_len": np.array(seq_lens, dtype=np.int32),
        "batch_size": batch,
        "positions": positions,
        "score_stats": stats,
        "scores": scores,
        "prefixes": tuple(RequestPrefix(n, f"{b:016x}") for b, n in enumerate(cached)),
        "step_wall_us": float(rng.random() * 1000),
        "forward_idx": int(rng.integers(1 << 40)),  # every sample is a forward of its own
        "step_synced": True,
    }
    return StepCapture(**(fields | changes))


def with_shared_layers(capture: StepCapture, shared_layers: Mapping[int, int]) -> StepCapture:
    """The capture, but some layers use another's selection (see `manifest.shared_layers`)."""
    sources = [shared_layers.get(layer, layer) for layer in range(len(capture.positions))]
    scores = None if capture.scores is None else capture.scores[sources]
    return dataclasses.replace(
        capture, positions=capture.positions[sources], score_stats=capture.score_stats[sources], scores=scores
    )


def sample_needles(rng: np.random.Generator, seq_lens: Sequence[int], share: float = 0.7) -> Any:
    """For some of the requests up to five positions of the prompt, ascending."""
    return tuple(
        tuple(sorted(rng.choice(n, int(rng.integers(1, min(n, 5) + 1)), replace=False).tolist()))
        if rng.random() < share
        else ()
        for n in seq_lens
    )


def plain_selections(
    capture: StepCapture, tiers: TierSettings | None = None, shared_layers: Mapping[int, int] | None = None
) -> Iterator[PlainSelection]:
    """The capture's records' inputs, as plain lists, in the order of the file."""
    num_layers, batch, k = capture.positions.shape
    for b in range(batch):
        for layer in range(num_layers):
            count = min(k, int(capture.seq_len[b]))
            scores = None if capture.scores is None else capture.scores[layer, b, :count].tolist()
            yield PlainSelection(
                request_id=capture.request_ids[b],
                layer_id=layer,
                step_idx=capture.step_idx[b],
                seq_len=int(capture.seq_len[b]),
                top_k=k,
                positions=capture.positions[layer, b, :count].tolist(),
                scores=scores,
                score_stats=capture.score_stats[layer, b].tolist(),
                num_cached_blocks=capture.prefixes[b].num_cached_blocks,
                prefix_key=capture.prefixes[b].key,
                batch_size=capture.batch_size,
                phase=capture.phase,
                forward_idx=capture.forward_idx,
                step_wall_us=capture.step_wall_us,
                step_synced=capture.step_synced,
                needle_positions=capture.needles[b] if capture.needles else (),
                fetches=_plain_fetches(capture, tiers, b, layer, count) if tiers else None,
                source_layer=(shared_layers or {}).get(layer),
            )


def _plain_fetches(capture: StepCapture, tiers: TierSettings, b: int, layer: int, count: int) -> PlainFetches:
    fetches = capture.fetches
    assert fetches is not None
    counted = ("bytes_read", "bytes_useful", "read_ops", "evicted_units", "bytes_written", "errors")
    moved: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(TIER_NAMES):
        moved[name] = {field: int(getattr(fetches, field)[layer, b, i]) for field in counted}
        moved[name]["latency_us"] = float(fetches.latency_us[layer, i])
    return PlainFetches(
        served_by=fetches.served_by[layer, b, :count].tolist(),
        moved=moved,
        latency_kinds={name: pool.latency_kind for name, pool in tiers.pools.items()},
        granularity=tiers.granularity,
    )


def plain_records(
    capture: StepCapture,
    config: TraceConfig,
    tiers: TierSettings | None = None,
    shared_layers: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    return [
        step_record(
            selection,
            block_size=config.block_size,
            latent_bytes=LAYOUT.latent_bytes_per_token,
            index_bytes=LAYOUT.index_bytes_per_token,
            level=config.level,
            store_scores=config.store_scores,
            keep_order=config.keep_order,
        )
        for selection in plain_selections(capture, tiers, shared_layers)
    ]


def config_for(out: Path | str = "unused", **changes: Any) -> TraceConfig:
    return TraceConfig(out=Path(out), **changes)
