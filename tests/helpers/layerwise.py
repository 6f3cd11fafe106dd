"""Layerwise sweeps of small checkpoints, and the step-by-step decode of the same tokens beside them.

folder = tiny_checkpoint(tmp_path / "hf", V32)
sets = decoded_sets(load(folder, args), transcript, positions)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dsatrace.layerwise.asked import Rows
from dsatrace.layerwise.folder import WorkFolder
from dsatrace.layerwise.sweep import IDS, Sweep, SweepSettings
from dsatrace.layerwise.transcripts import Recorded, Transcript, recorded_rows
from dsatrace.layerwise.weights import layers_to_compute, names_of
from dsatrace.model.batch import Batch, Span
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.kernels import get_kernels
from dsatrace.model.layers import ModelSetup
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.plan import read_part
from dsatrace.model.selection import Selection
from dsatrace.model.transformer import Transformer
from helpers.models import SMALL

V32 = dataclasses.replace(SMALL, max_seq_len=512)
GLM = dataclasses.replace(
    V32,
    model_type="glm_moe_dsa",
    index_rope="interleaved",
    n_layers=4,
    indexer_types=("full", "shared", "full", "shared"),
    n_shared_experts=2,
)
"""Both families; the second shares selections."""


def in_dtype(args: ModelArgs, dtype: str, plain: bool = False) -> ModelArgs:
    return dataclasses.replace(args, dtype=dtype, **(PLAIN_NUMERICS if plain else {}))


def setup_of(args: ModelArgs) -> ModelSetup:
    return ModelSetup(args, get_kernels("torch"), ParallelGroup())


def random_transcripts(args: ModelArgs, lengths: Sequence[int], prompt: int) -> list[Transcript]:
    generator = np.random.default_rng(7)
    return [
        Transcript(f"r{i}", generator.integers(0, args.vocab_size, length), prompt)
        for i, length in enumerate(lengths)
    ]


def swept(
    hf_folder: Path,
    args: ModelArgs,
    transcripts: Sequence[Transcript],
    out: Path,
    layers: range | None = None,
    rows: str = "answer",
    **settings: object,
) -> tuple[dict[int, np.ndarray], list[Recorded], WorkFolder]:
    """What each layer with an indexer selected, (R, K) by layer."""
    layers = layers or range(args.n_layers)
    recorded = recorded_rows(transcripts, Rows.of(rows))
    made = SweepSettings(**settings)  # type: ignore[arg-type]
    work = layers_to_compute(args, layers, made.with_experts)
    stored = read_part(hf_folder, args, names_of(args, work))
    folder = WorkFolder(out, {}, resume=False)
    Sweep(setup_of(args), recorded, layers, work, stored, folder, made).run()
    own = [layer for layer in layers if args.source_layers[layer] == layer]
    return {layer: np.array(folder.layer_array(IDS, layer)) for layer in own}, recorded, folder


def load(hf_folder: Path, args: ModelArgs, converted: Path) -> Transformer:
    """The ordinary model, by the ordinary way."""
    if not converted.exists():
        convert_checkpoint(hf_folder, converted, None, 1)
    return load_transformer(args, converted)


def decoded(model: Transformer, transcript: Transcript, positions: range) -> dict[int, list[Selection]]:
    """Each layer's selection of each position, a forward per token as in decode; the prompt in one chunk."""
    tokens = transcript.token_ids.tolist()
    blocks = list(range(-(-len(tokens) // 16)))
    cache = model.new_cache(len(blocks), 16)
    found: dict[int, list[Selection]] = {layer: [] for layer in range(model.args.n_layers)}
    model(Batch.build([Span(blocks, 0, tokens[: positions.start])], 16), cache)
    for indexer in model.indexers:
        indexer.on_select = lambda layer, selection: found[layer].append(selection)
    for position in positions:
        model(Batch.build([Span(blocks, position, tokens[position : position + 1])], 16), cache)
    for indexer in model.indexers:
        indexer.on_select = None
    return found


def as_sets(ids: np.ndarray | torch.Tensor) -> list[frozenset[int]]:
    return [frozenset(row) - {-1} for row in ids.tolist()]
