"""From what each layer selected to a run: records step by step, as every door writes them.

The run is written inside the work folder and moved out when it is whole, its manifest last: whoever kills
this loses nothing, and a resume writes the same records again.

    write_runs(setup, RunFacts(...), recorded, layers, folder, config, with_experts=False)
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.errors import UserError
from dsatrace.files import sync
from dsatrace.kv.layout import CacheLayout, named_layouts
from dsatrace.layerwise.folder import WorkFolder
from dsatrace.layerwise.sweep import EXPERTS, IDS, SCORES, STATS
from dsatrace.layerwise.transcripts import Recorded
from dsatrace.model.cache import KVCache
from dsatrace.model.config import ModelArgs
from dsatrace.model.layers import ModelSetup
from dsatrace.schema import MANIFEST_FILE
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.kind import Layer, SelectionKind
from dsatrace.trace.manifest import RunInfo, Selections
from dsatrace.trace.request_facts import RecordedRequest, RequestFacts
from dsatrace.trace.tracer import Tracer

_RUN = "run"
EXPERTS_FOLDER = "experts"
"""In the run's folder: a run of the same rows, of the experts they are routed to."""


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the manifest says beside the model."""

    device: str
    selections: Selections
    argv: Sequence[str] = ()
    tokenizer: str | None = None
    chat: str | None = None
    data_source: str | None = None
    workload: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def selection_kind(args: ModelArgs, layers: range) -> SelectionKind:
    """Of a run that records `layers`; of the others it has no sets. Raises `UserError` for a layer that uses
    the selection of one that is not recorded."""
    kinds = []
    for layer, source in enumerate(args.source_layers):
        if layer not in layers:
            kinds.append(Layer(0, heads=0))
            continue
        if source not in layers:
            raise UserError(
                f"--layers {layers[0]}-{layers[-1]}: layer {layer} uses the selection of layer {source}; "
                f"begin with {source}"
            )
        kinds.append(Layer(args.index_topk, source_layer=None if source == layer else source))
    return SelectionKind(tuple(kinds), door="layerwise", missing=("timing", "tiers"))


def expert_kind(args: ModelArgs, layers: range) -> SelectionKind:
    """Of the run of their experts."""
    with_experts = range(max(layers[0], args.n_dense_layers), layers[-1] + 1)
    if not with_experts:
        raise UserError(f"--experts: layers {layers[0]} to {layers[-1]} have none; leave the flag out")
    one, none = Layer(args.n_activated_experts), Layer(0, heads=0)
    return SelectionKind(
        tuple(one if layer in with_experts else none for layer in range(args.n_layers)),
        unit="expert",
        num_ids=args.n_routed_experts,
        door="layerwise",
        missing=("scores", "timing", "tiers", "prefix"),
    )


def write_runs(
    setup: ModelSetup,
    facts: RunFacts,
    recorded: Sequence[Recorded],
    layers: range,
    folder: WorkFolder,
    config: TraceConfig,
    with_experts: bool,
) -> None:
    """Writes the run, and that of the experts, and removes the work folder. `config.out` is left aside."""
    args = setup.args
    scratch = folder.path / _RUN
    shutil.rmtree(scratch, ignore_errors=True)  # of a resume before this one
    own = [layer for layer in layers if args.source_layers[layer] == layer]
    held = {layer: {name: folder.layer_array(name, layer) for name in (IDS, STATS)} for layer in own}
    if config.needs_scores:
        for layer in own:
            held[layer][SCORES] = folder.layer_array(SCORES, layer)
    sets = [held[args.source_layers[layer]] for layer in layers]
    kind = selection_kind(args, layers)
    _write(scratch, setup, facts, recorded, kind, sets, config)
    if with_experts:
        kind = expert_kind(args, layers)
        sets = [{IDS: folder.layer_array(EXPERTS, layer)} for layer in kind.set_layers.tolist()]
        plain = dataclasses.replace(config, store_scores=False, keep_order=False)
        _write(scratch / EXPERTS_FOLDER, setup, facts, recorded, kind, sets, plain)
    _publish(scratch, folder.out)
    folder.remove()


def _write(
    out: Path,
    setup: ModelSetup,
    facts: RunFacts,
    recorded: Sequence[Recorded],
    kind: SelectionKind,
    sets: Sequence[Mapping[str, np.ndarray]],
    config: TraceConfig,
) -> None:
    info = RunInfo(
        model_config=dataclasses.asdict(setup.args),
        layouts=_layouts(setup),
        device=facts.device,
        argv=facts.argv,
        tokenizer=facts.tokenizer,
        chat=facts.chat,
        data_source=facts.data_source,
        selections=facts.selections,
        seed=config.seed,
        kind=kind,
    )
    num_forwards = 0
    with Tracer(dataclasses.replace(config, out=out), info) as tracer:
        for one in recorded:
            transcript, first = one.transcript, one.positions.start
            # What lies before the first recorded row is its prompt.
            request = RecordedRequest(
                transcript.request_id,
                transcript.token_ids[:first].tolist(),
                transcript.source_row,
                labels={**transcript.labels, "transcript": transcript.written_by},
                needle_positions=[at for at in transcript.needle_positions if at < first],
            )
            tracer.add_request(request)
            names = (transcript.request_id,)
            for step, position in enumerate(one.positions):
                row = one.offset_recorded + step
                stats = np.stack([one_set[STATS][row] for one_set in sets]) if STATS in sets[0] else None
                scores = np.stack([one_set[SCORES][row] for one_set in sets]) if SCORES in sets[0] else None
                tracer.put(
                    StepCapture(
                        phase="layerwise",
                        request_ids=names,
                        step_idx=(step,),
                        seq_len=np.array([position + 1], dtype=np.int32),
                        batch_size=1,
                        positions=np.stack([one_set[IDS][row] for one_set in sets])[:, None],
                        score_stats=None if stats is None else stats[:, None],
                        scores=None if scores is None else scores[:, None],
                        prefixes=tracer.prefixes(names) if kind.holds("prefix") else (),
                        forward_idx=num_forwards,
                        step_wall_us=None,
                        step_synced=None,
                        needles=tracer.needles(names),
                    )
                )
                num_forwards += 1
            # As in decode, the last of the tokens was never fed back.
            facts_of_request = RequestFacts(num_output_tokens=len(one.positions) + 1, state="length")
            tracer.finish_request(request, facts_of_request)
        tracer.describe_workload({"name": "layerwise", **facts.workload})


def _layouts(setup: ModelSetup) -> list[CacheLayout]:
    """What the model's own cache holds per token and layer, and other engines' for comparison."""
    args = setup.args
    cache = KVCache(setup, 1, 1, only_layer=0)
    own = CacheLayout("this_run", cache.latent_bytes_per_token, cache.index_bytes_per_token)
    return [own, *named_layouts(args.kv_lora_rank, args.qk_rope_head_dim, args.index_head_dim).values()]


def _publish(scratch: Path, out: Path) -> None:
    """Moves the whole run into place: its manifest last, since it says that the run is there."""
    try:
        paths = sorted(scratch.iterdir(), key=lambda path: path.name == MANIFEST_FILE)
        for path in paths:
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        sync(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write there: {error.strerror}") from error
