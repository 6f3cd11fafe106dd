"""How the engine is set up: the settings behind the runners' flags. Needs no torch.

setup = EngineSetup(ckpt_path="converted", config="config_tiny.json", max_batch_size=4)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dsatrace.engine.runner import OnTierError
from dsatrace.errors import UserError
from dsatrace.kv.stores.opening import check_spec
from dsatrace.kv.tiers.residency import TIER_POLICIES
from dsatrace.model.config import PLAIN_NUMERICS, ModelArgs, read_config
from dsatrace.model.hf_config import IGNORE_FLAG, holds_key

Granularity = Literal["block", "row"]
"""What moves as one: a block of one layer, or a row, one token of one layer."""

PrefetchKind = Literal["none", "previous-step", "previous-layer"]
"""What a layer is guessed to select: what it did in the step before, or what the layer before it does."""

Numerics = Literal["released", "plain"]
"""The released model's roundings (fp8 indexer keys, Hadamard, fp8 latents), or none of them."""

GRANULARITIES: tuple[Granularity, ...] = ("block", "row")
PREFETCH_KINDS: tuple[PrefetchKind, ...] = ("none", "previous-step", "previous-layer")
ON_TIER_ERROR: tuple[OnTierError, ...] = ("recompute", "fail")


@dataclasses.dataclass(frozen=True)
class OffloadSetup:
    """Where latents lie that are not in HBM; every field has a command-line flag of the same name."""

    hbm_blocks: int  # physical blocks a layer whose latents are in HBM
    local: str | None = None  # ram, mmap:PATH, file:PATH
    local_blocks: int | None = None  # physical blocks of all layers; None: as many as the cache has
    remote: str | None = None  # redis://..., mooncake://...
    granularity: Granularity = "block"
    tier_policy: str = "lru"  # who leaves HBM, and the local pool
    prefetch: PrefetchKind = "none"
    offload_index_keys: bool = False  # else the indexer's keys stay in HBM
    on_tier_error: OnTierError = "recompute"
    tier_timeout_s: float = 5.0  # of one batch

    def __post_init__(self) -> None:
        _require_at_least_1(self, "hbm_blocks", "local_blocks")
        for field, choices in (
            ("granularity", GRANULARITIES),
            ("tier_policy", TIER_POLICIES),
            ("prefetch", PREFETCH_KINDS),
            ("on_tier_error", ON_TIER_ERROR),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise UserError(f"--{field.replace('_', '-')} {value}: use one of {', '.join(choices)}")
        if not 0 < self.tier_timeout_s < math.inf:  # so written, it catches nan too
            raise UserError(f"--tier-timeout-s {self.tier_timeout_s}: use a time above 0")
        for spec in (self.local, self.remote):
            if spec is not None:
                check_spec(spec)
        if self.local_blocks is not None and self.local_pool is None:
            raise UserError("--local-blocks does nothing without a local pool; add --local ram")

    @property
    def local_pool(self) -> str | None:
        """The local pool: RAM where nothing else is named at all."""
        return self.local or (None if self.remote else "ram")


@dataclasses.dataclass(frozen=True)
class EngineSetup:
    """What is served and how; every field has a command-line flag of the same name."""

    ckpt_path: Path | None  # None: no model, but the token simulator
    config: Path | None = None  # None: the checkpoint's own config.json
    device: str = "auto"
    kernel_backend: str = "torch"
    max_batch_size: int = 8
    max_seq_len: int | None = None  # tokens of KV one request may hold; None: the model config's
    prefill_chunk: int = 256  # tokens
    cache_block_size: int = 64  # tokens of a physical block; statistics have their own block size
    cache_blocks: int | None = None  # physical blocks of the KV cache; None: see `open_engine`
    prefix_caching: bool = False  # a prompt's prefix that is still in the cache is not computed again
    seed: int = 0
    numerics: Numerics = "released"
    ignore_config_keys: tuple[str, ...] = ()  # of the model's config, though not understood
    offload: OffloadSetup | None = None  # None: HBM holds everything; the one field that is many flags

    def __post_init__(self) -> None:
        _require_at_least_1(
            self, "max_batch_size", "max_seq_len", "prefill_chunk", "cache_block_size", "cache_blocks"
        )

    def model_args(self) -> ModelArgs:
        """The model, from `config` or the checkpoint's own `config.json`; where both are, they must agree."""
        assert self.ckpt_path is not None, "the simulator has no model"
        own = self.ckpt_path / "config.json"
        files = [] if self.config is None else [self.config]
        files += [own] if own.exists() else []
        if not files:
            raise UserError(f"{self.ckpt_path}: holds no config.json; name the model's with --config")
        overrides: dict[str, Any] = {} if self.max_seq_len is None else {"max_seq_len": self.max_seq_len}
        if self.numerics == "plain":
            overrides |= PLAIN_NUMERICS
        with user_errors():
            ignored = {file: self._ignored_in(file) for file in files}
            unheard = set(self.ignore_config_keys).difference(*ignored.values())
            if unheard:
                name = min(unheard)
                raise UserError(f"{IGNORE_FLAG} {name}: {files[0]} has no such key; leave the flag out")
            read = [ModelArgs.from_json(file, keys, **overrides) for file, keys in ignored.items()]
        for name, (given, of_weights) in read[0].differences(read[-1]).items():
            raise UserError(
                f"{files[0]}: {name} is {given!r}, but {own} beside the weights says {of_weights!r}; "
                "leave --config out, or give the config of these weights"
            )
        return dataclasses.replace(read[0], ignored_config_keys=self.ignore_config_keys)

    def _ignored_in(self, file: Path) -> list[str]:
        values = read_config(file) if self.ignore_config_keys else {}
        return [name for name in self.ignore_config_keys if holds_key(values, name)]


def _require_at_least_1(setup: OffloadSetup | EngineSetup, *fields: str) -> None:
    for field in fields:
        value = getattr(setup, field)
        if value is not None and value < 1:
            raise UserError(f"--{field.replace('_', '-')} {value}: use at least 1")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """The model's `ValueError`s, about configs, checkpoints and backends, are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
