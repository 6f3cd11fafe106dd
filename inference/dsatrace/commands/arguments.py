"""The flags every runner shares: which model, on what, and how it is served."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from dsatrace.engine.config import EngineSetup
from dsatrace.errors import UserError


def add_engine_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the engine's flags; defaults come from `EngineSetup`. Not `required`: a run may have no model."""
    default = {field.name: field.default for field in dataclasses.fields(EngineSetup)}
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--ckpt-path", type=Path, required=required, help="folder with model{rank}-mp{N}.safetensors")
    add("--config", type=Path, help="config_671B_v3.2.json, say (the checkpoint's config.json)")
    add("--device", choices=("auto", "cpu", "cuda"), default=default["device"], help="(%(default)s)")
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
        help="requests at a time (%(default)s)",
    )
    add("--max-seq-len", type=int, help="tokens of KV a request may hold (the config's)")
    add("--prefill-chunk", type=int, default=default["prefill_chunk"], help="tokens (%(default)s)")
    add(
        "--cache-block-size",
        type=int,
        default=default["cache_block_size"],
        help="tokens of a physical block; statistics use --kv-block-size (%(default)s)",
    )
    add("--cache-blocks", type=int, help="physical blocks of the KV cache (enough for a whole batch)")
    add(
        "--prefix-caching",
        action="store_true",
        help="do not compute a prompt's prefix again that an earlier request has left in the KV cache",
    )
    add("--seed", type=int, default=default["seed"], help="of sampling (%(default)s)")


def engine_setup_from_args(args: argparse.Namespace) -> EngineSetup:
    """The setup the flags describe; raises `UserError` for a bad value."""
    return EngineSetup(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EngineSetup)})


def check_temperature(temperature: float) -> None:
    if not 0 <= temperature < math.inf:  # so written, it catches nan too
        raise UserError(f"--temperature {temperature}: use 0 (greedy) or a number above it")
