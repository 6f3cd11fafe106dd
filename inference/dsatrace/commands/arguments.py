"""The flags every runner shares: which model, on what, and how it is served."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

from dsatrace.engine.ending import EndSettings
from dsatrace.engine.settings import EngineSettings
from dsatrace.errors import UserError
from dsatrace.flags import add_flags, flags_of, option, values_of
from dsatrace.model.hf_config import IGNORE_FLAG
from dsatrace.runner.settings import ModelSettings, OffloadSettings

ENGINE_FLAGS = flags_of(EngineSettings)
MODEL_FLAGS = {field: flag for field, flag in flags_of(ModelSettings).items() if field not in ENGINE_FLAGS}
OFFLOAD_FLAGS = flags_of(OffloadSettings)
END_FLAGS = flags_of(EndSettings)


def add_engine_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the flags of `ModelSettings`. Not `required`: a run may have no model."""
    add = parser.add_argument_group("model").add_argument
    add_flags(add, ModelSettings, MODEL_FLAGS, ("ckpt_path",) if required else ())
    add_ignore_config_key(add)
    add_flags(parser.add_argument_group("engine").add_argument, EngineSettings, ENGINE_FLAGS)
    group = parser.add_argument_group("tiers", "KV latents outside HBM; all of them need --hbm-blocks")
    add_flags(group.add_argument, OffloadSettings, OFFLOAD_FLAGS)


def add_ignore_config_key(add: Callable[..., argparse.Action]) -> None:
    """The flag that `convert.py` and every run of a model share."""
    add(
        IGNORE_FLAG,
        dest="ignore_config_keys",
        action="append",
        default=[],
        metavar="NAME",
        help="read the model's config as if it did not hold this key; may be repeated",
    )


def settings_from_args(args: argparse.Namespace) -> ModelSettings:
    """The settings that the flags describe; raises `UserError` for a bad value."""
    offload = None
    if args.hbm_blocks is not None:
        offload = OffloadSettings(**values_of(args, OFFLOAD_FLAGS))
    else:
        _refuse_tier_flags(args, "without --hbm-blocks; add it")
    return ModelSettings(
        **values_of(args, MODEL_FLAGS | ENGINE_FLAGS),
        ignore_config_keys=tuple(args.ignore_config_keys),
        offload=offload,
    )


def end_settings_from_args(args: argparse.Namespace) -> EndSettings:
    """When answers may end; raises `UserError` for a least length above `--max-new-tokens`."""
    end = EndSettings(**values_of(args, END_FLAGS))
    most = getattr(args, "max_new_tokens", None)  # None: the data set's own, which it checks
    if most is not None and end.min_new_tokens > most:
        raise UserError(
            f"--min-new-tokens {end.min_new_tokens} is above --max-new-tokens {most}; lower the one or raise "
            "the other"
        )
    return end


def check_checkpoint(path: Path | None, has_weights: bool = True) -> None:
    """Raises `UserError` for a --ckpt-path that is no folder, or holds no converted weights."""
    if path is None:
        return
    if not path.is_dir():
        raise UserError(f"--ckpt-path {path}: no such folder; name the --save-path of convert.py")
    if has_weights and not any(path.glob("model*-mp*.safetensors")):
        file = f"model0-mp{os.environ.get('WORLD_SIZE', '1')}.safetensors"
        raise UserError(f"--ckpt-path {path}: holds no {file}; convert a checkpoint into it")


def check_torch() -> None:
    """Raises `UserError` where torch is not installed; call it before whatever imports it."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch is not installed; install it with `pip install -r inference/requirements.txt`")


def refuse_tiers(args: argparse.Namespace) -> None:
    """For a run without a model, where nothing lies in a tier."""
    _refuse_tier_flags(args, "with --runner simulator, which moves no KV; leave it out")


def _refuse_tier_flags(args: argparse.Namespace, why: str) -> None:
    """Raises `UserError` for one whose value is not the default."""
    for field in dataclasses.fields(OffloadSettings):
        default = None if field.default is dataclasses.MISSING else field.default
        if getattr(args, field.name) != default:
            raise UserError(f"{option(field.name)} does nothing {why}")


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
