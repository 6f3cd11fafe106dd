"""Puts an engine together: the model from its checkpoint, a cache of the right size, a tracer.

`load_model` and `open_engine` are what commands call; behind them stands what an engine needs to
know first: how large its cache is, what its selections stand for, how its bytes are counted.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsatrace.engine.block_tables import new_pool
from dsatrace.engine.clock import Clock
from dsatrace.engine.engine import Engine, Judge
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Admission, Scheduler
from dsatrace.errors import UserError
from dsatrace.kv.blocks import blocks_needed
from dsatrace.kv.layout import CacheLayout, named_layouts
from dsatrace.model.cache import KVCache
from dsatrace.model.checkpoint import Progress, load_checkpoint
from dsatrace.model.config import ModelArgs
from dsatrace.model.kernels import get_kernels
from dsatrace.model.parallel import ParallelGroup
from dsatrace.model.tiny import RANDOM_WEIGHTS
from dsatrace.model.transformer import Transformer
from dsatrace.runner.config import EngineSetup, user_errors
from dsatrace.runner.distributed import choose_ranks
from dsatrace.runner.model_runner import ModelRunner
from dsatrace.runner.offload.opening import offloaded_cache, tier_setup, try_tiers
from dsatrace.runner.offload.totals import TierTotals
from dsatrace.runner.sampler import Sampler
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo, Selections, shared_layers
from dsatrace.trace.resume import Resumed
from dsatrace.trace.tracer import Tracer

__all__ = ["EngineSetup", "load_model", "open_engine"]


def load_model(setup: EngineSetup, device: torch.device, progress: Progress | None = None) -> Transformer:
    """This rank's shard of the model on `device`, loaded and checked; its tiers are tried before."""
    assert setup.ckpt_path is not None, "a model needs a checkpoint"
    args = setup.model_args()
    group = ParallelGroup.current()
    if setup.offload is not None:
        try_tiers(setup.offload, group)
    with user_errors():
        kernels = get_kernels(setup.kernel_backend, device)
        with torch.device("meta"):
            model = Transformer(args, kernels, group)
        load_checkpoint(model, setup.ckpt_path, group.rank, group.size, progress, device)
    return model.eval()


@contextlib.contextmanager
def open_engine(
    model: Transformer,
    setup: EngineSetup,
    device: torch.device,
    longest: int | None,
    trace: TraceConfig | None,
    *,
    traced: bool = False,
    argv: Sequence[str] = (),
    tokenizer: str | None = None,
    chat: str | None = None,
    data_source: str | None = None,
    serving: Mapping[str, Any] | None = None,
    stop_tokens: frozenset[int] = frozenset(),
    num_requests: int | None = None,
    admission: Admission = "continuous",
    clock: Clock | None = None,
    judge: Judge | None = None,
    answer_text: Callable[[LiveRequest], str] | None = None,
    resumed: Resumed | None = None,
    first_forward_idx: int = 0,
) -> Iterator[Engine]:
    """An engine over a cache of its own (see `num_cache_blocks`), traced or not.

    `longest` counts the prompt and answer of the longest request; None: not known, and one that
    exceeds the config's `max_seq_len`, or the cache, is rejected when it comes. A request holds
    the blocks of its whole answer from the start where the cache has room for that.

    `serving` is what the manifest says of requests that arrive over time. A run that is `resumed`
    goes on behind `first_forward_idx`, and on a `clock` that starts where it stood. Leaving the
    block ends the trace: `complete`, or `incomplete` when an exception leaves it. Under tensor
    parallel only rank 0 has a `trace` and what was `resumed`; `traced` tells the others that it has.
    """
    assert setup.ckpt_path is not None, "the simulator has no model"
    args = model.args
    batch_size = setup.max_batch_size if num_requests is None else min(setup.max_batch_size, num_requests)
    block_size = setup.cache_block_size
    bytes_per_token = model.new_cache(1, block_size, device).bytes_per_token
    budget_blocks = cache_budget_bytes(device) // (block_size * bytes_per_token)
    num_blocks = num_cache_blocks(setup, args.max_seq_len, longest, batch_size, budget_blocks)
    with contextlib.ExitStack() as stack:
        offloaded = None
        if setup.offload is not None:
            offloaded = stack.enter_context(
                offloaded_cache(model, setup.offload, num_blocks, block_size, device)
            )
        cache = offloaded or model.new_cache(num_blocks, block_size, device)
        tracer = None
        if trace is not None:
            on_cuda = device.type == "cuda"
            run = RunInfo(
                model_config=dataclasses.asdict(args),
                layouts=cache_layouts(cache, args),
                device=torch.cuda.get_device_name(device) if on_cuda else f"cpu ({platform.machine()})",
                argv=argv,
                tokenizer=tokenizer,
                chat=chat,
                data_source=data_source,
                hbm_stand_in=None if on_cuda else "host memory",
                world_size=model.setup.group.size,
                seed=setup.seed,
                selections=selections_of(setup.ckpt_path),
                serving=serving,
                prefix_source="cache" if setup.prefix_caching else "analysis",
                tiers=tier_setup(setup.offload, offloaded) if setup.offload and offloaded else None,
                shared_layers=shared_layers(args.source_layers),
            )
            tracer = stack.enter_context(Tracer(trace, run, resumed=resumed))
        sampler = Sampler(setup.seed)
        runner = ModelRunner(
            model,
            cache,
            sampler,
            device,
            tracer,
            batch_size,
            first_forward_idx,
            compare_ranks=traced and model.setup.group.size > 1,
        )
        pool = new_pool(num_blocks, block_size, setup.prefix_caching)
        pool.blocks.on_void = offloaded.void if offloaded else None
        scheduler = Scheduler(
            pool,
            batch_size,
            setup.prefill_chunk,
            stop_tokens,
            max_seq_len=args.max_seq_len,
            reserve_answer=num_blocks >= batch_size * blocks_needed(longest or args.max_seq_len, block_size),
            admission=admission,
        )
        ranks = choose_ranks(model.setup.group, device)
        engine = Engine(
            scheduler,
            runner,
            tracer,
            clock=clock,
            ranks=ranks,
            judge=judge,
            answer_text=answer_text,
            on_tier_error=setup.offload.on_tier_error if setup.offload else "fail",
        )
        if runner.tier_totals is not None:
            engine.tell_tiers = runner.tier_totals.to_text
            if tracer is not None:
                tracer.tell_tiers = partial(_told_of_tiers, runner.tier_totals, scheduler)
        yield engine
        if runner.recorder is not None:
            runner.recorder.close()


def num_cache_blocks(
    setup: EngineSetup, max_seq_len: int, longest: int | None, batch_size: int, budget_blocks: int
) -> int:
    """Blocks of the KV cache: `--cache-blocks` when given, else room for `batch_size` of the longest.

    Where `longest` is not known, any request may have `max_seq_len` tokens: there is room for as
    many of those as fit `budget_blocks`, and for one at least. Raises `UserError` when the
    longest, where it is known, could never be served.
    """
    if longest is not None and longest > max_seq_len:
        raise UserError(
            f"a prompt and its answer need {longest} tokens of KV, --max-seq-len is {max_seq_len}; "
            "shorten the prompt, lower --max-new-tokens or raise --max-seq-len"
        )
    a_request = blocks_needed(longest or max_seq_len, setup.cache_block_size)
    if setup.cache_blocks is None:
        everyone = batch_size * a_request
        return everyone if longest is not None else min(everyone, max(a_request, budget_blocks))
    if longest is not None and a_request > setup.cache_blocks:
        raise UserError(
            f"--cache-blocks {setup.cache_blocks}: a prompt and its answer need {longest} tokens of KV, "
            f"{a_request} blocks of {setup.cache_block_size}; use at least that many"
        )
    return setup.cache_blocks


def cache_budget_bytes(device: torch.device) -> int:
    """What a cache may take that is not sized for known requests: 2 GiB, or an eighth of a GPU's memory.

    A share of the whole and not of what is free, so that all ranks find the same.
    """
    if device.type != "cuda":
        return 2 << 30
    return torch.cuda.get_device_properties(device).total_memory // 8


def selections_of(ckpt_path: Path | None) -> Selections:
    """What a checkpoint's selections stand for: its `config.json` says when the weights are random."""
    if ckpt_path is None:
        return "model"  # built in memory, by someone who knows
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


def _told_of_tiers(totals: TierTotals, scheduler: Scheduler) -> Mapping[str, Any]:
    return totals.to_json(scheduler.num_recomputes, scheduler.num_failed)
