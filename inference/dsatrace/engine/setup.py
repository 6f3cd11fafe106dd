"""Puts an engine together: the model from its checkpoint, a cache of the right size, a tracer.

setup = EngineSetup(ckpt_path="converted", config="config_tiny.json")
with process_group(setup.device) as device:
    model = load_model(setup, device)
    with open_engine(model, setup, device, longest=2100, trace=None) as engine: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..kv.blocks import BlockPool, blocks_needed
from ..kv.layout import CacheLayout, named_layouts
from ..model.cache import KVCache
from ..model.checkpoint import load_checkpoint
from ..model.config import ModelArgs
from ..model.kernels import get_kernels
from ..model.parallel import ParallelGroup
from ..model.tiny import RANDOM_WEIGHTS
from ..model.transformer import Transformer
from ..trace.config import TraceConfig
from ..trace.manifest import RunInfo, Selections
from ..trace.tracer import Tracer
from .engine import Engine
from .live import LiveRequest
from .runner import ModelRunner
from .sampler import Sampler
from .scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class EngineSetup:
    """What is served and how; every field has a command-line flag of the same name."""

    ckpt_path: Path
    config: Path
    device: str = "auto"
    kernel_backend: str = "torch"
    max_batch_size: int = 8
    max_seq_len: int | None = None  # tokens of KV one request may hold; None: the model config's
    prefill_chunk: int = 256  # tokens
    cache_block_size: int = 64  # tokens of a physical block; statistics have their own block size
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("max_batch_size", "prefill_chunk", "cache_block_size"):
            if getattr(self, field) < 1:
                flag = f"--{field.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, field)}: use at least 1")
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise UserError(f"--max-seq-len {self.max_seq_len}: use at least 1 token")

    def model_args(self) -> ModelArgs:
        overrides = {} if self.max_seq_len is None else {"max_seq_len": self.max_seq_len}
        with user_errors():
            return ModelArgs.from_json(self.config, **overrides)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """The model's `ValueError`s, about configs, checkpoints and backends, are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def load_model(setup: EngineSetup, device: torch.device) -> Transformer:
    """This rank's shard of the model on `device`, loaded and checked."""
    args = setup.model_args()
    group = ParallelGroup.current()
    with user_errors():
        kernels = get_kernels(setup.kernel_backend, device)
        with torch.device("meta"):
            model = Transformer(args, kernels, group)
        load_checkpoint(model, setup.ckpt_path, group.rank, group.size, device=device)
    return model.eval()


def selections_of(ckpt_path: Path) -> Selections:
    """What a checkpoint's selections stand for: its `config.json` says when the weights are random."""
    try:
        config = json.loads((ckpt_path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "model"  # DeepSeek's own conversion keeps no config.json
    except (OSError, ValueError) as error:
        raise UserError(
            f"{ckpt_path / 'config.json'}: cannot read it: {error}; restore or remove it"
        ) from error
    return "random_weights" if config.get(RANDOM_WEIGHTS) else "model"


def cache_layouts(cache: KVCache, args: ModelArgs) -> list[CacheLayout]:
    """The layout this run's cache has, first, and those of other engines for comparison."""
    own = CacheLayout("this_run", cache.latent_bytes_per_token, cache.index_bytes_per_token)
    others = named_layouts(args.kv_lora_rank, args.qk_rope_head_dim, args.index_head_dim)
    return [own, *others.values()]


@contextlib.contextmanager
def open_engine(
    model: Transformer,
    setup: EngineSetup,
    device: torch.device,
    longest: int,
    trace: TraceConfig | None,
    *,
    traced: bool = False,
    argv: Sequence[str] = (),
    tokenizer: str | None = None,
    data_source: str | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    num_requests: int | None = None,
    answer_text: Callable[[LiveRequest], str] | None = None,
) -> Iterator[Engine]:
    """An engine whose cache holds `max_batch_size` requests of `longest` tokens, traced or not.

    `longest` counts prompt and answer; it may not exceed the config's `max_seq_len`. Leaving
    the block ends the trace: `complete`, or `incomplete` when an exception leaves it. Under
    tensor parallel only rank 0 has a `trace`; `traced` tells the others that it has.
    """
    args = model.args
    if longest > args.max_seq_len:
        raise UserError(
            f"a prompt and its answer need {longest} tokens of KV, --max-seq-len is {args.max_seq_len}; "
            "shorten the prompt, lower --max-new-tokens or raise --max-seq-len"
        )
    batch_size = setup.max_batch_size if num_requests is None else min(setup.max_batch_size, num_requests)
    num_blocks = batch_size * blocks_needed(longest, setup.cache_block_size)
    cache = model.new_cache(num_blocks, setup.cache_block_size, device)
    with contextlib.ExitStack() as stack:
        tracer = None
        if trace is not None:
            on_cuda = device.type == "cuda"
            run = RunInfo(
                model_config=dataclasses.asdict(args),
                layouts=cache_layouts(cache, args),
                device=torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})",
                argv=argv,
                tokenizer=tokenizer,
                data_source=data_source,
                hbm_stand_in=None if on_cuda else "host memory",
                world_size=model.setup.group.size,
                seed=setup.seed,
                selections=selections_of(setup.ckpt_path),
            )
            tracer = stack.enter_context(Tracer(trace, run))
        runner = ModelRunner(model, cache, device, tracer, batch_size)
        if traced:
            runner.compare_ranks()
        pool = BlockPool(num_blocks, setup.cache_block_size)
        scheduler = Scheduler(pool, batch_size, setup.prefill_chunk, stop_tokens)
        yield Engine(scheduler, runner, Sampler(setup.seed), tracer, answer_text)
        if runner.digest is not None:
            runner.digest.compare()
