"""Joins the ranks that `torchrun` started, or stays a single process.

with process_group("auto") as device: ...
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes CUDA when there is one; asking for a device that is missing is a `UserError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu or cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} has no GPU of its own; start at most {torch.cuda.device_count()} ranks"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """The rank's device, inside a process group (NCCL or gloo) when `WORLD_SIZE` exceeds 1."""
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
