"""The flags every runner shares: which model, on what, and how it is served."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.model.hf_config import IGNORE_FLAG
from dsatrace.runner.config import (
    GRANULARITIES,
    NUMERICS,
    ON_TIER_ERROR,
    PREFETCH_KINDS,
    EngineSetup,
    OffloadSetup,
)


def add_engine_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the engine's flags; defaults come from `EngineSetup`. Not `required`: a run may have no model."""
    default = {field.name: field.default for field in dataclasses.fields(EngineSetup)}
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--ckpt-path", type=Path, required=required, help="folder with model{rank}-mp{N}.safetensors")
    add("--config", type=Path, help="config_671B_v3.2.json, say (default: the checkpoint's config.json)")
    add("--device", choices=("auto", "cpu", "cuda"), default=default["device"])
    add(
        "--kernel-backend",
        choices=("torch", "tilelang"),
        default=default["kernel_backend"],
        help="(%(default)s)",
    )
    add(
        "--max-batch-size",
        "--batch-size",
        type=int,
        default=default["max_batch_size"],
        help="requests at a time",
    )
    add("--max-seq-len", type=int, help="tokens of KV a request may hold (default: the config's)")
    add("--prefill-chunk", type=int, default=default["prefill_chunk"], help="tokens")
    add(
        "--cache-block-size",
        type=int,
        default=default["cache_block_size"],
        help="tokens of a physical block; statistics use --kv-block-size",
    )
    add("--cache-blocks", type=int, help="physical blocks of the KV cache (default: a whole batch's)")
    add(
        "--prefix-caching",
        action="store_true",
        help="do not compute a prompt's prefix again that an earlier request has left in the KV cache",
    )
    add(
        "--numerics",
        choices=NUMERICS,
        default=default["numerics"],
        help="released: fp8 indexer keys, Hadamard, fp8-rounded latents; plain: none of them, as in "
        "transformers",
    )
    add_ignore_config_key(add)
    add("--seed", type=int, default=default["seed"], help="of sampling")
    _add_offload_arguments(parser)


def add_ignore_config_key(add: Callable[..., argparse.Action]) -> None:
    """The flag that `convert.py` and every run of a model share; `dest` is `EngineSetup`'s field."""
    add(
        IGNORE_FLAG,
        dest="ignore_config_keys",
        action="append",
        default=[],
        metavar="NAME",
        help="read the model's config as if it did not hold this key; may be repeated",
    )


def _add_offload_arguments(parser: argparse.ArgumentParser) -> None:
    default = {field.name: field.default for field in dataclasses.fields(OffloadSetup)}
    group = parser.add_argument_group("tiers", "KV latents outside HBM; all of them need --hbm-blocks")
    add = group.add_argument
    add(
        "--hbm-blocks",
        type=int,
        help="physical blocks per layer in HBM (default: all of --cache-blocks)",
    )
    add(
        "--local",
        "--local-pool",
        metavar="STORE",
        help="local pool: ram, mmap:PATH or file:PATH (ram, without --remote); under torchrun write "
        "--local-pool, since it takes --local for a flag of its own",
    )
    add("--local-blocks", type=int, help="physical blocks that the local pool holds (default: all)")
    add(
        "--remote",
        metavar="STORE",
        help="remote pool: redis://HOST:PORT, unix://PATH or mooncake://HOST:PORT",
    )
    add(
        "--granularity",
        choices=GRANULARITIES,
        default=default["granularity"],
        help="moved as one",
    )
    add(
        "--tier-policy",
        default=default["tier_policy"],
        help="who leaves HBM and the local pool",
    )
    add(
        "--prefetch",
        choices=PREFETCH_KINDS,
        default=default["prefetch"],
        help="fetch what a layer is guessed to select while its indexer chooses",
    )
    add("--offload-index-keys", action="store_true", help="move the indexer's keys out of HBM, too")
    add(
        "--on-tier-error",
        choices=ON_TIER_ERROR,
        default=default["on_tier_error"],
        help="requests whose KV a tier has lost: compute it again, or let them fail; "
        "a run of several ranks ends instead",
    )
    add(
        "--tier-timeout-s",
        type=float,
        default=default["tier_timeout_s"],
        help="a store has to answer a batch within",
    )


def engine_setup_from_args(args: argparse.Namespace) -> EngineSetup:
    """The setup the flags describe; raises `UserError` for a bad value."""
    names = {field.name for field in dataclasses.fields(EngineSetup)} - {"offload"}
    values = {name: getattr(args, name) for name in names}
    values["ignore_config_keys"] = tuple(values["ignore_config_keys"])
    return EngineSetup(**values, offload=_offload_from_args(args))


def _offload_from_args(args: argparse.Namespace) -> OffloadSetup | None:
    fields = dataclasses.fields(OffloadSetup)
    if args.hbm_blocks is not None:
        return OffloadSetup(**{field.name: getattr(args, field.name) for field in fields})
    for flag in _given_offload_flags(args):
        raise UserError(f"{flag} does nothing without --hbm-blocks; add it")
    return None


def refuse_tiers(args: argparse.Namespace) -> None:
    """For a run without a model, where nothing lies in a tier."""
    for flag in _given_offload_flags(args):
        raise UserError(f"{flag} does nothing with --runner simulator, which moves no KV; leave it out")


def _given_offload_flags(args: argparse.Namespace) -> list[str]:
    """Those whose value is not the default one."""
    defaults = {field.name: field.default for field in dataclasses.fields(OffloadSetup)}
    defaults["hbm_blocks"] = None
    return [
        f"--{name.replace('_', '-')}" for name, default in defaults.items() if getattr(args, name) != default
    ]


def check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:  # so written, it catches nan too
        raise UserError(f"--temperature {temperature}: use 0 (greedy) or a number above it")


def add_chat_template_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template of the prompts (default: DeepSeek's form for its vocabulary; for another the "
        "template beside the tokenizer, else plain text)",
    )
