"""Hit rates, told once: of what each is, where it was found, over which steps, and by which counts of
summary.json. Whoever shows one takes its words from here.

    rate = RATES["units"]
    hits, asked = rate.counts(summary)
    words = run_words(manifest)
    rate.name(words)    # "selected blocks of 4 tokens found in HBM (whole run, prefill included)"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rate:
    """`part` of `whole`: keys of summary.json, joined by dots. In braces: one of `run_words`."""

    of: str
    where: str
    over: str
    part: str
    whole: str

    def name(self, words: Mapping[str, object]) -> str:
        return f"{self.of} found in {self.where} ({self.over})".format(**words)

    def counts(self, summary: Record) -> tuple[int, int] | None:
        """How many were found, and of how many; None where the run has not told or there were none."""
        part, whole = (_value(summary, key) for key in (self.part, self.whole))
        return (part, whole) if part is not None and whole else None


RATES: dict[str, Rate] = {
    "tokens": Rate(
        *("selected tokens", "HBM", "{recorded}"), "kv_fetch.hbm.hit_tokens", "kv_fetch.hbm.requested_tokens"
    ),
    "blocks": Rate(
        *("touched blocks of {block} tokens", "HBM", "{recorded}"),
        *("kv_fetch.hbm.hit_blocks", "kv_fetch.hbm.requested_blocks"),
    ),
    "units": Rate(
        *("selected {unit}", "HBM", "whole run, prefill included"),
        *("tiers.selected_units.hit_units", "tiers.selected_units.requested_units"),
    ),
    "prompts": Rate(
        *("prompt tokens", "the prefix cache", "whole run, when their prefill began"),
        *("prefix_cache.hit_tokens", "prefix_cache.prompt_tokens"),
    ),
}


def unit_words(unit_tokens: int) -> str:
    """What moves between tiers as one."""
    return "rows of one token" if unit_tokens == 1 else f"blocks of {unit_tokens} tokens"


def run_words(manifest: Record) -> dict[str, object]:
    """What the names of a run's rates say of it."""
    trace, tiers = manifest["trace"], manifest.get("tiers")
    prefill = {"off": "prefill left out", "last": "prompts' last positions included"}
    return {
        "block": trace["block_size_tokens"],
        "unit": unit_words(tiers["unit_tokens"]) if tiers else "units",
        "recorded": f"recorded steps, {prefill.get(trace.get('prefill', 'off'), 'prefill included')}",
    }


def _value(summary: Record, key: str) -> Any:
    value: Any = summary
    for name in key.split("."):
        if value is None or name not in value:
            return None
        value = value[name]
    return value
