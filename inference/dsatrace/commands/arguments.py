"""The flags every runner shares: which model, on what, and how it is served."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.flags import Flag, add_flags, values_of
from dsatrace.model.hf_config import IGNORE_FLAG
from dsatrace.runner.config import EngineSetup, OffloadSetup

ENGINE_FLAGS = {
    "ckpt_path": Flag("folder with model{rank}-mp{N}.safetensors"),
    "config": Flag("config_671B_v3.2.json, say (default: the checkpoint's config.json)"),
    "device": Flag("where the model runs; auto: on a GPU if there is one", choices=("auto", "cpu", "cuda")),
    "kernel_backend": Flag("what the kernels are written in", choices=("torch", "tilelang")),
    "max_batch_size": Flag("requests at a time", ("--max-batch-size", "--batch-size")),
    "max_seq_len": Flag("tokens of KV a request may hold (default: the config's)"),
    "prefill_chunk": Flag("prompt tokens computed in one step"),
    "cache_block_size": Flag("tokens of a physical block; statistics use --kv-block-size"),
    "cache_blocks": Flag("physical blocks of the KV cache (default: a whole batch's)"),
    "prefix_caching": Flag(
        "do not compute a prompt's prefix again that an earlier request has left in the KV cache"
    ),
    "numerics": Flag(
        "released: fp8 indexer keys, Hadamard, fp8-rounded latents; plain: none of them, as in transformers"
    ),
    "seed": Flag("of sampling"),
}
"""The fields of `EngineSetup` that have a flag of a value; `ignore_config_keys` and `offload` have others."""

OFFLOAD_FLAGS = {
    "hbm_blocks": Flag("physical blocks per layer in HBM (default: all of --cache-blocks)"),
    "local": Flag(
        "local pool: ram, mmap:PATH or file:PATH (default: ram, without --remote); under torchrun write "
        "--local-pool, since it takes --local for a flag of its own",
        ("--local", "--local-pool"),
        metavar="STORE",
    ),
    "local_blocks": Flag("physical blocks that the local pool holds (default: all)"),
    "remote": Flag("remote pool: redis://HOST:PORT, unix://PATH or mooncake://HOST:PORT", metavar="STORE"),
    "granularity": Flag("what moves as one: a block, or the row of one token"),
    "tier_policy": Flag("which unit leaves HBM and the local pool"),
    "prefetch": Flag("fetch what a layer is guessed to select while its indexer chooses"),
    "offload_index_keys": Flag("move the indexer's keys out of HBM, too"),
    "on_tier_error": Flag(
        "requests whose KV a tier has lost: compute it again, or let them fail; "
        "a run of several ranks ends instead"
    ),
    "tier_timeout_s": Flag("seconds in which a store has to answer a batch"),
}
"""The fields of `OffloadSetup`: all of them."""


def add_engine_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the engine's flags, which are `EngineSetup`'s fields. Not `required`: a run may have no model."""
    group = parser.add_argument_group("model")
    add_flags(group.add_argument, EngineSetup, ENGINE_FLAGS, ("ckpt_path",) if required else ())
    add_ignore_config_key(group.add_argument)
    group = parser.add_argument_group("tiers", "KV latents outside HBM; all of them need --hbm-blocks")
    add_flags(group.add_argument, OffloadSetup, OFFLOAD_FLAGS)


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


def engine_setup_from_args(args: argparse.Namespace) -> EngineSetup:
    """The setup the flags describe; raises `UserError` for a bad value."""
    return EngineSetup(
        **values_of(args, ENGINE_FLAGS),
        ignore_config_keys=tuple(args.ignore_config_keys),
        offload=_offload_from_args(args),
    )


def _offload_from_args(args: argparse.Namespace) -> OffloadSetup | None:
    if args.hbm_blocks is not None:
        return OffloadSetup(**values_of(args, OFFLOAD_FLAGS))
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


def add_bad_rows_argument(add: Callable[..., argparse.Action]) -> None:
    """The flag of whatever reads a data set's rows."""
    add(
        "--bad-rows",
        choices=("fail", "skip"),
        default="fail",
        help="end on a row that cannot be read, or leave it out and count it",
    )


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
