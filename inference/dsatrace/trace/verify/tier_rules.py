"""What a manifest says of tiers, and whether it agrees with itself.

Standard library only; knows no record.

    rules = TierRules.of(manifest, latent_bytes=1152)      # None: everything was in HBM
    rules.kinds                                            # {"hbm": "none", "local_pool": "measured"}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsatrace.schema import TIER_CHOICES, TIER_NAMES
from dsatrace.trace.verify.mismatch import differs, require


@dataclasses.dataclass(frozen=True)
class TierRules:
    """What the records of an offloaded run follow."""

    by_row: bool  # what moves is a token, else a block of the cache
    unit_tokens: int
    unit_bytes: int
    offloads_index: bool  # the indexer's keys lie in the pools, too
    kinds: Mapping[str, str]  # of the tiers that the run has, nearest first: how their times were had

    @classmethod
    def of(cls, manifest: Mapping[str, Any], latent_bytes: int) -> TierRules | None:
        """The manifest is of the schema; raises `Mismatch` where it contradicts itself."""
        tiers = manifest.get("tiers")
        if tiers is None:
            return None
        for name, choices in TIER_CHOICES.items():
            require(tiers[name] in choices, f"tiers.{name}", tiers[name], f"not one of {', '.join(choices)}")
        by_row, unit_tokens = tiers["granularity"] == "row", tiers["unit_tokens"]
        is_size = unit_tokens == 1 if by_row else unit_tokens >= 1
        require(is_size, "tiers.unit_tokens", unit_tokens, f"no size of a {tiers['granularity']}")
        if tiers["unit_bytes"] != unit_tokens * latent_bytes:
            raise differs("tiers.unit_bytes", tiers["unit_bytes"], unit_tokens * latent_bytes)
        blocks = tiers["hbm"]["blocks"]
        require(blocks >= 1, "tiers.hbm.blocks", blocks, "HBM holds nothing")
        kinds = {"hbm": "none"}
        for name in TIER_NAMES[1:]:
            pool = tiers[name]
            if pool is not None:
                blocks, kinds[name] = pool["blocks"], pool["latency_kind"]
                require(blocks is None or blocks >= 1, f"tiers.{name}.blocks", blocks, "it holds nothing")
                is_kind = kinds[name] in ("measured", "modelled")
                require(is_kind, f"tiers.{name}.latency_kind", kinds[name], "not measured or modelled")
        require(len(kinds) > 1, "tiers.local_pool", None, "and no remote_pool either")
        return cls(by_row, unit_tokens, tiers["unit_bytes"], tiers["index_keys"] == "offloaded", kinds)
