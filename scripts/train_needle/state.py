"""A training run's state on disk, and back bit for bit: safetensors and JSON, never pickle.

A save replaces the one before only when all of it is written. Knows no recipe beyond the
numbers it is given.

    save_state(folder, model, optimizer, {"phase": 2, "step": 140})
    progress = load_state(folder, model, optimizer)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dsatrace.errors import UserError

STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Weights, the optimiser's moments and `progress`, in one file that replaces the last."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = value.detach()
    partial = folder / f"{STATE}.partial"
    copies = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, partial, metadata={"progress": json.dumps(progress)})
    partial.replace(folder / STATE)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fills model and optimiser from `folder`, and returns the `progress` saved with them."""
    try:
        with safe_open(folder / STATE, framework="pt") as stored:
            names = set(stored.keys())
            progress: dict[str, Any] = json.loads(stored.metadata()["progress"])
            for name, parameter in model.named_parameters():
                parameter.data.copy_(stored.get_tensor(f"model.{name}"))
                moments = {m: stored.get_tensor(f"{m}.{name}") for m in _MOMENTS if f"{m}.{name}" in names}
                if moments:
                    optimizer.state[parameter] = {
                        m: value if m == "step" else value.to(parameter.device)
                        for m, value in moments.items()
                    }
    except Exception as error:  # safetensors raises an exception class of its own, and KeyError for a name
        raise UserError(
            f"{folder / STATE}: cannot resume from it: {error}; remove it to start anew"
        ) from error
    return progress
