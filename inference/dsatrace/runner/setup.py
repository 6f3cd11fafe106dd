"""Puts an engine together: the model from its checkpoint, a cache of the right size, a tracer.

settings = ModelSettings("converted", "config_tiny.json")
with process_group(settings.device) as device:
    model = load_model(settings, device)
    with open_engine(model, settings, device, RunSettings(longest=2100)) as engine: ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.engine import Engine
from dsatrace.engine.scheduler import Scheduler
from dsatrace.engine.settings import EngineSettings, RunSettings
from dsatrace.errors import UserError
from dsatrace.kv.blocks import blocks_needed
from dsatrace.kv.layout import CacheLayout, named_layouts
from dsatrace.model.cache import KVCache
from dsatrace.model.checkpoint import load_transformer
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import Progress
from dsatrace.model.kernels import get_kernels
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.tiny import RANDOM_WEIGHTS
from dsatrace.model.transformer import Transformer
from dsatrace.runner.distributed import choose_ranks
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.offload.cache import OffloadedCache
from dsatrace.runner.offload.opening import offloaded_cache, tier_setup, try_tiers
from dsatrace.runner.sampler import Sampler
from dsatrace.runner.settings import ModelSettings, user_errors
from dsatrace.trace.manifest import RunInfo, Selections, shared_layers
from dsatrace.trace.tracer import Tracer


def load_model(
    settings: ModelSettings, device: torch.device, progress: Progress | None = None
) -> Transformer:
    """This rank's shard of the model on `device`, loaded and checked; its tiers are tried before."""
    assert settings.ckpt_path is not None, "a model needs a checkpoint"
    args = settings.model_args()
    group = ParallelGroup.current()
    if settings.offload is not None:
        try_tiers(settings.offload, group)
    with user_errors():
        kernels = get_kernels(settings.kernel_backend, device)
        return load_transformer(args, settings.ckpt_path, kernels, group, progress, device)


@contextlib.contextmanager
def open_engine(
    model: Transformer, settings: ModelSettings, device: torch.device, run: RunSettings
) -> Iterator[Engine]:
    """An engine over a cache of its own (see `num_cache_blocks`), traced or not.

    Where `run.longest` is not known, a request that exceeds the config's `max_seq_len`, or the cache, is
    rejected when it comes. A request holds the blocks of its whole answer from the start where the
    cache has room for that. Leaving the block ends the trace: `complete`, or `incomplete` after an
    exception.
    """
    args, block_size, longest = model.args, settings.cache_block_size, run.longest
    batch_size = min(settings.max_batch_size, run.num_requests or settings.max_batch_size)
    block_bytes = block_size * model.new_cache(1, block_size, device).bytes_per_token
    budget_blocks = cache_budget_bytes(device) // block_bytes
    num_blocks = num_cache_blocks(settings, args.max_seq_len, longest, batch_size, budget_blocks)
    with contextlib.ExitStack() as stack:
        offload, offloaded = settings.offload, None
        if offload is not None:
            offloaded = stack.enter_context(offloaded_cache(model, offload, num_blocks, block_size, device))
        cache = offloaded or model.new_cache(num_blocks, block_size, device)
        tracer = None
        if run.trace is not None:
            info = _run_info(run, model, settings, cache, device)
            tracer = stack.enter_context(Tracer(run.trace, info, resumed=run.resumed))
        group = model.setup.group
        runner = ModelRunner(
            model,
            cache,
            Sampler(settings.seed, run.stop_tokens, run.end.min_new_tokens),
            device,
            tracer,
            batch_size,
            run.first_forward_idx,
            compare_ranks=run.traced and group.size > 1,
        )
        pool = new_pool(num_blocks, block_size, settings.prefix_caching)
        pool.blocks.on_void = offloaded.void if offloaded else None
        scheduler = Scheduler(
            pool,
            batch_size,
            settings.prefill_chunk,
            run.stop_tokens,
            max_seq_len=args.max_seq_len,
            reserve_answer=num_blocks >= batch_size * blocks_needed(longest or args.max_seq_len, block_size),
            admission=run.admission,
            end=run.end,
        )
        engine = Engine(
            scheduler,
            runner,
            tracer,
            run,
            ranks=choose_ranks(group, device),
            on_tier_error=offload.on_tier_error if offload else "fail",
        )
        if (totals := runner.tier_totals) is not None:
            engine.tell_tiers = totals.to_text
            if tracer is not None:
                tracer.tell_tiers = lambda: totals.to_json(scheduler.num_recomputes, scheduler.num_failed)
        yield engine
        if runner.recorder is not None:
            runner.recorder.close()


def _run_info(
    run: RunSettings, model: Transformer, settings: ModelSettings, cache: KVCache, device: torch.device
) -> RunInfo:
    """What the manifest says; `run.info` knows what the command was."""
    args, on_cuda = model.args, device.type == "cuda"
    return run.info(
        model_config=dataclasses.asdict(args),
        layouts=cache_layouts(cache, args),
        device=torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})",
        hbm_stand_in=None if on_cuda else "host memory",
        world_size=model.setup.group.size,
        seed=settings.seed,
        selections=selections_of(settings.ckpt_path),
        prefix_source="cache" if settings.prefix_caching else "analysis",
        tiers=tier_setup(settings.offload, cache)
        if settings.offload and isinstance(cache, OffloadedCache)
        else None,
        shared_layers=shared_layers(args.source_layers),
        answer_end=run.end.to_json(),
    )


def num_cache_blocks(
    settings: EngineSettings, max_seq_len: int, longest: int | None, batch_size: int, budget_blocks: int
) -> int:
    """Blocks of the KV cache: `--cache-blocks` when given, else room for `batch_size` of the longest.

    If `longest` is not known, any request may have `max_seq_len` tokens: there is room for as many of
    those as fit `budget_blocks`, at least one. Raises `UserError` if the longest could never be served.
    """
    if longest is not None and longest > max_seq_len:
        raise UserError(
            f"a prompt and its answer need {longest} tokens of KV, --max-seq-len is {max_seq_len}; "
            "shorten the prompt, lower --max-new-tokens or raise --max-seq-len"
        )
    a_request = blocks_needed(longest or max_seq_len, settings.cache_block_size)
    if settings.cache_blocks is None:
        everyone = batch_size * a_request
        return everyone if longest is not None else min(everyone, max(a_request, budget_blocks))
    if longest is not None and a_request > settings.cache_blocks:
        raise UserError(
            f"--cache-blocks {settings.cache_blocks}: a prompt and its answer need {longest} tokens of KV, "
            f"{a_request} blocks of {settings.cache_block_size}; use at least that many"
        )
    return settings.cache_blocks


def cache_budget_bytes(device: torch.device) -> int:
    """Room for a cache that is not sized for known requests: 2 GiB, or an eighth of a GPU's memory.

    It is a share of all memory, not of the free memory, so that all ranks compute the same.
    """
    if device.type != "cuda":
        return 2 << 30
    return torch.cuda.get_device_properties(device).total_memory // 8


def selections_of(ckpt_path: Path | None) -> Selections:
    """What a checkpoint's selections stand for: its `config.json` says when the weights are random."""
    if ckpt_path is None:
        return "model"  # built in memory
    try:
        config = json.loads((ckpt_path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "model"  # DeepSeek's own conversion keeps no config.json
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{ckpt_path / 'config.json'}: cannot read it: {error}; restore or remove it"
        ) from error
    return "random_weights" if config.get(RANDOM_WEIGHTS) else "model"


def cache_layouts(cache: KVCache, args: ModelArgs) -> list[CacheLayout]:
    """The layout this run's cache has, first, and those of other engines for comparison."""
    own = CacheLayout("this_run", cache.latent_bytes_per_token, cache.index_bytes_per_token)
    others = named_layouts(args.kv_lora_rank, args.qk_rope_head_dim, args.index_head_dim)
    return [own, *others.values()]
