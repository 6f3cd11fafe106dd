"""What an engine is told, with a model or without: how requests are served, and what one run asks for.

settings = EngineSettings(max_batch_size=4, cache_blocks=512)
run = RunSettings(stop_tokens=frozenset({1}), admission="fifo-batch")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from dsatrace.engine.clock import Clock
from dsatrace.engine.ending import ENDS_BY_ITSELF, EndSettings
from dsatrace.engine.live import LiveRequest
from dsatrace.engine.scheduler import Admission
from dsatrace.flags import Flag, check
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo

if TYPE_CHECKING:
    from dsatrace.trace.resume import Resumed

Judge = Callable[[LiveRequest], float | None]
"""The task's score of a served request; None where it has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How requests share the engine and its KV cache; every field is a flag."""

    max_batch_size: Annotated[
        int, Flag("requests at a time", ("--max-batch-size", "--batch-size"), at_least=1)
    ] = 8
    max_seq_len: Annotated[
        int | None, Flag("tokens of KV per request, at most (default: the config's)", at_least=1)
    ] = None
    prefill_chunk: Annotated[int, Flag("prompt tokens computed in one step", at_least=1)] = 256
    cache_block_size: Annotated[
        int, Flag("tokens of a physical block; statistics use --kv-block-size", at_least=1)
    ] = 64
    cache_blocks: Annotated[
        int | None, Flag("physical blocks of the KV cache (default: a whole batch's)", at_least=1)
    ] = None
    prefix_caching: Annotated[
        bool, Flag("skip the part of a prompt that an earlier request has left in the KV cache")
    ] = False
    seed: Annotated[int, Flag("seed of the sampling")] = 0

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run: what is known of its requests, how they are served, and what is kept of them.

    `answer_text` makes the text of generated tokens for the trace, if the user asked for it. Under tensor
    parallel only rank 0 has a `trace` and what is `resumed`; `traced` tells the others to compare
    selections. `info` makes the manifest's facts: `partial(RunInfo, ...)` with those that the command
    knows.
    """

    longest: int | None = None  # tokens of the longest request with its answer; None: not known
    num_requests: int | None = None  # None: not known
    stop_tokens: frozenset[int] = frozenset()
    end: EndSettings = ENDS_BY_ITSELF
    admission: Admission = "continuous"
    clock: Clock | None = None  # None: wall time; the simulator's is virtual
    judge: Judge | None = None
    answer_text: Callable[[Sequence[int]], str] | None = None
    save_tokens: bool = False  # the trace keeps token ids
    trace: TraceConfig | None = None
    traced: bool = False
    info: Callable[..., RunInfo] = RunInfo
    resumed: Resumed | None = None
    first_forward_idx: int = 0  # forwards that the resumed run has behind it
