"""Loading: the model ends with the file's bytes, or with one clear line and nothing changed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import INFERENCE
from dsatrace.model.checkpoint import dequantise, load_checkpoint
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.shards import CheckpointError
from dsatrace.model.tiny import write_checkpoint
from dsatrace.model.transformer import Transformer

NAME = "layers.1.ffn.experts.2.w1.weight"


def build(args: ModelArgs, device: str = "meta", rank: int = 0, size: int = 1) -> Transformer:
    with torch.device(device):
        return Transformer(args, group=ParallelGroup(rank, size))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def fp8_checkpoint(fp8_hf: Path, fp8_args: ModelArgs) -> Path:
    folder = fp8_hf.parent / "mp1"
    convert_checkpoint(fp8_hf, folder, fp8_args.n_routed_experts, 1)
    return folder


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_every_parameter_gets_the_files_value(
    device: str, tiny_args: ModelArgs, tiny_checkpoint: Path
) -> None:
    model = build(tiny_args, device)
    before = dict(model.named_parameters())
    seen: list[tuple[int, int]] = []
    load_checkpoint(model, tiny_checkpoint, progress=lambda done, total: seen.append((done, total)))
    stored = load_file(tiny_checkpoint / "model0-mp1.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for name, value in stored.items():
        assert state[name].dtype == before[name].dtype and state[name].device.type == "cpu"
        assert torch.equal(state[name], value.to(state[name].dtype)), name
    if device == "cpu":
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert len(seen) == len(stored) and seen[-1] == (seen[0][1], seen[0][1])


def test_each_rank_loads_its_shard(tiny_args: ModelArgs, tiny_hf: Path, tmp_path: Path) -> None:
    files = convert_checkpoint(tiny_hf, tmp_path / "mp2", tiny_args.n_routed_experts, 2)
    for rank, file in enumerate(files):
        model = build(tiny_args, rank=rank, size=2)
        load_checkpoint(model, tmp_path / "mp2", rank, world_size=2)
        for name, value in load_file(file).items():
            assert torch.equal(model.state_dict()[name], value.to(model.state_dict()[name].dtype)), name


def test_fp8_goes_into_an_fp8_model_bit_for_bit(fp8_args: ModelArgs, fp8_checkpoint: Path) -> None:
    model = build(fp8_args)
    load_checkpoint(model, fp8_checkpoint)
    stored = load_file(fp8_checkpoint / "model0-mp1.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys() and state[NAME].dtype is torch.float8_e4m3fn
    for name in (NAME, NAME.replace("weight", "scale")):
        assert torch.equal(state[name].view(torch.uint8), stored[name].view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fp8_is_dequantised_where_the_model_has_none(
    dtype: str, fp8_args: ModelArgs, fp8_checkpoint: Path
) -> None:
    model = build(dataclasses.replace(fp8_args, dtype=dtype))
    load_checkpoint(model, fp8_checkpoint)
    stored = load_file(fp8_checkpoint / "model0-mp1.safetensors")
    for name in (NAME, "layers.0.attn.wq_a.weight", "layers.0.attn.wo.weight"):
        weight, scale = stored[name], stored[name.replace("weight", "scale")]
        rows, cols = weight.shape
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
        assert torch.equal(
            model.state_dict()[name], (weight.float() * full).to(model.state_dict()[name].dtype)
        )


def test_a_matrix_that_is_left_unquantised_stays_so(
    fp8_args: ModelArgs, fp8_checkpoint: Path, tmp_path: Path
) -> None:
    """As some fp8 checkpoints leave some: the model computes with the same values as with all dequantised."""
    left = [NAME, "layers.0.attn.wkv_b.weight", "layers.0.attn.indexer.wk.weight"]
    tensors = load_file(fp8_checkpoint / "model0-mp1.safetensors")
    for name in left:
        scale = tensors.pop(name.replace("weight", "scale"))
        tensors[name] = dequantise(tensors[name], scale).bfloat16()
    save_file(tensors, tmp_path / "model0-mp1.safetensors")
    model = build(fp8_args)
    load_checkpoint(model, tmp_path)
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name in left:
        assert state[name].dtype is torch.bfloat16 and torch.equal(state[name], tensors[name])
    wide = build(dataclasses.replace(fp8_args, dtype="bf16"))
    load_checkpoint(wide, tmp_path)
    x = torch.randn(5, fp8_args.dim, dtype=torch.bfloat16)
    for each in (model, wide):
        assert torch.equal(each.layers[1].ffn.experts["2"].w1(x), x @ tensors[NAME].T)


def test_dequantise_follows_partial_blocks() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    values = dequantise(weight, torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    assert [values[i, j].item() for i, j in ((0, 0), (127, 127), (0, 128), (128, 0), (129, 199))] == [
        1,
        1,
        2,
        4,
        8,
    ]


class Fused(nn.Module):
    """Two names over one block of memory, as a fused projection would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.zeros(6, 4)
        self.a = nn.Linear(4, 2, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.a.weight = nn.Parameter(self.both[:2], requires_grad=False)
        self.b.weight = nn.Parameter(self.both[2:], requires_grad=False)


def test_views_of_a_fused_tensor_are_filled_in_place(tmp_path: Path) -> None:
    values = {"a.weight": torch.randn(2, 4), "b.weight": torch.randn(4, 4)}
    save_file(values, tmp_path / "model0-mp1.safetensors")
    model = Fused()
    load_checkpoint(model, tmp_path)
    assert torch.equal(model.both, torch.cat(list(values.values())))


def test_loaded_weights_outlive_the_file(tiny_args: ModelArgs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A tensor of safetensors is a view into the mapped file; a model must not keep one."""
    args = dataclasses.replace(tiny_args, dtype="bf16")
    file = tmp_path / "model0-mp1.safetensors"
    file.write_bytes((tiny_checkpoint / file.name).read_bytes())
    model = build(args)
    load_checkpoint(model, tmp_path)
    before = snapshot(model)
    with file.open("r+b") as opened:
        opened.seek(20_000)
        opened.write(bytes(file.stat().st_size - 20_000))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def damaged(tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    tensors: dict[str, torch.Tensor | None] = dict(load_file(tiny_checkpoint / "model0-mp1.safetensors"))
    tensors.update(changes)
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / "model0-mp1.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME: None}, rf"lacks {NAME} \[128, 256\]; use the config"),
        ({NAME: torch.ones(127, 256)}, r"1.weight has shape \[127, 256\], but the model wants \[128, 256\]"),
        ({"layers.9.attn_norm.weight": torch.ones(3)}, r"holds layers.9.attn_norm.weight \[3\], which"),
        ({NAME: torch.ones(128, 256, dtype=torch.int8)}, "1.weight is torch.int8, but the model holds"),
        ({NAME: torch.ones(128, 256).to(torch.float8_e4m3fn)}, r"1.weight is fp8 and needs .* \[1, 2\]"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    changes: dict[str, torch.Tensor | None],
    message: str,
    tiny_args: ModelArgs,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    folder = damaged(tiny_checkpoint, tmp_path, changes)
    model = build(tiny_args, "cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, folder)
    assert all((value == 0.5).all() for value in model.state_dict().values())


def test_a_bf16_checkpoint_is_no_fp8_model(fp8_args: ModelArgs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", fp8_args, weights="bf16")
    convert_checkpoint(tmp_path / "hf", tmp_path / "out", fp8_args.n_routed_experts, 1)
    with pytest.raises(CheckpointError, match="set dtype in the config to the checkpoint's"):
        load_checkpoint(build(fp8_args), tmp_path / "out")


def test_folders_without_the_right_file_are_named(
    tiny_args: ModelArgs, tiny_hf: Path, tmp_path: Path
) -> None:
    model = build(tiny_args)
    with pytest.raises(CheckpointError, match=r"missing: holds no model0-mp1.safetensors; give the folder"):
        load_checkpoint(model, tmp_path / "missing")
    with pytest.raises(CheckpointError, match="convert it first with dsatrace convert"):
        load_checkpoint(model, tiny_hf)
    convert_checkpoint(tiny_hf, tmp_path / "mp8", 8, 8)
    with pytest.raises(
        CheckpointError, match="holds model0-mp8, not model0-mp1; run with 8 ranks or convert"
    ):
        load_checkpoint(model, tmp_path / "mp8")
    (tmp_path / "mp8" / "model3-mp8.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model3-mp8\.safetensors, though it holds model0-mp8"):
        load_checkpoint(build(tiny_args, rank=3, size=8), tmp_path / "mp8", 3, 8)


def test_a_truncated_file_is_named(tiny_args: ModelArgs, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "model0-mp1.safetensors"
    file.write_bytes((tiny_checkpoint / file.name).read_bytes())
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=r"model0-mp1\.safetensors: truncated"):
        load_checkpoint(build(tiny_args), tmp_path)


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from dsatrace.model.checkpoint import load_checkpoint

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024

class Model(nn.Module):
    def __init__(self, num_layers):
        super().__init__()
        layers = (nn.Linear(2048, 4096, bias=False, device="meta") for _ in range(num_layers))
        self.layers = nn.ModuleList(layers)

torch.set_num_threads(1)
load_checkpoint(Model(1), sys.argv[1])
before = peak()
load_checkpoint(Model(12), sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_keeps_no_second_copy(tmp_path: Path) -> None:
    layer_bytes = 2048 * 4096 * 4
    for num_layers in (1, 12):
        folder = tmp_path / str(num_layers)
        folder.mkdir()
        tensors = {f"layers.{i}.weight": torch.zeros(4096, 2048) for i in range(num_layers)}
        save_file(tensors, folder / "model0-mp1.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "1", tmp_path / "12"],
        env={**os.environ, "PYTHONPATH": str(INFERENCE)},
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    growth = int(result.stdout)
    assert 10 * layer_bytes < growth < 14 * layer_bytes
