"""A small run as a model would have left it, written by the real sinks: what the verifier's tests spoil.

Three requests in one batch; r0 stays dense for a while, r2 begins like r1. Scores and
positions are random, everything else is what an engine would have done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsatrace.files import write_json
from dsatrace.kv.layout import CacheLayout
from dsatrace.kv.prefix import RequestPrefix
from dsatrace.schema import MANIFEST_FILE, STEPS_FILE
from dsatrace.trace.config import TraceConfig, is_sampled
from dsatrace.trace.manifest import RunInfo, TierSettings, manifest
from dsatrace.trace.records import RecordDeriver
from dsatrace.trace.request_facts import RequestFacts, request_line
from dsatrace.trace.summary import Sections, Summary
from dsatrace.trace.tracer import tiers_of
from dsatrace.trace.writer import Sink, open_sinks
from helpers.damage import overwrite
from helpers.tier_samples import SimulatedTiers
from helpers.trace_samples import SampleRequest, sample_capture, with_shared_layers

LAYOUTS = (CacheLayout("demo", 1152, 132), CacheLayout("serving_fp8", 656, 132))
NUM_LAYERS, TOP_K, BLOCK_SIZE = 3, 8, 4


class GoldenRequest(NamedTuple):
    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    cached_blocks: int = 0
    needle_positions: tuple[int, ...] = ()
    score: float | None = None


REQUESTS = (
    GoldenRequest("r0", 6, 6, score=100.0),
    GoldenRequest("r1", 40, 4, score=100 / 3),
    GoldenRequest("r2", 45, 6, 7, needle_positions=tuple(range(11, 31))),
)
SERVING = {"mode": "continuous", "clock": "virtual", "max_batch_size": 3}


def write_golden(
    folder: Path,
    requests: Sequence[GoldenRequest] = REQUESTS,
    *,
    state: str = "complete",
    sealed: bool = False,
    num_layers: int = NUM_LAYERS,
    serving: Mapping[str, Any] | None = None,
    tiers: TierSettings | None = None,
    shared_layers: Mapping[int, int] | None = None,
    **changes: Any,
) -> Path:
    """Writes the run and returns its folder; `changes` are `TraceConfig`'s. Without `sealed` there are no
    digests, which would find everything that is spoilt."""
    config = TraceConfig(out=folder, **({"block_size": BLOCK_SIZE, "prefill": "last"} | changes))
    info = RunInfo(
        model_config={"n_layers": num_layers, "index_topk": TOP_K},
        layouts=LAYOUTS,
        device="cpu",
        selections="synthetic",
        seed=config.seed,
        serving=serving,
        tiers=tiers,
        shared_layers=shared_layers or {},
    )
    folder.mkdir(parents=True)
    write_json(folder / MANIFEST_FILE, manifest(info, config, "running", key_id="00000000"))
    summary = Summary(config.compared_block_sizes, info.selections, serving, offloaded=tiers is not None)
    sinks = open_sinks(folder, config, summary)
    _serve(sinks, summary.sections, config, info, requests, num_layers)
    files: dict[str, Any] = {}
    for sink in sinks:
        files |= sink.close(state) or {}
    record = manifest(info, config, state, key_id="00000000", files=files if sealed else None)
    write_json(folder / MANIFEST_FILE, record)
    return folder


def _serve(
    sinks: Sequence[Sink],
    sections: Sections,
    config: TraceConfig,
    info: RunInfo,
    requests: Sequence[GoldenRequest],
    num_layers: int,
) -> None:
    """All prefills, one a forward, then decode together; a request leaves after its last step."""
    deriver = RecordDeriver(config, LAYOUTS[0], tiers_of(info), shared_layers=info.shared_layers)
    tiers = SimulatedTiers(info.tiers, config.seed) if info.tiers else None
    rng = np.random.default_rng(config.seed)
    plan = [(i, -1, [request]) for i, request in enumerate(requests) if config.prefill == "last"]
    most = max(request.num_output_tokens for request in requests)
    for step in range(most - 1):
        running = [request for request in requests if step < request.num_output_tokens - 1]
        plan.append((len(requests) + step, step, running))
    for forward_idx, step, running in plan:
        if step < 0 or is_sampled(step, config.sample_rate, config.seed):
            capture = sample_capture(
                rng,
                [request.num_prompt_tokens + step + 1 for request in running],
                num_layers,
                TOP_K,
                step_idx=step,
                request_ids=tuple(request.request_id for request in running),
                prefixes=tuple(
                    RequestPrefix(request.cached_blocks, f"{requests.index(request):016x}")
                    for request in running
                ),
                phase="prefill" if step < 0 else "decode",
                forward_idx=forward_idx,
                needles=tuple(request.needle_positions for request in running),
            )
            capture = with_shared_layers(capture, info.shared_layers)
            if tiers is not None:
                capture = tiers.fetched(capture)
            for sink in sinks:
                sink.write_step(deriver.derive(capture))
        for request in running:
            if step == request.num_output_tokens - 2:
                for sink in sinks:
                    sink.write_request(_line(request, requests.index(request), tiers is not None))
    if tiers is not None:
        ended = [request for request in requests if request.num_output_tokens > 1]
        sections["tiers"] = tiers.described(sum(map(_recomputes, ended)))


def _recomputes(request: GoldenRequest) -> int:
    return len(request.request_id)


def _line(request: GoldenRequest, i: int, has_tiers: bool) -> dict[str, Any]:
    asked = SampleRequest(
        request.request_id,
        range(request.num_prompt_tokens),
        arrival_s=i * 1.1,
        labels={"task": f"task {i % 2}", "length": "short"},
        needle_positions=request.needle_positions,
    )
    facts = RequestFacts(
        num_output_tokens=request.num_output_tokens,
        first_token_s=i * 1.1 + 0.5,
        finish_s=i * 1.1 + 0.7 + request.num_output_tokens / 7,
        state="length",
        score=request.score,
        admitted_s=i * 1.1 + 0.25,
        num_recomputes=_recomputes(request),
    )
    return request_line(asked, facts, has_prefix_cache=False, has_tiers=has_tiers)


def read_lines(folder: Path, name: str = STEPS_FILE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def write_lines(folder: Path, records: Sequence[Any], name: str = STEPS_FILE) -> None:
    overwrite(folder / name, "".join(json.dumps(record) + "\n" for record in records).encode())
