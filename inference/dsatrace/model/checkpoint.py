"""Loads a converted checkpoint, one tensor at a time, nothing taken on trust.

Names, shapes and types are compared from the file's header before a byte of the model changes.
`load_checkpoint` knows a module only through its `state_dict()`, whose names are those of the file.

    model = load_transformer(args, "converted")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .config import ModelArgs
from .convert import Progress, shard_name
from .hf_config import FP8_GROUP
from .kernels.interface import Kernels
from .kernels.torch_kernels import TorchKernels
from .parallel import ParallelGroup
from .shards import DTYPES, CheckpointError, StoredTensor, read_header
from .transformer import Transformer

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def load_transformer(
    args: ModelArgs,
    path: str | Path,
    kernels: Kernels | None = None,
    group: ParallelGroup | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The rank's model, built on the meta device and filled as by `load_checkpoint`; in evaluation mode."""
    group = group or ParallelGroup()
    with torch.device("meta"):
        model = Transformer(args, kernels, group)
    load_checkpoint(model, path, group.rank, group.size, progress, device)
    return model.eval()


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fills every parameter of `model` from `model{rank}-mp{world_size}.safetensors`.

    Parameters on the meta device are created on `device`; real ones are written in place, so
    views into fused tensors stay views. bf16, fp16, fp32 and fp64 convert into each other, and
    an fp8 weight with its scale is dequantised where the model holds no fp8. Where an fp8
    checkpoint leaves a matrix unquantised, so does the model. Anything else that differs
    raises `CheckpointError` and leaves the model as it was.
    """
    file = _find(Path(path), rank, world_size)
    stored = read_header(file)
    targets = _targets(model, dict(model.state_dict(keep_vars=True)), stored, file)
    total = sum(stored[name].num_bytes for name in targets)
    done = 0
    # Opened anew for each layer: a mapped page counts as the process's memory until the file is closed.
    for _, names in itertools.groupby(sorted(targets), key=_layer_of):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in names:
                value = _read(tensors.get_tensor, name, stored, targets)
                _fill(model, name, targets[name], value, device)
                done += stored[name].num_bytes
                if progress is not None:
                    progress(done, total)


def fill_part(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    read: Callable[[str], torch.Tensor],
    device: torch.device | str = "cpu",
) -> None:
    """Fills the parameters that `stored` names, by their names in `model`, and leaves the others as they are.

    `read` gives the stored tensor of a name, which becomes the parameter itself where it need not be
    converted. Types are treated, and mistakes raised, as `load_checkpoint` does.
    """
    wanted = stored.keys() | {_scale_name(name) for name in stored}
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in wanted}
    where = next(iter(stored.values())).path
    for name, target in _targets(model, targets, stored, where).items():
        _set(model, name, target, _read(read, name, stored, targets).to(device, target.dtype))


def _targets(
    model: nn.Module, targets: dict[str, torch.Tensor], stored: dict[str, StoredTensor], file: Path
) -> dict[str, torch.Tensor]:
    """`targets` as they will be filled, each checked against what is stored."""
    unquantised = _left_unquantised(stored, targets)
    for name in unquantised:
        del targets[_scale_name(name)]
        targets[name] = torch.empty(targets[name].shape, dtype=torch.bfloat16, device="meta")
    _check(file, stored, targets)
    for name in unquantised:
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.leave_unquantised()  # type: ignore[operator]
        targets[name] = layer.get_parameter("weight")
    return targets


def _find(folder: Path, rank: int, world_size: int) -> Path:
    file = folder / shard_name(rank, world_size)
    if file.is_file():
        return file
    held = sorted(other.stem for other in folder.glob("model*-mp*.safetensors"))
    if siblings := [name for name in held if name.endswith(f"-mp{world_size}")]:
        raise CheckpointError(f"{folder}: lacks {file.name}, though it holds {siblings[0]}; convert again")
    if held:
        ranks = held[0].rpartition("mp")[2]
        raise CheckpointError(
            f"{folder}: holds {held[0]}, not {file.stem}; run with {ranks} ranks or convert again"
        )
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: holds no {file.name}; convert it first with dsatrace convert")
    raise CheckpointError(f"{folder}: holds no {file.name}; give the folder that dsatrace convert wrote")


def _left_unquantised(stored: dict[str, StoredTensor], targets: dict[str, torch.Tensor]) -> list[str]:
    """The model's fp8 weights that a file of fp8 weights holds in a wider type."""
    types = {name: DTYPES[tensor.dtype] for name, tensor in stored.items()}
    if torch.float8_e4m3fn not in types.values():
        return []
    return [n for n, t in targets.items() if t.dtype is torch.float8_e4m3fn and types.get(n) in _FLOATS]


def _layer_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else ""


def _check(file: Path, stored: dict[str, StoredTensor], targets: dict[str, torch.Tensor]) -> None:
    """Every tensor the model wants is there in its shape and a fitting type, and nothing else is."""
    used = set()
    for name, target in targets.items():
        if name not in stored:
            raise CheckpointError(f"{file}: lacks {name} {list(target.shape)}; {_remedy(name, stored)}")
        tensor = stored[name]
        if tensor.shape != tuple(target.shape):
            raise CheckpointError(
                f"{file}: {name} has shape {list(tensor.shape)}, but the model wants {list(target.shape)}; "
                "use the config this checkpoint was made for"
            )
        used.add(name)
        if _is_dequantised(tensor, target):
            scale = _scale_name(name)
            blocks = tuple(-(-n // FP8_GROUP) for n in tensor.shape)
            if scale not in stored or stored[scale].shape != blocks:
                raise CheckpointError(f"{file}: {name} is fp8 and needs {scale} of shape {list(blocks)}")
            used.add(scale)
        elif DTYPES[tensor.dtype] != target.dtype and not {DTYPES[tensor.dtype], target.dtype} <= _FLOATS:
            raise CheckpointError(
                f"{file}: {name} is {DTYPES[tensor.dtype]}, but the model holds {target.dtype}; "
                "set dtype in the config to the checkpoint's"
            )
    if unused := [name for name in stored if name not in used]:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{file}: holds {unused[0]} {list(stored[unused[0]].shape)}{more}, which the model has not; "
            "use the config this checkpoint was made for"
        )


def _remedy(name: str, stored: dict[str, StoredTensor]) -> str:
    weight = f"{name.removesuffix('scale')}weight"
    if name.endswith(".scale") and weight in stored:
        return f"its weight is {DTYPES[stored[weight].dtype]}: set dtype in the config to the checkpoint's"
    return "use the config this checkpoint was made for"


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"


def _is_dequantised(tensor: StoredTensor, target: torch.Tensor) -> bool:
    return DTYPES[tensor.dtype] is torch.float8_e4m3fn and target.dtype in _FLOATS


def _read(
    read: Callable[[str], torch.Tensor],
    name: str,
    stored: dict[str, StoredTensor],
    targets: dict[str, torch.Tensor],
) -> torch.Tensor:
    if _is_dequantised(stored[name], targets[name]):
        return dequantise(read(name), read(_scale_name(name)))
    return read(name)


def dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 `(out, in)` of an fp8 weight and its fp32 scales `(ceil(out/128), ceil(in/128))`."""
    return TorchKernels().dequantise_weight(weight, scale, torch.float32)


def _fill(
    model: nn.Module, name: str, target: torch.Tensor, value: torch.Tensor, device: torch.device | str
) -> None:
    if not target.is_meta:
        target.data.copy_(value)
        return
    # A copy of our own: the value is a view into the mapped file. empty_like of a meta tensor imports sympy.
    filled = torch.empty(target.shape, dtype=target.dtype, device=device).copy_(value)
    _set(model, name, target, filled)


def _set(model: nn.Module, name: str, target: torch.Tensor, filled: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(target, nn.Parameter):
        module.register_parameter(leaf, nn.Parameter(filled, requires_grad=target.requires_grad))
    else:
        module.register_buffer(leaf, filled)
