"""The ranks that `torchrun` started, or a single process: the group, its device, rank 0's word.

torch is imported inside functions: commands ask for rank 0's word before they load it.

    source = from_rank_0(lambda: find_source("ruler"))
    with process_group("auto") as device:
        engine = Engine(scheduler, runner, ranks=choose_ranks(ParallelGroup.current(), device))
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from dsatrace.engine.clock import NS_PER_S
from dsatrace.engine.engine import Ranks, SingleProcess, Word
from dsatrace.errors import RankError, UserError, is_rank_0

if TYPE_CHECKING:
    import torch

    from dsatrace.model.parallel import ParallelGroup

Made = TypeVar("Made")


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank of the process group; where `make` raises, rank 0 takes all down."""
    if not _several_ranks():
        return make()
    import torch.distributed as dist

    made = [make() if is_rank_0() else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`cpu`, `cuda`, or `auto`: CUDA when there is one. Raises `UserError` for a device that is missing."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise RankError(
            f"rank {local_rank} has no GPU of its own; start at most {torch.cuda.device_count()} ranks"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """The rank's device, inside a process group (NCCL or gloo) when `WORLD_SIZE` exceeds 1."""
    import torch
    import torch.distributed as dist

    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not _several_ranks():
        yield device
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = "the port is taken" if "EADDRINUSE" in str(error) else str(error).partition("\n")[0]
        remedy = "give torchrun --standalone, which finds a free port, or another --master-port"
        raise RankError(f"the ranks cannot meet at {where}: {why}; {remedy}") from error
    try:
        yield device
    finally:
        dist.destroy_process_group()


class BroadcastRanks:
    """The ranks of a group: one broadcast of whole numbers per step."""

    def __init__(self, group: ParallelGroup, device: torch.device) -> None:
        self.group = group
        self.device = device

    def agree(self, word: Word) -> Word:
        """For steps that sample one token per request, as the model's do."""
        import torch

        seconds, ns = divmod(word.now_ns, NS_PER_S)  # a log's arrivals, in ns, can exceed an int64
        own = [int(word.abort), seconds, ns, *(token for (token,) in word.tokens)]
        wire = torch.tensor(own, dtype=torch.int64, device=self.device)
        abort, seconds, ns, *tokens = self.group.broadcast(wire).tolist()
        return Word(bool(abort), seconds * NS_PER_S + ns, [[token] for token in tokens])


def choose_ranks(group: ParallelGroup, device: torch.device) -> Ranks:
    return BroadcastRanks(group, device) if group.size > 1 else SingleProcess()


def _several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
