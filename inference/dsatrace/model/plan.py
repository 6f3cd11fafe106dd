"""What a conversion will do: read a Hugging Face checkpoint's config and headers, check, assign the pieces.

Reads headers only and writes nothing. `CheckpointError` is raised here, before a byte is converted:
for a config that is not understood, and a checkpoint that is not whole or does not divide over the ranks.

    folder = Path("DeepSeek-V3.2")
    source = read_source(folder)
    pieces = plan(folder, source, read_model(folder), model_parallel=8)
    pieces["lm_head.weight"][3].rows    # (48480, 64640): rank 3 of 8 holds these rows
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .config import PLAIN_NUMERICS, ModelArgs
from .hf_config import FP8_GROUP
from .names import HEAD, Target, checkpoint_tensors, scale_of
from .shards import CheckpointError, StoredTensor, read_header

FP8 = "F8_E4M3"
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
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
    weight_map = shard_places(hf_path) or {}
    files = [hf_path / name for name in sorted(set(weight_map.values()))]
    files = files or sorted(hf_path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{hf_path}: no safetensors files there; give the folder of the checkpoint")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this shard is missing, though {INDEX} names it; fetch it")
        for name, stored in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name}: stands in both {tensors[name].path} and {file}; remove one")
            tensors[name] = stored
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{hf_path / shard}: lacks {name}, which {INDEX} places there")
    return tensors


def read_part(hf_path: Path, args: ModelArgs, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Some tensors of a Hugging Face folder, and the scales of those in fp8; its other shards may be missing.

    Raises `CheckpointError` naming every shard that holds one of them and is not there.
    """
    asked = set(names)
    targets = {name: target for name, target in checkpoint_tensors(args).items() if name in asked}
    wanted = targets.keys() | {scale_of(name, target)[0] for name, target in targets.items()}
    tensors = {}
    places = shard_places(hf_path)
    if places is None:
        tensors = {name: stored for name, stored in read_source(hf_path).items() if name in wanted}
    else:
        files = sorted({places[name] for name in wanted if name in places})
        if missing := [file for file in files if not (hf_path / file).is_file()]:
            raise CheckpointError(
                f"{hf_path}: lacks {len(missing)} of the {len(files)} shards that are needed: "
                f"{', '.join(missing)}; fetch them"
            )
        for file in files:
            held = read_header(hf_path / file)
            tensors.update({name: held[name] for name in wanted if name in held})
    for name, target in targets.items():
        if name not in tensors:
            raise CheckpointError(f"{hf_path}: lacks {name}; fetch the checkpoint again")
        if tensors[name].dtype == FP8 and scale_of(name, target)[0] not in tensors:
            raise CheckpointError(
                f"{tensors[name].path}: {name} is fp8, and {scale_of(name, target)[0]} is missing; fetch the "
                "checkpoint again"
            )
        _check_shapes(name, tensors, target, 1)
    return tensors


def shard_places(hf_path: Path) -> dict[str, str] | None:
    """The file that holds each tensor, by the folder's index; None where there is no index."""
    index = hf_path / INDEX
    if not index.is_file():
        return None
    try:
        return {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error


def read_model(hf_path: Path, ignore_keys: Sequence[str] = ()) -> ModelArgs:
    """The model that a Hugging Face folder's `config.json` describes, every key of it understood."""
    config = hf_path / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{hf_path}: no config.json, which says what model this is; fetch it")
    try:  # what is converted does not depend on the numerics it will run with
        return ModelArgs.from_json(config, ignore_keys, **PLAIN_NUMERICS)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def plan(
    hf_path: Path, source: dict[str, StoredTensor], args: ModelArgs, model_parallel: int
) -> dict[str, list[Piece]]:
    """Where each source tensor goes, in source order."""
    if "model.embed_tokens.weight" not in source:
        raise CheckpointError(
            f"{hf_path}: lacks model.embed_tokens.weight; give a whole checkpoint in Hugging Face layout"
        )
    if model_parallel < 1 or (_has_experts(args) and args.n_routed_experts % model_parallel):
        raise CheckpointError(
            f"model parallel {model_parallel} does not divide the {args.n_routed_experts} experts"
        )
    fp8 = [name for name, stored in source.items() if stored.dtype == FP8]
    if fp8 and args.dtype != "fp8":
        raise CheckpointError(
            f"{hf_path / 'config.json'}: has no quantization_config, but {fp8[0]}{_and_more(fp8)} are fp8; "
            "restore the model's own config.json"
        )
    kept = {name: stored for name, stored in source.items() if not _is_left_out(name, stored, source, args)}
    _check_expert_count(hf_path, kept, args)
    targets: dict[str, Target] = {}
    for name, target in checkpoint_tensors(args).items():
        targets[name] = target
        if name in kept and kept[name].dtype == FP8:
            targets.update([scale_of(name, target)])
    if missing := [name for name in targets if name not in kept]:
        raise CheckpointError(
            f"{hf_path}: lacks {missing[0]}{_and_more(missing)} of the {args.n_layers} layers expected; "
            + _why_missing(missing, kept)
        )
    if unknown := [name for name in kept if name not in targets]:
        raise CheckpointError(
            f"{kept[unknown[0]].path}: unknown tensor {unknown[0]}{_and_more(unknown)}; "
            f"a {args.model_type} checkpoint with this config.json has none of that name"
        )
    for name in kept:
        _check_shapes(name, kept, targets[name], model_parallel)
    pieces = {name: _pieces(name, kept[name], targets[name], args, model_parallel) for name in kept}
    if args.tie_word_embeddings:
        embedding = pieces["model.embed_tokens.weight"]
        embedding += [dataclasses.replace(piece, name=HEAD) for piece in embedding]
    return pieces


def has_leftover_quantisation(source: dict[str, StoredTensor], args: ModelArgs) -> bool:
    """Whether `config.json` says fp8, but no tensor is: the weights were cast, the config was not."""
    return args.dtype == "fp8" and all(stored.dtype != FP8 for stored in source.values())


def _has_experts(args: ModelArgs) -> bool:
    return args.n_layers > args.n_dense_layers


def _is_left_out(name: str, stored: StoredTensor, source: dict[str, StoredTensor], args: ModelArgs) -> bool:
    """Whether the model has no use for the tensor; raises for a layer that `config.json` does not know."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return args.tie_word_embeddings
    match = _LAYER.match(name)
    if match is None:
        return False
    layer = int(match[1])
    if layer >= args.n_layers:
        if f"model.layers.{layer}.eh_proj.weight" not in source:  # which a next-token module has
            raise CheckpointError(
                f"{stored.path}: holds {name}, but config.json says num_hidden_layers {args.n_layers}; "
                "restore the model's own config.json"
            )
        return True
    if ".self_attn.indexer." in name:
        return args.source_layers[layer] != layer
    return 0 in stored.shape  # transformers stores shared experts of no width


def _check_expert_count(hf_path: Path, tensors: dict[str, StoredTensor], args: ModelArgs) -> None:
    ids = {int(match[1]) for name in tensors if (match := _EXPERT.search(name))}
    found, expected = max(ids, default=-1) + 1, args.n_routed_experts if _has_experts(args) else 0
    if found != expected:
        raise CheckpointError(
            f"{hf_path}: holds {found} routed experts per layer, but config.json says {expected}; "
            "restore the model's own config.json, or fetch what is missing"
        )


def _why_missing(missing: list[str], kept: dict[str, StoredTensor]) -> str:
    if all(name.endswith("_scale_inv") for name in missing):
        return "an fp8 weight needs its scales; fetch the checkpoint again"
    if any(".indexer." in name for name in missing) and not any(".indexer." in name for name in kept):
        return "these are the weights of a model without an indexer, beside a config.json of one that has it"
    return "fetch the checkpoint again, or restore its own config.json"


def _check_shapes(name: str, tensors: dict[str, StoredTensor], target: Target, model_parallel: int) -> None:
    """Of a tensor and, if it is fp8, its scale, also after the split: a scale serves whole 128-blocks."""
    weight = tensors[name]
    if weight.shape != target.shape and not name.endswith("_scale_inv"):
        raise CheckpointError(
            f"{weight.path}: {name} has shape {list(weight.shape)}, but config.json makes it "
            f"{list(target.shape)}; restore the model's own config.json"
        )
    if weight.dtype != FP8:
        return
    scale_name, wanted = scale_of(name, target)
    scale = tensors[scale_name]
    if scale.dtype != "F32" or scale.shape != wanted.shape:
        raise CheckpointError(
            f"{scale_name}: is {scale.dtype} {list(scale.shape)}, "
            f"but its weight needs F32 {list(wanted.shape)}"
        )
    block = FP8_GROUP * model_parallel
    if model_parallel > 1 and target.dim is not None and weight.shape[target.dim] % block:
        raise CheckpointError(
            f"{scale_name}: model parallel {model_parallel} cuts through its {FP8_GROUP}-blocks "
            f"(dimension {target.dim} of the weight is {weight.shape[target.dim]}); use fewer ranks"
        )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _pieces(
    name: str, stored: StoredTensor, target: Target, args: ModelArgs, model_parallel: int
) -> list[Piece]:
    num_rows = stored.shape[0] if stored.shape else 1
    row_bytes = stored.num_bytes // max(num_rows, 1)
    whole = Piece(0, target.name, stored.shape, (0, num_rows), (0, row_bytes))
    if target.expert is not None:
        return [dataclasses.replace(whole, rank=target.expert // (args.n_routed_experts // model_parallel))]
    if target.dim is None:
        return [dataclasses.replace(whole, rank=rank) for rank in range(model_parallel)]
    length = stored.shape[target.dim] if target.dim < len(stored.shape) else 0
    if not length or length % model_parallel:
        raise CheckpointError(
            f"{name}: model parallel {model_parallel} does not divide dimension {target.dim} "
            f"of its shape {list(stored.shape)}"
        )
    local_shape = list(stored.shape)
    local_shape[target.dim] //= model_parallel
    whole = dataclasses.replace(whole, shape=tuple(local_shape))

    def share(length: int, rank: int) -> tuple[int, int]:
        return length // model_parallel * rank, length // model_parallel * (rank + 1)

    return [
        dataclasses.replace(whole, rank=rank, rows=share(num_rows, rank))
        if target.dim == 0
        else dataclasses.replace(whole, rank=rank, row_bytes=share(row_bytes, rank))
        for rank in range(model_parallel)
    ]
