"""A small engine without a model, for the tests of resuming: the same selections whenever a step is run.

Two requests at a time, first come, first served, as the scheduler would; what a request
selects depends on the request and its step alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.reader import RunReader
from dsatrace.trace.request_facts import RequestFacts
from dsatrace.trace.resume import Resumed, prepare_resume
from dsatrace.trace.summarize import summarize_runs
from dsatrace.trace.tracer import Tracer
from helpers.golden_run import read_lines
from helpers.tier_samples import SimulatedTiers
from helpers.trace_samples import LAYOUT, SECRET, SampleRequest, sample_capture

NUM_LAYERS, TOP_K, BATCH = 2, 4, 2
INFO = RunInfo(
    model_config={"n_layers": NUM_LAYERS, "index_topk": TOP_K},
    layouts=(LAYOUT,),
    device="cpu",
    selections="synthetic",
    argv=("--dataset", "ruler", "--limit", "5"),
)
OUTPUTS = {"r0": 4, "r1": 2, "r2": 5, "r3": 1, "r4": 3}
REQUESTS = [SampleRequest(name, [9] * 8 + [i] * 12, source_row=i) for i, name in enumerate(OUTPUTS)]
OF_THE_MOMENT = ("forward_idx", "step_wall_us", "step_synced")


class Server:
    """Serves `REQUESTS` through a tracer; `stop_at` ends it after so many forwards in all."""

    def __init__(self, tracer: Tracer, resumed: Resumed | None = None, stop_at: int = 1 << 30) -> None:
        self.tracer = tracer
        self.forward_idx = resumed.next_forward_idx if resumed else 0
        self.now_s = resumed.elapsed_s if resumed else 0.0
        self.first_token_s: dict[str, float] = {}
        self.stop_at = stop_at
        self.tiers = SimulatedTiers(INFO.tiers) if INFO.tiers else None
        if self.tiers is not None:
            self.tiers.since_forward = self.forward_idx
        self.waiting = []
        for request in REQUESTS:
            if resumed and request.request_id in resumed.done:
                tracer.skip_request(request)
            else:
                tracer.add_request(request)
                self.waiting.append(request)

    def run(self) -> bool:
        """False when it was stopped."""
        is_done = self.serve()
        if self.tiers is not None:
            self.tracer.describe_tiers(self.tiers.described())
        return is_done

    def serve(self) -> bool:
        running: dict[str, tuple[SampleRequest, int]] = {}
        while self.waiting or running:
            while self.waiting and len(running) < BATCH:
                request = self.waiting.pop(0)
                if not self.forward([(request, -1)]):
                    return False
                self.first_token_s[request.request_id] = self.now_s
                if OUTPUTS[request.request_id] == 1:
                    self.finish(request)
                else:
                    running[request.request_id] = request, 0
            if running and not self.forward(list(running.values())):
                return False
            for name, (request, step) in list(running.items()):
                running[name] = request, step + 1
                if step == OUTPUTS[name] - 2:
                    self.finish(request)
                    del running[name]
        return True

    def forward(self, rows: Sequence[tuple[SampleRequest, int]]) -> bool:
        if self.forward_idx >= self.stop_at:
            return False
        step = rows[0][1]
        wanted = [row for row in rows if row[1] < 0 or self.tracer.wants(row[1])]
        if wanted and (step >= 0 or self.tracer.config.prefill == "last"):
            capture = self.capture(wanted, len(rows))
            self.tracer.put(capture if self.tiers is None else self.tiers.fetched(capture))
        self.forward_idx += 1
        self.now_s += 0.01
        return True

    def capture(self, rows: Sequence[tuple[SampleRequest, int]], batch_size: int) -> StepCapture:
        alone = [sample_row(request, step) for request, step in rows]
        request_ids = tuple(request.request_id for request, _ in rows)
        return StepCapture(
            phase="prefill" if rows[0][1] < 0 else "decode",
            request_ids=request_ids,
            step_idx=tuple(step for _, step in rows),
            seq_len=np.concatenate([one.seq_len for one in alone]),
            batch_size=batch_size,
            positions=np.concatenate([one.positions for one in alone], axis=1),
            score_stats=np.concatenate([one.score_stats for one in alone], axis=1),
            scores=None,
            prefixes=self.tracer.prefixes(request_ids),
            forward_idx=self.forward_idx,
            step_wall_us=1000.0,
            step_synced=True,
        )

    def finish(self, request: SampleRequest) -> None:
        self.tracer.finish_request(
            request,
            RequestFacts(
                num_output_tokens=OUTPUTS[request.request_id],
                state="length",
                first_token_s=self.first_token_s[request.request_id],
                finish_s=self.now_s,
            ),
        )


def sample_row(request: SampleRequest, step: int) -> StepCapture:
    """One request's selections in one step."""
    rng = np.random.default_rng([zlib.crc32(request.request_id.encode()), step + 1])
    return sample_capture(rng, [len(request.prompt_token_ids) + step + 1], NUM_LAYERS, TOP_K)


def config_of(folder: Path, **changes: Any) -> TraceConfig:
    return TraceConfig(out=folder, **({"block_size": 4, "prefill": "last"} | changes))


def serve(folder: Path, stop_at: int = 1 << 30, **changes: Any) -> Path:
    """A run, complete or ended as by Ctrl-C after so many forwards."""
    with Tracer(config_of(folder, **changes), INFO, secret=SECRET) as tracer:
        if not Server(tracer, stop_at=stop_at).run():
            tracer.close("incomplete")
    return folder


def resume(
    folder: Path, stop_at: int = 1 << 30, on_open: Callable[[], None] = lambda: None, **changes: Any
) -> Resumed:
    """Goes on with a run to its end, or to a forward."""
    resumed = prepare_resume(folder)
    try:
        tracer = Tracer(config_of(folder, **changes), INFO, secret=SECRET, resumed=resumed)
        with tracer:
            on_open()
            if not Server(tracer, resumed, stop_at).run():
                tracer.close("incomplete")
    finally:
        resumed.close()
    return resumed


def records_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """(request, step, layer) -> record without what belongs to the moment; no key may occur twice."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in RunReader(folder).steps():
        key = record["request_id"], record["step_idx"], record["layer_id"]
        assert key not in found
        for tier in record["kv_fetch"].values():
            del tier["batch_size"]
        found[key] = {name: value for name, value in record.items() if name not in OF_THE_MOMENT}
    return found


def answers_of(folder: Path) -> dict[str, tuple[str, int]]:
    lines = read_lines(folder, "requests.jsonl")
    assert len({line["request_id"] for line in lines}) == len(lines)
    return {line["request_id"]: (line["state"], line["num_output_tokens"]) for line in lines}


def check_summary(folder: Path) -> None:
    """What is stored is what summarize makes of the files."""
    stored = RunReader(folder).summary()
    again = summarize_runs([folder])
    del stored["tracing_cost"], again["tracing_cost"]
    assert rounded(again) == rounded(stored)


def rounded(value: Any) -> Any:
    """Means are summed in another order."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 9) if isinstance(value, float) else value
