"""How the engine is set up: the settings behind the runners' flags. Needs no torch.

setup = EngineSetup(ckpt_path="converted", config="config_tiny.json", max_batch_size=4)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..model.config import ModelArgs


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

    def __post_init__(self) -> None:
        for field in ("max_batch_size", "max_seq_len", "prefill_chunk", "cache_block_size", "cache_blocks"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"--{field.replace('_', '-')} {value}: use at least 1")

    def model_args(self) -> ModelArgs:
        config = self.config
        if config is None:
            assert self.ckpt_path is not None, "the simulator has no model"
            config = self.ckpt_path / "config.json"
            if not config.exists():
                raise UserError(f"{self.ckpt_path}: holds no config.json; name the model's with --config")
        overrides = {} if self.max_seq_len is None else {"max_seq_len": self.max_seq_len}
        with user_errors():
            return ModelArgs.from_json(config, **overrides)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """The model's `ValueError`s, about configs, checkpoints and backends, are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
