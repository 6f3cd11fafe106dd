"""Opens an offloaded cache with the tiers below it, and says what they are: for the manifest.

with offloaded_cache(model, settings.offload, num_blocks, 64, device) as cache:
    tier_setup(settings.offload, cache)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import Store
from dsatrace.kv.stores.opening import lies_in_file, open_store
from dsatrace.kv.tiers.fetches import LOCAL, REMOTE
from dsatrace.kv.tiers.stack import TierStack
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.transformer import Transformer
from dsatrace.runner.offload.cache import OffloadedCache, tokens_of_unit, unit_bytes
from dsatrace.runner.settings import OffloadSettings
from dsatrace.trace.manifest import PoolSettings, TierSettings, redact_credentials


@contextlib.contextmanager
def offloaded_cache(
    model: Transformer, offload: OffloadSettings, num_blocks: int, block_size: int, device: torch.device
) -> Iterator[OffloadedCache]:
    """This rank's cache; leaving the block closes its tiers. Raises as `open_tiers` does."""
    rank = _suffix(model.setup.group)
    with contextlib.ExitStack() as stack:

        def tiers(num_bytes: int, num_layers: int, units_per_block: int, suffix: str) -> TierStack:
            opened = open_tiers(
                offload,
                num_bytes,
                num_layers=num_layers,
                num_blocks=num_blocks,
                units_per_block=units_per_block,
                suffix=suffix,
                pin_memory=device.type == "cuda",
            )
            stack.callback(opened.close)
            return opened

        index_tiers = None
        if offload.offload_index_keys:
            one = model.new_cache(1, block_size, device)
            num_bytes = block_size * one.index_bytes_per_token
            index_tiers = tiers(num_bytes, len(one.indexer_layers), 1, f".index{rank}")
        units_per_block = block_size // tokens_of_unit(offload.granularity, block_size)
        num_bytes = unit_bytes(model.setup, block_size, offload.granularity)
        cache = OffloadedCache(
            model.setup,
            num_blocks,
            block_size,
            device,
            tiers=tiers(num_bytes, model.args.n_layers, units_per_block, rank),
            hbm_blocks=offload.hbm_blocks,
            granularity=offload.granularity,
            policy=offload.tier_policy,
            prefetch=offload.prefetch,
            index_tiers=index_tiers,
        )
        stack.callback(cache.prefetcher.close)
        yield cache


def try_tiers(offload: OffloadSettings, group: ParallelGroup) -> None:
    """Opens every pool and closes it again, so that one that is down is known before weights load."""
    open_tiers(offload, 8, num_layers=1, num_blocks=1, units_per_block=1, suffix=_suffix(group)).close()


def open_tiers(
    offload: OffloadSettings,
    unit_bytes: int,
    *,
    num_layers: int,
    num_blocks: int,
    units_per_block: int,
    suffix: str = "",
    pin_memory: bool = False,
) -> TierStack:
    """The empty pools of one rank; `suffix` keeps its files apart from those of other ranks.

    `pin_memory`: a GPU reads the local pool in RAM directly. Raises `UserError` for a server that is
    down, a file that cannot be made, a local pool too small for the cache with no remote pool behind it.
    """
    local, remote = offload.local_pool, offload.remote
    local_blocks = min(offload.local_blocks or num_blocks, num_blocks)
    if remote is None and local_blocks < num_blocks:
        raise UserError(
            f"--local-blocks {local_blocks}: the cache has {num_blocks} blocks, and behind the local pool "
            f"there is none; use --local-blocks {num_blocks}, or add --remote"
        )
    opened: list[Store] = []
    try:
        for spec, blocks in ((local, local_blocks), (remote, num_blocks)):
            if spec is not None:
                units, timeout_s = blocks * units_per_block * num_layers, offload.tier_timeout_s
                memory = _pinned(units, unit_bytes) if pin_memory and spec == "ram" else None
                name = spec + suffix if lies_in_file(spec) else spec
                opened.append(open_store(name, unit_bytes, units, timeout_s=timeout_s, memory=memory))
        return TierStack(
            opened[0] if local is not None else None,
            opened[-1] if remote is not None else None,
            num_layers=num_layers,
            units_per_layer=num_blocks * units_per_block,
            policy=offload.tier_policy,
        )
    except BaseException:
        for store in opened:
            store.close()
        raise


def tier_setup(offload: OffloadSettings, cache: OffloadedCache) -> TierSettings:
    """What the manifest says of the tiers."""
    stats = cache.tiers.stats()

    def pool(tier: int, spec: str | None, blocks: int | None) -> PoolSettings | None:
        if spec is None or (its := stats[tier]) is None:
            return None
        kind: Literal["measured", "modelled"] = "modelled" if its.latency_kind == "modelled" else "measured"
        return PoolSettings(redact_credentials(spec), blocks, kind)

    local_blocks = min(offload.local_blocks or cache.num_blocks, cache.num_blocks)
    return TierSettings(
        granularity=offload.granularity,
        unit_tokens=cache.unit_tokens,
        unit_bytes=cache.unit_bytes,
        policy=offload.tier_policy,
        prefetch=offload.prefetch,
        on_error=offload.on_tier_error,
        index_keys="offloaded" if offload.offload_index_keys else "hbm",
        hbm_blocks=cache.hbm_blocks,
        local_pool=pool(LOCAL, offload.local_pool, local_blocks),
        remote_pool=pool(REMOTE, offload.remote, None),
    )


def _suffix(group: ParallelGroup) -> str:
    return f".rank{group.rank}" if group.size > 1 else ""


def _pinned(units: int, unit_bytes: int) -> np.ndarray:
    memory: np.ndarray = torch.empty((units, unit_bytes), dtype=torch.uint8, pin_memory=True).numpy()
    return memory
