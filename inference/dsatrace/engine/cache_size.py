"""How many blocks a KV cache has.

num_blocks = num_cache_blocks(setup, max_seq_len, longest, batch_size, budget_blocks)
"""

from __future__ import annotations

import torch

from ..errors import UserError
from ..kv.blocks import blocks_needed
from .config import EngineSetup


def num_cache_blocks(
    setup: EngineSetup, max_seq_len: int, longest: int | None, batch_size: int, budget_blocks: int
) -> int:
    """Blocks of the KV cache: `--cache-blocks` when given, else room for `batch_size` of the longest.

    Where `longest` is not known, any request may have `max_seq_len` tokens: there is room for as
    many of those as fit `budget_blocks`, and for one at least. Raises `UserError` when the
    longest, where it is known, could never be served.
    """
    if longest is not None and longest > max_seq_len:
        raise UserError(
            f"a prompt and its answer need {longest} tokens of KV, --max-seq-len is {max_seq_len}; "
            "shorten the prompt, lower --max-new-tokens or raise --max-seq-len"
        )
    a_request = blocks_needed(longest or max_seq_len, setup.cache_block_size)
    if setup.cache_blocks is None:
        everyone = batch_size * a_request
        return everyone if longest is not None else min(everyone, max(a_request, budget_blocks))
    if longest is not None and a_request > setup.cache_blocks:
        raise UserError(
            f"--cache-blocks {setup.cache_blocks}: a prompt and its answer need {longest} tokens of KV, "
            f"{a_request} blocks of {setup.cache_block_size}; use at least that many"
        )
    return setup.cache_blocks


def cache_budget_bytes(device: torch.device) -> int:
    """What a cache may take that is not sized for known requests: 2 GiB, or an eighth of a GPU's memory.

    A share of the whole and not of what is free, so that all ranks find the same.
    """
    if device.type != "cuda":
        return 2 << 30
    return torch.cuda.get_device_properties(device).total_memory // 8
