"""What a sweep will need before it runs: shards and bytes, memory, disk, arithmetic, time.

Calculated from the config, the rows and the folder's index; no weight is read.

    plan = plan_sweep(folder, args, work, recorded, SweepSettings())
    plan.missing                     # shards that are not there
    plan.peak.total                  # bytes of memory beyond the interpreter's
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dsatrace.layerwise.sweep import CACHE_BLOCK, EXPERT_ROWS, SweepSettings
from dsatrace.layerwise.transcripts import Recorded
from dsatrace.layerwise.weights import EMBEDDING, UNITS_AHEAD, LayerWork, needed
from dsatrace.model.attention import GATHER_BYTES
from dsatrace.model.config import ModelArgs
from dsatrace.model.layers import STORED_DTYPES
from dsatrace.model.names import UNQUANTISED, Target, scale_of
from dsatrace.model.plan import shard_places
from dsatrace.units import size_text

_FP32 = 4
LIBRARIES_BYTES = 40_000_000
"""Measured: what torch's kernels load once they compute, and what the allocator keeps."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of memory at the most, beyond what the interpreter and its libraries take."""

    weights: int  # of the layer, and of the experts in use and read ahead
    cache: int  # KV of the longest transcript, one layer
    rows: int  # what a chunk of rows needs in attention
    recorded: int  # what is kept of the recorded rows until the layer is done

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rows + self.recorded + LIBRARIES_BYTES


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """Everything is calculated."""

    shards: dict[str, int]  # file -> bytes of it that are needed; one entry "" where there is no index
    missing: list[str]  # of the shards, those that are not there
    num_bytes: int  # to read
    peak: Peak
    disk_bytes: int  # of the work folder
    flops: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Reading goes on beside the arithmetic: the longer of the two."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def plan_sweep(
    folder: Path,
    args: ModelArgs,
    work: Sequence[LayerWork],
    recorded: Sequence[Recorded],
    settings: SweepSettings,
) -> SweepPlan:
    """Raises `CheckpointError` for an index that cannot be read."""
    places = shard_places(folder)
    shards: dict[str, int] = {}
    unique = len({token for one in recorded for token in one.transcript.token_ids[: one.num_rows].tolist()})
    for hf_name, target in _targets(args, work):
        size = _stored_bytes(args, target)
        if hf_name == EMBEDDING:
            size = size // args.vocab_size * unique
        file = "" if places is None else places.get(hf_name, "")
        shards[file] = shards.get(file, 0) + size
    shards = dict(sorted(shards.items()))
    num_rows = sum(one.num_rows for one in recorded)
    num_recorded = sum(len(one.positions) for one in recorded)
    width = 3 if any(one.part == "all" for one in work) else 1
    precise = _precise_bytes(args)
    kept = num_recorded * args.index_topk * (_FP32 + _FP32 * settings.with_scores) * len(work)
    shared = num_rows * args.index_topk * _FP32 * (args.indexer_types is not None)
    return SweepPlan(
        shards,
        [file for file in shards if file and not (folder / file).is_file()],
        sum(shards.values()),
        peak_bytes(args, work, recorded, settings),
        num_rows * args.dim * precise * width + kept + shared,
        sum(flops_of(args, one, recorded) for one in work),
    )


def _targets(args: ModelArgs, work: Sequence[LayerWork]) -> list[tuple[str, Target]]:
    embedding = Target("embed.weight", 0, (args.vocab_size, args.dim))
    return [(EMBEDDING, embedding), *((hf_name, target) for _, _, hf_name, target in needed(args, work))]


def _stored_bytes(args: ModelArgs, target: Target) -> int:
    """Of a tensor with its scales, as the config says that it is stored."""
    size = 1
    for length in target.shape:
        size *= length
    if target.name.endswith("ffn.gate.bias"):
        return size * _FP32
    if args.dtype != "fp8":
        return size * min(STORED_DTYPES[args.dtype].itemsize, _FP32)
    if len(target.shape) < 2 or target.name.endswith(UNQUANTISED):
        return size * torch.bfloat16.itemsize
    rows, columns = scale_of("", target)[1].shape
    return size + rows * columns * _FP32


def _precise_bytes(args: ModelArgs) -> int:
    return 8 if args.dtype == "fp64" else _FP32


def _compute_bytes(args: ModelArgs) -> int:
    return 2 if args.dtype == "fp8" else STORED_DTYPES[args.dtype].itemsize


def peak_bytes(
    args: ModelArgs, work: Sequence[LayerWork], recorded: Sequence[Recorded], settings: SweepSettings
) -> Peak:
    """At the most over all layers. Hidden states lie in files, whose pages are given back chunk by chunk."""
    precise, compute = _precise_bytes(args), _compute_bytes(args)
    units: dict[tuple[int, int], int] = {}  # (layer, -1 or expert) -> bytes, in the order of reading
    for one, _, _, target in needed(args, work):
        unit = one.layer, -1 if target.expert is None else target.expert
        units[unit] = units.get(unit, 0) + _held_bytes(args, target)
    order = sorted(units)
    absorbed = args.n_heads * (args.qk_nope_head_dim + args.v_head_dim) * args.kv_lora_rank * precise
    longest, num_rows = max(one.num_rows for one in recorded), sum(one.num_rows for one in recorded)
    rows = max(max(one.positions.start, len(one.positions)) for one in recorded)
    rows = min(settings.rows_at_a_time, rows)  # a chunk is recorded or not
    gathered = rows * min(args.index_topk, longest) * args.latent_dim * precise
    of_attention = rows * _row_bytes(args, longest) + 3 * min(GATHER_BYTES["cpu"], gathered) // 2
    expert_rows = min(EXPERT_ROWS, num_rows * args.n_activated_experts // max(args.n_routed_experts, 1))
    of_expert = expert_rows * (args.dim * (3 * precise + compute) + args.moe_inter_dim * 5 * precise)
    phases = []
    for i, (layer, expert) in enumerate(order):
        attends = any(one.layer == layer and one.part != "select" for one in work)
        held = sum(units[unit] for unit in order[i : i + 1 + UNITS_AHEAD]) + absorbed * attends
        held += units[layer, -1] if expert >= 0 else 0
        phases.append((held, of_attention if expert < 0 else of_expert))
    weights, of_rows = max(phases, key=sum)
    blocks = -(-longest // CACHE_BLOCK) * CACHE_BLOCK
    cache = blocks * ((args.latent_dim + args.index_head_dim) * compute + precise * args.index_fp8)
    num_recorded = sum(len(one.positions) for one in recorded)
    kept = num_recorded * args.index_topk * (_FP32 + _FP32 * settings.with_scores)
    return Peak(weights, cache, of_rows, kept)


def _held_bytes(args: ModelArgs, target: Target) -> int:
    """Of a tensor in memory: as it is stored, or wider where the model holds it so."""
    stored = _stored_bytes(args, target)
    size = 1
    for length in target.shape:
        size *= length
    if len(target.shape) < 2 or target.name.endswith(("ffn.gate.weight", "weights_proj.weight")):
        return size * _precise_bytes(args)
    return max(stored, size * STORED_DTYPES[args.dtype].itemsize)


def _row_bytes(args: ModelArgs, context: int) -> int:
    """What one row of a chunk needs where attention needs most, or the indexer."""
    precise, compute = _precise_bytes(args), _compute_bytes(args)
    heads, latent = args.n_heads, args.latent_dim
    hidden = args.dim * (precise + 2 * compute)
    selected = min(args.index_topk, context) * 8 * 3
    query, sums = heads * latent * precise, heads * args.kv_lora_rank * precise
    attention = query + 2 * sums + heads * args.v_head_dim * 2 * precise
    indexer = 4 * args.index_n_heads * args.index_head_dim * precise + 2 * context * precise
    return hidden + selected + max(attention, indexer)


def flops_of(args: ModelArgs, work: LayerWork, recorded: Sequence[Recorded]) -> float:
    """Multiplications and additions of a layer, over all its rows."""
    total = 0.0
    for one in recorded:
        rows = float(one.num_rows)
        queries = rows if work.part == "all" else float(len(one.positions))
        seen = sum(one.positions) + len(one.positions) if work.part != "all" else rows * (rows + 1) / 2
        indexer = args.index_n_heads * args.index_head_dim
        total += 2 * rows * args.dim * args.index_head_dim
        total += 2 * queries * (args.dim * args.q_lora_rank + args.q_lora_rank * indexer)
        total += 2 * indexer * seen
        if work.part == "select":
            continue
        selected = sum(min(position + 1, args.index_topk) for position in range(one.num_rows))
        total += 2 * rows * args.dim * args.latent_dim
        per_head = args.q_lora_rank * args.qk_head_dim + args.v_head_dim * args.dim
        per_head += (args.qk_nope_head_dim + args.v_head_dim) * args.kv_lora_rank
        total += 2 * queries * args.n_heads * per_head
        total += 2 * selected * args.n_heads * (2 * args.kv_lora_rank + args.qk_rope_head_dim)
        if work.part == "all":
            total += 2 * rows * 3 * args.dim * _inter_dim(args, work.layer)
    return total


def _inter_dim(args: ModelArgs, layer: int) -> int:
    """Hidden width of the feed-forward layer that a row goes through."""
    if layer < args.n_dense_layers:
        return args.inter_dim
    return (args.n_activated_experts + args.n_shared_experts) * args.moe_inter_dim


def measured_flops_per_s(device: str) -> float:
    """Of a product of fp32 matrices here, in a fraction of a second."""
    size = 4096 if device == "cuda" else 1024
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ b)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def plan_text(plan: SweepPlan, folder: Path, flops_per_s: float, bytes_per_s: float) -> list[str]:
    """Lines for the terminal."""
    names = [name for name in plan.shards if name]
    present = len(names) - len(plan.missing)
    lines = [f"to read: {size_text(plan.num_bytes)}" + (f" of {len(names)} shards" if names else "")]
    lines += [
        f"  {name}: {size_text(size)}{'' if name not in plan.missing else ', MISSING'}"
        for name, size in plan.shards.items()
        if name
    ]
    if plan.missing:
        lines.append(f"{present} of {len(names)} shards are in {folder}; fetch those that are missing")
    peak = plan.peak
    lines += [
        f"memory at most: {size_text(peak.total)} beyond the interpreter's",
        f"  weights {size_text(peak.weights)}, KV of a layer {size_text(peak.cache)}, a chunk of rows "
        f"{size_text(peak.rows)}, recorded rows {size_text(peak.recorded)}",
        f"disk while it runs: {size_text(plan.disk_bytes)} in the run's folder",
        f"arithmetic: {plan.flops / 1e12:,.1f} TFLOP",
        f"time, calculated: {plan.seconds(flops_per_s, bytes_per_s) / 60:.1f} minutes, at "
        f"{flops_per_s / 1e9:,.0f} GFLOP/s (a matrix product measured here) and "
        f"{bytes_per_s / 1e9:.1f} GB/s (assumed)",
    ]
    return lines
