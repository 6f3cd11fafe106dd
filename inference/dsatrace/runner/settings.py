"""Which model is served, and where its latents lie: the settings behind the runners' flags. Needs no torch.

settings = ModelSettings("converted", "config_tiny.json", max_batch_size=4)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from dsatrace.engine.runner import OnTierError
from dsatrace.engine.settings import EngineSettings
from dsatrace.errors import UserError
from dsatrace.flags import Flag, check
from dsatrace.kv.stores.opening import check_spec
from dsatrace.kv.tiers.residency import TIER_POLICIES
from dsatrace.model.config import PLAIN_NUMERICS, KernelBackend, ModelArgs, read_config
from dsatrace.model.hf_config import IGNORE_FLAG, holds_key

Granularity = Literal["block", "row"]
"""What moves as one: a block of one layer, or a row, one token of one layer."""

PrefetchKind = Literal["none", "previous-step", "previous-layer"]
"""What a layer is guessed to select: what it did in the step before, or what the layer before it does."""


@dataclasses.dataclass(frozen=True)
class OffloadSettings:
    """Where latents lie that are not in HBM; every field is a flag."""

    hbm_blocks: Annotated[
        int, Flag("physical blocks per layer in HBM (default: all of --cache-blocks)", at_least=1)
    ]
    local: Annotated[
        str | None,
        Flag(
            "local pool: ram, mmap:PATH or file:PATH (default: ram, without --remote); under torchrun write "
            "--local-pool, since it takes --local for a flag of its own",
            ("--local", "--local-pool"),
            metavar="STORE",
        ),
    ] = None
    local_blocks: Annotated[
        int | None, Flag("physical blocks that the local pool holds (default: all)", at_least=1)
    ] = None
    remote: Annotated[
        str | None,
        Flag("remote pool: redis://HOST:PORT, unix://PATH or mooncake://HOST:PORT", metavar="STORE"),
    ] = None
    granularity: Annotated[Granularity, Flag("unit of transfer: a block, or the row of one token")] = "block"
    tier_policy: Annotated[str, Flag("eviction policy of HBM and of the local pool")] = "lru"
    prefetch: Annotated[
        PrefetchKind, Flag("fetch what a layer is guessed to select while its indexer chooses")
    ] = "none"
    offload_index_keys: Annotated[bool, Flag("move the indexer's keys out of HBM, too")] = False
    on_tier_error: Annotated[
        OnTierError,
        Flag(
            "requests whose KV a tier has lost: compute it again, or let them fail; "
            "a run of several ranks ends instead"
        ),
    ] = "recompute"
    tier_timeout_s: Annotated[float, Flag("seconds in which a store has to answer a batch")] = 5.0

    def __post_init__(self) -> None:
        check(self)
        if self.tier_policy not in TIER_POLICIES:
            raise UserError(f"--tier-policy {self.tier_policy}: use one of {', '.join(TIER_POLICIES)}")
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
class ModelSettings(EngineSettings):
    """Which model is served, and how; `ignore_config_keys` and `offload` are built from several flags."""

    ckpt_path: Annotated[Path | None, Flag("folder with model{rank}-mp{N}.safetensors")]  # None: no model
    config: Annotated[Path | None, Flag("the model's config (default: the checkpoint's config.json)")] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Flag("where the model runs; auto: on a GPU if there is one")
    ] = "auto"
    kernel_backend: Annotated[KernelBackend, Flag("tilelang: fp8 kernels on a Hopper GPU")] = "torch"
    numerics: Annotated[
        Literal["released", "plain"],
        Flag("released: fp8 indexer keys, Hadamard, fp8-rounded latents; plain: none, as in transformers"),
    ] = "released"
    ignore_config_keys: tuple[str, ...] = ()  # of the model's config, though not understood
    offload: OffloadSettings | None = None  # None: HBM holds everything

    def model_args(self) -> ModelArgs:
        """The model by `config` or the checkpoint's `config.json`; if both exist, they must agree."""
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


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the model's `ValueError`s, about configs, checkpoints and backends, into `UserError`s."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
