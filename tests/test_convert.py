"""Conversion: every rank gets its slice bit for bit, every fault is one clear line, memory stays small."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import INFERENCE
from dsatrace.commands.convert import main
from dsatrace.files import write_json
from dsatrace.model import tiny
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.shards import CheckpointError, ShardWriter, read_header
from dsatrace.model.tiny import write_checkpoint
from helpers.forked import Started

Tensors = dict[str, torch.Tensor]

# Written out by hand from DeepSeek's converter, apart from our table, so that each checks the other.
RENAMED = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "self_attn": "attn",
    "mlp": "ffn",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "weight_scale_inv": "scale",
    "e_score_correction_bias": "bias",
}
SPLIT_DIM = {"embed": 0, "head": 0, "wkv_b": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def load_hf(folder: Path) -> Tensors:
    return {name: value for file in folder.glob("model*") if file.suffix == ".safetensors"
            for name, value in load_file(file).items()}  # fmt: skip


def expected_shard(hf: Tensors, rank: int, num_ranks: int, num_experts: int) -> Tensors:
    shard = {}
    for hf_name, value in hf.items():
        parts = [RENAMED.get(part, part) for part in hf_name.removeprefix("model.").split(".")]
        module = parts[-2]
        dim = 0 if module == "wq_b" and "indexer" not in parts else SPLIT_DIM.get(module)
        if "experts" in parts:
            expert = int(parts[parts.index("experts") + 1])
            if expert * num_ranks // num_experts == rank:
                shard[".".join(parts)] = value
        elif dim is None:
            shard[".".join(parts)] = value
        else:
            shard[".".join(parts)] = value.chunk(num_ranks, dim)[rank]
    return shard


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_every_rank_gets_its_slice(
    kind: str, num_ranks: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue("tiny_hf" if kind == "bf16" else "fp8_hf")
    args: ModelArgs = request.getfixturevalue("tiny_args" if kind == "bf16" else "fp8_args")
    hf = load_hf(folder)
    seen: list[tuple[int, int]] = []
    files = convert_checkpoint(
        folder,
        tmp_path / "out",
        args.n_routed_experts,
        num_ranks,
        lambda done, all_: seen.append((done, all_)),
    )
    assert [file.name for file in files] == [f"model{r}-mp{num_ranks}.safetensors" for r in range(num_ranks)]
    for rank, file in enumerate(files):
        ours, theirs = load_file(file), expected_shard(hf, rank, num_ranks, args.n_routed_experts)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
            assert torch.equal(as_bytes(ours[name]), as_bytes(value)), name
    total = sum(value.numel() * value.itemsize for value in hf.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    copied = {file.name for file in (tmp_path / "out").iterdir()} - {file.name for file in files}
    assert copied == {file.name for file in folder.glob("*token*")} | {"config.json"}


def test_tensors_larger_than_a_block_are_split_right(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert_checkpoint(tiny_hf, tmp_path / "whole", 8, 2)
    monkeypatch.setattr("dsatrace.model.convert._BLOCK_BYTES", 1000)
    pieces = convert_checkpoint(tiny_hf, tmp_path / "pieces", 8, 2)
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in pieces]


def test_the_next_token_module_is_left_out(tiny_hf: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(tiny_hf, tmp_path)
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(4, 8),
        "model.layers.4.mlp.experts.0.up_proj.weight": torch.ones(4),
    }
    save_file(extra, folder / "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").unlink()  # and an index is not needed
    (file,) = convert_checkpoint(folder, tmp_path / "out", 8, 1)
    assert file.read_bytes() == (tiny_checkpoint / file.name).read_bytes()


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "hf"))


def edit(folder: Path, change: Callable[[Tensors], object], keep_index: bool = False) -> None:
    """Rewrites the checkpoint as one shard, `change`d, without an index unless it is kept in step."""
    tensors = load_hf(folder)
    change(tensors)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if keep_index:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    else:
        index.unlink(missing_ok=True)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def with_tensor(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: torch.ones(*shape)}))


def drop_last_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def drop_all_shards(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()


def repeat_a_tensor(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model-extra.safetensors")


def cut_data(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "model-00002-of-00003.safetensors", 100)


def spoil_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json" + bytes(50))


def misplace_in_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(value))


def spoil_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def with_config(**changes: object) -> Callable[[Path], None]:
    """Sets keys of config.json, or takes them out where the value is `...`."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return change


def without_indexers(folder: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".indexer." in name]:
            del tensors[name]

    edit(folder, drop)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "n_experts", "num_ranks", "message"),
    [
        (None, 16, 2, "holds 8 routed experts per layer, not the 16 asked for"),
        (None, 4, 2, "holds 8 routed experts per layer, not the 4 asked for"),
        (None, 8, 3, "model parallel 3 does not divide the 8 experts"),
        (None, 8, 0, "model parallel 0 does not divide"),
        (drop_last_shard, 8, 2, r"model-00003-of-00003.safetensors: this shard is missing, though model.saf"),
        (drop_all_shards, 8, 2, "hf: no safetensors files there"),
        (repeat_a_tensor, 8, 2, "lm_head.weight: stands in both .*model-00.* and .*model-extra"),
        (cut_data, 8, 2, r"model-00002-of-00003.safetensors: truncated: holds \d+ bytes of \d+"),
        (cut_header, 8, 2, r"model-00002-of-00003.safetensors: truncated at 100 bytes, inside its header"),
        (spoil_header, 8, 2, "model-00002-of-00003.safetensors: not a safetensors file, or damaged"),
        (misplace_in_index, 8, 2, "model-00003-of-00003.safetensors: lacks model.norm.weight, which"),
        (spoil_index, 8, 2, "model.safetensors.index.json: not a safetensors index"),
        (without_config, 8, 2, "hf: no config.json, which says what model this is; fetch it"),
        (with_config(num_hidden_layers="four"), 8, 2, 'num_hidden_layers must be an integer, not "f'),
        (with_config(num_hidden_layers=3), 8, 2, r"holds model.layers.3.*says num_hidden_layers 3"),
        (with_config(num_hidden_layers=5), 8, 2, r"lacks model.layers.4.* \d+ more tensors of the 5"),
        (with_config(model_type="deepseek_v3"), 8, 2, "model_type deepseek_v3: this model has no indexer"),
        (with_config(hidden_act="gelu"), 8, 2, 'config.json: hidden_act "gelu": must be "silu" here'),
        (with_config(hidden_size=128), 8, 2, r"but config.json makes it \[.*128.*\]; restore"),
        (with_config(n_routed_experts=16), None, 2, "holds 8 routed experts per layer, but .* says 16"),
        (with_config(quantization_config={"quant_method": "awq"}), 8, 2, 'quant_method "awq": weights'),
        (without_indexers, 8, 2, "the weights of a model without an indexer, beside"),
        (without("model.embed_tokens.weight"), 8, 2, "hf: lacks model.embed_tokens.weight; give a whole"),
        (without(EXPERT), 8, 2, f"lacks {EXPERT} of the 4 layers expected"),
        (without("model.layers.0.mlp.up_proj.weight"), 8, 2, r"lacks model.layers.0.mlp.up_proj.weight of"),
        (without("model.layers.3.self_attn.indexer.k_norm.bias"), 8, 2, "lacks .*3.self_attn.indexer"),
        (with_tensor("model.layers.1.self_attn.q_proj.weight", 4, 4), 8, 2, "unknown tensor .*q_proj"),
        (with_tensor("lm_head.weight", 385, 4), 8, 2, r"lm_head.weight has shape \[385, 4\], but config"),
        (with_tensor("model.layers.1.self_attn.o_proj.weight", 7), 8, 2, r"o_proj.weight has shape \[7\]"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], None] | None,
    n_experts: int | None,
    num_ranks: int,
    message: str,
    tiny_hf: Path,
    tmp_path: Path,
) -> None:
    folder = tiny_hf
    if damage is not None:
        folder = copy(tiny_hf, tmp_path)
        damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_checkpoint(folder, tmp_path / "out", n_experts, num_ranks)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"hf"}


def test_a_converted_checkpoint_is_no_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a whole checkpoint in Hugging Face layout"):
        convert_checkpoint(tiny_checkpoint, tmp_path / "out", 8, 1)


def test_ranks_that_do_not_divide_a_dimension(tiny_args: ModelArgs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dataclasses.replace(tiny_args, vocab_size=385))
    message = r"lm_head.weight: model parallel 2 does not divide dimension 0 of its shape \[385, 256\]"
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(tmp_path / "hf", tmp_path / "out", 8, 2)


def test_an_ignored_key_is_read_as_if_it_were_not_there(tiny_hf: Path, tmp_path: Path) -> None:
    folder = copy(tiny_hf, tmp_path)
    with_config(hidden_act="gelu", unheard_of=[1, 2])(folder)
    with pytest.raises(CheckpointError, match="--ignore-config-key hidden_act"):
        convert_checkpoint(folder, tmp_path / "out", None, 1, ignore_keys=["unheard_of"])
    with pytest.raises(CheckpointError, match=r"unheard_of \[1, 2\]: this key is not understood"):
        convert_checkpoint(folder, tmp_path / "out", None, 1, ignore_keys=["hidden_act"])
    with pytest.raises(CheckpointError, match="--ignore-config-key no_such: the config has no such key"):
        convert_checkpoint(folder, tmp_path / "out", None, 1, ignore_keys=["no_such"])
    both = ["--ignore-config-key", "unheard_of", "--ignore-config-key", "hidden_act"]
    command = ["--hf-ckpt-path", str(folder), "--save-path", str(tmp_path / "out"), "--model-parallel", "1"]
    assert main([*command, *both]) == 0
    args = ModelArgs.from_json(tmp_path / "out" / "config.json", ["unheard_of", "hidden_act"])
    assert args.ignored_config_keys == ("unheard_of", "hidden_act")  # and so the manifest


def test_weights_cast_from_fp8_leave_their_old_config_behind(fp8_args: ModelArgs, tmp_path: Path) -> None:
    """bf16 weights beside a config that still speaks of fp8: the weights are what they are."""
    folder = tmp_path / "hf"
    write_checkpoint(folder, fp8_args, weights="fp8")
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, fp8_args, weights="bf16")
    (folder / "config.json").write_text(json.dumps(config))
    convert_checkpoint(folder, tmp_path / "out", None, 1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {key: value for key, value in config.items() if key != "quantization_config"}
    assert ModelArgs.from_json(tmp_path / "out" / "config.json").dtype == "bf16"


def test_fp8_weights_need_a_config_that_says_so(fp8_hf: Path, tmp_path: Path) -> None:
    folder = copy(fp8_hf, tmp_path)
    with_config(quantization_config=...)(folder)
    with pytest.raises(CheckpointError, match=r"has no quantization_config, but model\.layers.* are fp8"):
        convert_checkpoint(folder, tmp_path / "out", None, 1)


def test_tied_embeddings_become_a_head_on_every_rank(tiny_args: ModelArgs, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dataclasses.replace(tiny_args, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_hf(tmp_path / "hf")
    for file in convert_checkpoint(tmp_path / "hf", tmp_path / "out", None, 2):
        shard = load_file(file)
        assert torch.equal(shard["head.weight"], shard["embed.weight"])


def test_what_a_shared_layer_has_no_use_for_is_left_out(tiny_hf: Path, tmp_path: Path) -> None:
    """Weights with an indexer in every layer, under a config whose layers share selections."""
    folder = copy(tiny_hf, tmp_path)
    with_config(index_topk_freq=2)(folder)
    (file,) = convert_checkpoint(folder, tmp_path / "out", None, 1)
    indexers = {name.split(".")[1] for name in read_header(file) if ".indexer." in name}
    assert indexers == {"0", "1", "3"}


FP8_PROJ = "model.layers.1.mlp.shared_experts.down_proj.weight"


def test_fp8_scales_must_be_there_and_fit(fp8_hf: Path, tmp_path: Path) -> None:
    folder = copy(fp8_hf, tmp_path)
    with pytest.raises(CheckpointError, match="does not divide the 4 experts"):
        convert_checkpoint(folder, tmp_path / "out", 4, 8)
    edit(folder, lambda tensors: tensors.update({f"{FP8_PROJ}_scale_inv": torch.ones(2, 3)}))
    with pytest.raises(
        CheckpointError, match=rf"{FP8_PROJ}_scale_inv: is F32 \[2, 3\], .* needs F32 \[2, 4\]"
    ):
        convert_checkpoint(folder, tmp_path / "out", 4, 1)
    edit(folder, lambda tensors: tensors.pop(f"{FP8_PROJ}_scale_inv"))
    with pytest.raises(CheckpointError, match=f"lacks {FP8_PROJ}_scale_inv"):
        convert_checkpoint(folder, tmp_path / "out", 4, 1)
    edit(folder, lambda tensors: tensors.update({FP8_PROJ: tensors[FP8_PROJ].float()}))
    convert_checkpoint(folder, tmp_path / "plain", 4, 1)
    edit(folder, lambda tensors: tensors.update({f"{FP8_PROJ}_scale_inv": torch.ones(2, 4)}))
    with pytest.raises(CheckpointError, match=f"unknown tensor {FP8_PROJ}_scale_inv"):
        convert_checkpoint(folder, tmp_path / "out", 4, 1)


def test_ranks_may_not_cut_through_a_scale_block(fp8_args: ModelArgs, tmp_path: Path) -> None:
    """Rows 384 over 2 ranks would be 192 each: one and a half blocks."""
    write_checkpoint(tmp_path / "hf", dataclasses.replace(fp8_args, inter_dim=384), weights="fp8")
    with pytest.raises(CheckpointError, match="scale_inv: model parallel 2 cuts through its 128-blocks"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "out", 4, 2)


def test_unwritable_targets_are_named(tiny_hf: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="file: is a file; give a folder"):
        convert_checkpoint(tiny_hf, file, 8, 1)
    with pytest.raises(CheckpointError, match=r"file/out: cannot convert into it: File exists"):
        convert_checkpoint(tiny_hf, file / "out", 8, 1)
    assert file.read_text() == "mine"


def test_a_full_disk_is_told_beforehand(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"out: needs [\d,]+ bytes, but its disk has 1,000 left"):
        convert_checkpoint(tiny_hf, tmp_path / "out", 8, 1)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_keeps_the_earlier_one(tiny_hf: Path, tmp_path: Path) -> None:
    (file,) = convert_checkpoint(tiny_hf, tmp_path / "out", 8, 1)
    file.write_bytes(b"earlier")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tiny_hf, tmp_path / "out", 8, 1, interrupt)
    assert file.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / ".partial").exists()
    convert_checkpoint(tiny_hf, tmp_path / "out", 8, 1)
    assert "norm.weight" in read_header(file)


def test_a_killed_conversion_leaves_only_a_folder_that_says_so(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(
        CheckpointError, match=r"\.out\.partial: another conversion is running, or was killed"
    ):
        convert_checkpoint(tiny_hf, tmp_path / "out", 8, 1)
    assert not (tmp_path / "out").exists()


def test_terminating_the_command_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, target = tmp_path / "hf", tmp_path / "out"
    make_large(source, num_layers=8)
    command = ["--hf-ckpt-path", source, "--save-path", target, "--n-experts", "0", "--model-parallel", "1"]
    process = Started(command, tmp_path_factory.mktemp("said") / "convert", command="convert")
    while process.poll() is None and not list(tmp_path.glob(".out.partial/*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 2
    assert f"error: interrupted; nothing was written to {target}" in stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_the_command_reports_faults_on_one_line(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-ckpt-path", str(tiny_hf), "--save-path", str(tmp_path / "out")]
    assert main([*flags, "--n-experts", "8", "--model-parallel", "3"]) == 2
    assert capsys.readouterr().err.strip() == "error: model parallel 3 does not divide the 8 experts"
    assert main([*flags, "--n-experts", "8", "--model-parallel", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "out" / f"model{rank}-mp2.safetensors") for rank in range(2)
    ]


LARGE_TENSOR_BYTES = 16 << 20


def make_large(folder: Path, num_layers: int) -> None:
    """Dense layers with `down_proj` and `o_proj` of 16 MiB (the ones cut by columns), a shard a layer."""
    args = ModelArgs(
        vocab_size=64, dim=1024, inter_dim=8192, n_layers=num_layers, n_dense_layers=num_layers,
        n_heads=2, n_routed_experts=0, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=4096, index_n_heads=2, index_head_dim=16, dtype="bf16",
    )  # fmt: skip
    folder.mkdir()
    layout = tiny.layout_of(args, "bf16")
    for layer in range(-1, num_layers):
        here = {
            name: tensor
            for name, tensor in layout.items()
            if (name.startswith(f"model.layers.{layer}.") if layer >= 0 else ".layers." not in name)
        }
        with ShardWriter(folder / f"model-{layer + 1}.safetensors", here) as writer:
            for name, (_, shape) in here.items():
                writer.write(name, torch.zeros(shape, dtype=torch.bfloat16))
    write_json(folder / "config.json", tiny.hf_config(args, "bf16"))


# VmHWM and not ru_maxrss, which on Linux starts at the peak of the process that forked this one.
MEASURE = """
import sys, torch
from pathlib import Path
from dsatrace.model.convert import convert_checkpoint

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
large, small, large_out, small_out = sys.argv[1:]
convert_checkpoint(small, small_out, 0, 1)
before = peak()
convert_checkpoint(large, large_out, 0, 2)
print(peak() - before)
before = peak()
kept = bytearray(b"x") * (256 << 20)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_under_twice_the_largest_tensor(tmp_path: Path) -> None:
    """Growth of the peak over a first, small conversion; the slack is the buffers' own allocator noise."""
    make_large(tmp_path / "large", num_layers=3)
    write_checkpoint(
        tmp_path / "small",
        ModelArgs(
            n_layers=1, n_dense_layers=1, n_routed_experts=0, vocab_size=8, dim=8, inter_dim=8,
            n_heads=1, q_lora_rank=8, kv_lora_rank=8, index_n_heads=1,
        ),
    )  # fmt: skip
    folders = [tmp_path / name for name in ("large", "small", "large-out", "small-out")]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders],
        env={**os.environ, "PYTHONPATH": str(INFERENCE)},
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    growth, control = map(int, result.stdout.split())
    assert control > 200 << 20, "the meter does not see 256 MiB"
    headers = [read_header(file) for file in (tmp_path / "large").glob("*.safetensors")]
    stored = [tensor for header in headers for tensor in header.values()]
    largest, total = max(t.num_bytes for t in stored), sum(t.num_bytes for t in stored)
    shard = tmp_path / "large-out" / "model0-mp2.safetensors"
    header_bytes = int.from_bytes(shard.read_bytes()[:8], "little")
    slack = 8 << 20
    assert largest == LARGE_TENSOR_BYTES and total > 8 * largest, "the bound would mean nothing"
    print(f"peak memory grew by {growth / 2**20:.1f} MiB for a largest tensor of {largest / 2**20:.0f} MiB")
    assert growth < 2 * largest + header_bytes + slack
