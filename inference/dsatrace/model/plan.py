"""What a conversion will do: read a Hugging Face checkpoint's headers, check them, assign the pieces.

Reads headers only and writes nothing. A checkpoint that is not whole, or does not divide over
the ranks, raises `CheckpointError` here, before a byte is converted.

    source = read_source(Path("DeepSeek-V3.2"))
    pieces = plan(Path("DeepSeek-V3.2"), source, n_experts=256, model_parallel=8)
    pieces["lm_head.weight"][3].rows    # (48480, 64640): rank 3 of 8 holds these rows
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from .config import FP8_GROUP
from .names import Target, checkpoint_tensors, scale_of
from .shards import CheckpointError, StoredTensor, read_header

DEFAULT_NUM_LAYERS = 61
"""Layers of the released model; layer 61 is the multi-token-prediction module, which is left out."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(mlp\.(?:gate|experts|shared_experts)\.)?")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a source tensor that one rank holds: rows, and bytes within each row."""

    rank: int
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    row_bytes: tuple[int, int]


def read_source(hf_path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face folder, in file order; by its index when it has one."""
    index = hf_path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        files = [hf_path / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map = {}
        files = sorted(hf_path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{hf_path}: no safetensors files there; give the folder of the checkpoint")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this shard is missing, though {index.name} names it; fetch it")
        for name, stored in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name}: stands in both {tensors[name].path} and {file}; remove one")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{hf_path / shard}: lacks {name}, which {index.name} places there")
    return tensors


def plan(
    hf_path: Path, source: dict[str, StoredTensor], n_experts: int, model_parallel: int
) -> dict[str, list[Piece]]:
    """Where each source tensor goes, in source order; the checkpoint must be whole and hold nothing else."""
    if "model.embed_tokens.weight" not in source:
        raise CheckpointError(
            f"{hf_path}: lacks model.embed_tokens.weight; give a whole checkpoint in Hugging Face layout"
        )
    num_layers = _num_layers(hf_path)
    kept = {name: stored for name, stored in source.items() if not _is_left_out(name, num_layers)}
    _check_expert_count(hf_path, kept, n_experts)
    moe_layers = {int(match[1]) for name in kept if (match := _LAYER.match(name)) and match[2]}
    targets: dict[str, Target] = {}
    for name, target in checkpoint_tensors(num_layers, moe_layers, n_experts).items():
        targets[name] = target
        if name in kept and kept[name].dtype == "F8_E4M3":
            targets.update([scale_of(name, target)])
    if missing := [name for name in targets if name not in kept]:
        raise CheckpointError(
            f"{hf_path}: lacks {missing[0]}{_and_more(missing)} of the {num_layers} layers expected; "
            "fetch the checkpoint again"
        )
    if unknown := [name for name in kept if name not in targets]:
        raise CheckpointError(
            f"{kept[unknown[0]].path}: unknown tensor {unknown[0]}{_and_more(unknown)}; "
            "a DeepSeek-V3.2 checkpoint has none of that name"
        )
    for name in kept:
        _check_scale(name, kept, targets[name], model_parallel)
    return {name: _pieces(name, kept[name], targets[name], n_experts, model_parallel) for name in kept}


def _num_layers(hf_path: Path) -> int:
    config = hf_path / "config.json"
    if not config.is_file():
        return DEFAULT_NUM_LAYERS
    try:
        num_layers = json.loads(config.read_bytes()).get("num_hidden_layers", DEFAULT_NUM_LAYERS)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a JSON object: {error}") from error
    if type(num_layers) is not int or num_layers < 1:
        raise CheckpointError(f"{config}: num_hidden_layers must be a positive integer, not {num_layers!r}")
    return num_layers


def _is_left_out(name: str, num_layers: int) -> bool:
    """Layers past the model's own, and rotary tables that some exports store: the model computes them."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= num_layers


def _check_expert_count(hf_path: Path, tensors: dict[str, StoredTensor], n_experts: int) -> None:
    ids = {int(match[1]) for name in tensors if (match := _EXPERT.search(name))}
    found = max(ids, default=-1) + 1
    if found != n_experts:
        raise CheckpointError(
            f"{hf_path}: holds {found} routed experts a layer, not the {n_experts} asked for"
        )


def _check_scale(name: str, tensors: dict[str, StoredTensor], target: Target, model_parallel: int) -> None:
    """An fp8 weight and its scale must fit, also after the split: a scale serves whole 128-blocks."""
    weight = tensors[name]
    if weight.dtype != "F8_E4M3":
        return
    scale_name, _ = scale_of(name, target)
    scale = tensors[scale_name]
    blocks = tuple(-(-length // FP8_GROUP) for length in weight.shape)
    if scale.dtype != "F32" or scale.shape != blocks:
        raise CheckpointError(
            f"{scale_name}: is {scale.dtype} {list(scale.shape)}, but its weight needs F32 {list(blocks)}"
        )
    if (
        target.dim is not None
        and weight.shape[target.dim] % (FP8_GROUP * model_parallel)
        and model_parallel > 1
    ):
        raise CheckpointError(
            f"{scale_name}: model parallel {model_parallel} cuts through its {FP8_GROUP}-blocks "
            f"(dimension {target.dim} of the weight is {weight.shape[target.dim]}); use fewer ranks"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _pieces(
    name: str, stored: StoredTensor, target: Target, n_experts: int, model_parallel: int
) -> list[Piece]:
    num_rows = stored.shape[0] if stored.shape else 1
    row_bytes = stored.num_bytes // max(num_rows, 1)
    whole = Piece(0, target.name, stored.shape, (0, num_rows), (0, row_bytes))
    if target.expert is not None:
        return [dataclasses.replace(whole, rank=target.expert // (n_experts // model_parallel))]
    if target.dim is None:
        return [dataclasses.replace(whole, rank=rank) for rank in range(model_parallel)]
    length = stored.shape[target.dim] if target.dim < len(stored.shape) else 0
    if not length or length % model_parallel:
        raise CheckpointError(
            f"{name}: model parallel {model_parallel} does not divide dimension {target.dim} "
            f"of its shape {list(stored.shape)}"
        )
    local_shape = (
        *stored.shape[: target.dim],
        length // model_parallel,
        *stored.shape[target.dim + 1 :],
    )
    rows, width = num_rows // model_parallel, row_bytes // model_parallel
    return [
        Piece(rank, target.name, local_shape, (rank * rows, (rank + 1) * rows), (0, row_bytes))
        if target.dim == 0
        else Piece(rank, target.name, local_shape, (0, num_rows), (rank * width, (rank + 1) * width))
        for rank in range(model_parallel)
    ]
