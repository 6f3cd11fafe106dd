"""Writes a trained model as a checkpoint folder in Hugging Face layout, as convert.py reads it.

Weights, `config.json`, our tokenizer, the config that serves it, and the sha256 of all of them. The
caller writes the model card.

    export_model(model, word_tokenizer_json(), Path("data/models/tiny"))
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsatrace.files import write_json
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.names import checkpoint_tensors
from dsatrace.model.tiny import hf_config
from dsatrace.model.transformer import Transformer
from dsatrace.workloads.tokenizer import write_byte_tokenizer

WEIGHTS = "model.safetensors"
SERVING_CONFIG = "serving_config.json"
CHECKSUMS = "SHA256SUMS"


def export_model(model: Transformer, tokenizer: dict[str, Any], folder: Path) -> None:
    """Writes everything but the card; the matrices in bf16, the gate's bias in fp32, as released."""
    folder.mkdir(parents=True, exist_ok=True)
    args = model.args
    state = model.state_dict()
    tensors = {
        name: state[target.name].detach().cpu().to(stored_dtype(target.name)).clone()
        for name, target in checkpoint_tensors(args).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library makes it private
    config = hf_config(args, "bf16")
    config["max_position_embeddings"] = args.max_seq_len
    write_json(folder / "config.json", config)
    write_json(folder / SERVING_CONFIG, serving_config(args))
    write_byte_tokenizer(folder)  # for tokenizer_config.json, which is the same
    write_json(folder / "tokenizer.json", tokenizer)


def load_exported(folder: Path, scratch: Path) -> Transformer:
    """The model of an exported folder, by way of the conversion that serves it, into `scratch`."""
    args = ModelArgs.from_json(folder / SERVING_CONFIG)
    convert_checkpoint(folder, scratch / "mp1", args.n_routed_experts, model_parallel=1)
    return load_transformer(args, scratch / "mp1")


def stored_dtype(name: str) -> torch.dtype:
    """What a parameter is stored as, by the model's own name for it."""
    return torch.float32 if name.endswith("gate.bias") else torch.bfloat16


def serving_config(args: ModelArgs) -> dict[str, Any]:
    """What differs from the demo's defaults, with the field names of `inference/config_tiny.json`."""
    defaults, values = dataclasses.asdict(ModelArgs()), dataclasses.asdict(args)
    return {key: value for key, value in values.items() if value != defaults[key] or key in _ALWAYS}


_ALWAYS = ("dtype", "scale_fmt", "score_func", "index_topk", "max_seq_len", "original_seq_len", "rope_factor")


def write_checksums(folder: Path) -> None:
    """`SHA256SUMS` of all other files of the folder, for `sha256sum -c`."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != CHECKSUMS)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
