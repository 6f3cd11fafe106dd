"""What a run's manifest says that its records must follow.

A manifest that contradicts itself raises `Mismatch`. Standard library only; knows no record.

    rules = Rules.of(manifest)
    rules.is_sampled(step_idx=17)
    rules.tiers                     # None: everything was in HBM
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsatrace.schema import (
    LEVELS,
    MANIFEST_FIELDS,
    QUANTILE_DEFINITION,
    RUN_STATES,
    TIER_CHOICES,
    TIER_NAMES,
    Level,
    problems,
)
from dsatrace.verify.mismatch import Mismatch, compare, require
from dsatrace.verify.selections import Selections

_LAYOUT_FIELDS = next(field for field in MANIFEST_FIELDS if field.name == "cache_layouts").children


@dataclasses.dataclass(frozen=True)
class Rules:
    """The manifest's settings, as far as the records depend on them."""

    level: Level
    has_model: bool  # without one there is no record
    block_size: int
    top_k: int  # of the largest set
    num_layers: int  # records per row: layers, or their KV heads' sets
    latent_bytes: int  # per token and layer
    index_bytes: int  # per token and layer
    store_scores: bool
    keep_order: bool
    prefill: bool  # the prompt's last position is recorded
    whole_prompt: bool  # and all before it
    sample_rate: float
    seed: int
    may_lose: bool  # steps may be missing; they are counted then
    resumed_at_forward: tuple[int, ...]  # ascending
    key_tokens: int  # of a prompt, that its prefix key is of
    is_virtual: bool  # the requests' times are not of a wall clock
    prefix_cache: bool  # the records' prefixes were found in the engine's cache
    tiers: TierRules | None  # None: everything was in HBM
    answer_end: AnswerEnd | None  # None: answers were not kept from ending
    source_layers: Mapping[int, int]  # of a layer without an indexer, the layer whose selection it uses
    selections: Selections

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Rules:
        """Raises `Mismatch` for a manifest that contradicts itself."""
        require_schema(problems(manifest, "full", MANIFEST_FIELDS))
        trace, model = manifest["trace"], manifest["model_config"]
        prefill = trace["prefill"]
        require(prefill in ("off", "last", "all"), "trace.prefill", prefill, "not off, last or all")
        require(trace["level"] in LEVELS, "trace.level", trace["level"], f"not one of {', '.join(LEVELS)}")
        for name in ("store_scores", "keep_order") if trace["level"] != "full" else ():
            require(
                not trace[name], f"trace.{name}", trace[name], f"but level {trace['level']} has no positions"
            )
        require(manifest["state"] in RUN_STATES, "state", manifest["state"], "no state of a run")
        compare(manifest["quantile"], QUANTILE_DEFINITION, "quantile")
        canonical = json.dumps(model, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        compare(manifest["model_config_digest"], digest, "model_config_digest")
        for i, layout in enumerate(manifest["cache_layouts"]):
            require_schema(problems(layout, "full", _LAYOUT_FIELDS, f"cache_layouts[{i}]."))
        named = [x for x in manifest["cache_layouts"] if x["name"] == manifest["cache_layout"]]
        require(len(named) == 1, "cache_layout", manifest["cache_layout"], "not one of cache_layouts")
        layout = named[0]
        has_model = manifest["selections"] != "none"
        selection = manifest.get("selection")
        is_engines = selection is None or selection["door"] == "serve"
        for name in ("index_topk", "n_layers") if has_model and is_engines else ():
            count = model.get(name)
            require(type(count) is int and count >= 1, f"model_config.{name}", count, "not a count")
        rate = trace["sample_rate"]
        require(has_model or rate == 0, "trace.sample_rate", rate, "but no model ran")
        seams = manifest.get("resumed_at_forward", [])
        ascend = seams == sorted(seams) and all(seam >= 0 for seam in seams)
        require(ascend, "resumed_at_forward", seams, "not ascending counts")
        source = manifest.get("prefix_source", "analysis")
        require(source in ("analysis", "cache"), "prefix_source", source, "not analysis or cache")
        block_size = trace["block_size_tokens"]
        require(block_size >= 1, "trace.block_size_tokens", block_size, "not a count")
        key_tokens = trace["prefix_key_tokens"]
        require(key_tokens >= 1, "trace.prefix_key_tokens", key_tokens, "not a count")
        selections = Selections.of(manifest) if has_model else Selections(())
        if not selections.is_engines:
            require(trace["level"] == "full", "trace.level", trace["level"], f"of door {selections.door}")
            require(
                manifest.get("tiers") is None, "tiers", manifest.get("tiers"), f"of door {selections.door}"
            )
        return cls(
            level=trace["level"],
            block_size=block_size,
            has_model=has_model,
            top_k=max((one.top_k for one in selections.sets), default=0),
            num_layers=len(selections.sets),
            latent_bytes=layout["latent_bytes_per_token"],
            index_bytes=layout["index_bytes_per_token"],
            store_scores=trace["store_scores"],
            keep_order=trace["keep_order"],
            prefill=trace["prefill"] != "off",
            whole_prompt=trace["prefill"] == "all",
            sample_rate=rate,
            seed=manifest["seed"],
            may_lose=trace["queue_policy"] == "drop" or trace["on_error"] == "continue",
            resumed_at_forward=tuple(seams),
            key_tokens=key_tokens,
            is_virtual=(manifest.get("serving") or {}).get("clock", "real") != "real",
            prefix_cache=source == "cache",
            tiers=TierRules.of(manifest, layout["latent_bytes_per_token"]),
            answer_end=AnswerEnd.of(manifest),
            source_layers=selections.source_layers,
            selections=selections,
        )

    @property
    def first_step(self) -> int | None:
        """The first step that is recorded of a request that lives long enough; -1 is the prompt's last
        position, and counted backwards those before it."""
        if self.prefill:
            return -1
        return next(filter(self.is_sampled, itertools.count()), None) if self.sample_rate > 0 else None

    def first_prompt_step(self, num_prompt_tokens: int) -> int:
        """The step from which rows may be recorded of a prompt; 0 where none are."""
        return -num_prompt_tokens if self.whole_prompt else -int(self.prefill)

    def is_sampled(self, step_idx: int) -> bool:
        """Whether decode step `step_idx` of every request is recorded: splitmix64 of seed and step."""
        z = (self.seed * 0x9E3779B97F4A7C15 + (step_idx + 1) * 0xBF58476D1CE4E5B9) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return self.sample_rate >= 1 or (z ^ z >> 31) < self.sample_rate * 2**64


@dataclasses.dataclass(frozen=True)
class TierRules:
    """The part for a run whose latents lie in several tiers."""

    by_row: bool  # tokens move, else blocks of the cache
    unit_tokens: int
    unit_bytes: int
    offloads_index: bool  # the indexer's keys lie in the pools too
    kinds: Mapping[str, str]  # latency_kind of each tier that the run has, nearest first

    @classmethod
    def of(cls, manifest: Mapping[str, Any], latent_bytes: int) -> TierRules | None:
        """Of a manifest that follows the schema; raises `Mismatch` where it contradicts itself."""
        tiers = manifest.get("tiers")
        if tiers is None:
            return None
        for name, choices in TIER_CHOICES.items():
            require(tiers[name] in choices, f"tiers.{name}", tiers[name], f"not one of {', '.join(choices)}")
        by_row, unit_tokens = tiers["granularity"] == "row", tiers["unit_tokens"]
        is_size = unit_tokens == 1 if by_row else unit_tokens >= 1
        require(is_size, "tiers.unit_tokens", unit_tokens, f"no size of a {tiers['granularity']}")
        compare(tiers["unit_bytes"], unit_tokens * latent_bytes, "tiers.unit_bytes")
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


@dataclasses.dataclass(frozen=True)
class AnswerEnd:
    """How answers were kept from ending."""

    min_new_tokens: int
    ignore_eos: bool

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> AnswerEnd | None:
        """Of a manifest that follows the schema; raises `Mismatch` where it says nothing."""
        said = manifest.get("answer_end")
        if said is None:
            return None
        least, ignore = said["min_new_tokens"], said["ignore_eos"]
        keeps = least > 0 or (ignore and least == 0)
        require(keeps, "answer_end.min_new_tokens", least, "keeps no answer from ending")
        return cls(least, ignore)


def require_schema(found: Sequence[str]) -> None:
    """Raises the first of `schema.problems` as a `Mismatch`."""
    if found:
        field, _, what = found[0].partition(": ")
        raise Mismatch(field, what)
