"""The tiny model for end-to-end tests: answers that are plain words and never end, configs with changes."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsatrace.workloads.tokenizer import load_tokenizer

TINY_CONFIG = Path(__file__).resolve().parents[2] / "inference" / "config_tiny.json"


def tiny_config(folder: Path, **changes: object) -> Path:
    """A copy of `config_tiny.json` with other values, in `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(TINY_CONFIG.read_text()) | changes))
    return file


def endless_letters(checkpoint: Path, out: Path) -> Path:
    """Copies a one-rank byte-level checkpoint so that greedy answers are letters and spaces only.

    The head keeps the rows of `a-z` and space. The others score 0, which the best of 27 random
    scores exceeds, so no answer holds an end token, a control character or the chat's prompt.
    """
    shutil.copytree(checkpoint, out)
    file = out / "model0-mp1.safetensors"
    tensors = load_file(file)
    kept = load_tokenizer(out).encode(string.ascii_lowercase + " ")
    head = torch.zeros_like(tensors["head.weight"])  # (V, dim)
    head[kept] = tensors["head.weight"][kept]
    save_file(tensors | {"head.weight": head}, file)
    return out
