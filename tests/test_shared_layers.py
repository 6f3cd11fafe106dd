"""A model some of whose layers have no indexer: what its runs record, with the real engine on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import torch.distributed as dist

from dsatrace import cli
from dsatrace.commands.report import main as report
from dsatrace.engine.engine import Engine
from dsatrace.engine.settings import RunSettings
from dsatrace.errors import UserError
from dsatrace.kv.tiers.account import default_tiers
from dsatrace.model.config import ModelArgs
from dsatrace.model.transformer import Transformer
from dsatrace.runner.settings import ModelSettings, OffloadSettings
from dsatrace.runner.setup import open_engine
from dsatrace.schema import LEVELS, problems
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.estimate import TraceLoad, draw_sample
from dsatrace.trace.export import export_run
from dsatrace.trace.manifest import shared_layers
from dsatrace.trace.reader import RunReader
from dsatrace.trace.records import RecordDeriver, StepLines
from dsatrace.trace.resume import Resumed, prepare_resume
from dsatrace.trace.summarize import summarize_runs
from dsatrace.verify.run import verify
from dsatrace.workloads.request import Request
from helpers.checkpoints import tiny_config
from helpers.command_runs import selections
from helpers.forked import call_on_ranks
from helpers.golden_run import write_golden
from helpers.models import SMALL, random_model, random_tokens
from helpers.step_records import step_lines
from helpers.trace_samples import (
    LAYOUT,
    WAYS,
    config_for,
    plain_records,
    sample_capture,
    sample_needles,
    with_shared_layers,
)

ARGS = dataclasses.replace(
    SMALL, vocab_size=98, n_layers=5, indexer_types=("full", "shared", "full", "full", "shared"), dtype="fp64"
)
SHARED = {1: 0, 4: 3}
LENGTHS = (130, 70, 91)
NEW_TOKENS = 33  # 32 decode steps: the first token comes from prefill
BLOCK = 16
CPU = torch.device("cpu")
OF_A_LAYER = ("layer_id", "indexer_scan", "source_layer")


@contextlib.contextmanager
def engine_of(
    model: Transformer,
    out: Path | None,
    offload: OffloadSettings | None = None,
    *,
    traced: bool = False,
    resumed: Resumed | None = None,
    **changes: Any,
) -> Iterator[Engine]:
    """Two requests at a time, prompts in chunks of 32."""
    settings = ModelSettings(
        Path("built in memory"), max_batch_size=2, prefill_chunk=32, cache_block_size=BLOCK, offload=offload
    )
    run = RunSettings(
        longest=max(LENGTHS) + NEW_TOKENS,
        trace=None if out is None else TraceConfig(out=out, block_size=BLOCK, prefill="last", **changes),
        traced=traced,
        resumed=resumed,
        first_forward_idx=resumed.next_forward_idx if resumed else 0,
    )
    with open_engine(model, settings, CPU, run) as engine:
        yield engine


def requests(args: ModelArgs = ARGS) -> list[Request]:
    return [
        Request(f"r{i}", tuple(random_tokens(length, args, seed=i)), NEW_TOKENS, stop_at_eos=False)
        for i, length in enumerate(LENGTHS)
    ]


def serve(
    model: Transformer, out: Path | None, *args: Any, limit: int | None = None, **changes: Any
) -> list[list[int]]:
    """Serves the requests, or so many, to their end; returns the answers."""
    with engine_of(model, out, *args, **changes) as engine:
        live = [engine.submit(request) for request in requests()[:limit]]
        while engine.scheduler.has_work:
            engine.step()
    return [one.answer for one in live]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return list(RunReader(folder).steps())


def by_row(folder: Path) -> list[list[dict[str, Any]]]:
    """Each request's records of a step, a layer each."""
    records = records_of(folder)
    return [records[i : i + ARGS.n_layers] for i in range(0, len(records), ARGS.n_layers)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(ARGS)


@pytest.fixture(scope="module")
def answers(model: Transformer) -> list[list[int]]:
    """Without a trace."""
    return serve(model, None)


@pytest.fixture(scope="module")
def run(model: Transformer, answers: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared") / "run"
    assert serve(model, out) == answers
    return out


def test_the_run_verifies_and_its_manifest_says_who_chooses(run: Path) -> None:
    found = verify(run)
    num_rows = len(LENGTHS) * NEW_TOKENS  # a prefill record and a record per decode step each
    assert (found.state, found.num_records) == ("complete", num_rows * ARGS.n_layers)
    selection = RunReader(run).manifest["selection"]
    layers = selection.pop("layers")
    assert selection == {
        **{"unit": "token", "unit_tokens": 1, "id_kind": "position", "num_ids": None},
        **{"door": "serve", "missing": [], "sparse_active": selection["sparse_active"]},
    }
    assert 0 < selection["sparse_active"] <= found.num_records
    assert [layer.pop("source_layer") for layer in layers] == [None, 0, None, None, 3]
    assert layers == [{"top_k": ARGS.index_topk, "heads": 1}] * ARGS.n_layers


def test_a_shared_layers_record_is_its_sources_but_for_the_scan(run: Path) -> None:
    for row in by_row(run):
        for layer, record in enumerate(row):
            assert problems(record) == []
            assert record.get("source_layer") == SHARED.get(layer)
            if layer in SHARED:
                assert record["indexer_scan"] == {"tokens": 0, "bytes_read": 0}
                source = row[SHARED[layer]]
                assert without(record, OF_A_LAYER) == without(source, OF_A_LAYER)
            else:
                assert record["indexer_scan"]["tokens"] == record["seq_len_current"]
                assert "source_layer" not in record


def without(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def test_the_summary_says_what_a_plain_count_says(run: Path) -> None:
    summary = RunReader(run).summary()
    scanned = 0
    shares: dict[str, dict[int, list[float]]] = {"step_overlap": {}, "layer_overlap": {}}
    last: dict[str, list[set[int]]] = {}
    for row in by_row(run):
        scanned += sum(record["seq_len_current"] for layer, record in enumerate(row) if layer not in SHARED)
        selected = [set(record["selected_token_pos"]) for record in row]
        before = last.get(row[0]["request_id"])
        last[row[0]["request_id"]] = selected
        assert row[0]["path"] == "sparse"  # every prompt is longer than top-k
        for layer, mine in enumerate(selected):
            pairs = [("step_overlap", before[layer])] if before else []
            if layer > 0 and layer not in SHARED:
                pairs.append(("layer_overlap", selected[layer - 1]))
            for name, other in pairs:
                shares[name].setdefault(layer, []).append(len(mine & other) / len(mine))
    index_bytes = next(x for x in RunReader(run).manifest["cache_layouts"] if x["name"] == "this_run")
    assert summary["bytes_read"]["indexer_scan"] == scanned * index_bytes["index_bytes_per_token"]
    for name, by_layer in shares.items():
        means = [np.mean(by_layer[i]) if i in by_layer else None for i in range(ARGS.n_layers)]
        stored = summary[name]
        assert [share is None for share in stored["per_layer"]] == [mean is None for mean in means]
        assert [x for x in stored["per_layer"] if x is not None] == pytest.approx(
            [x for x in means if x is not None]
        )
        assert stored["mean"] == pytest.approx(np.mean(list(itertools.chain(*by_layer.values()))))
        assert {stored["pairs"]} == {len(found) for found in by_layer.values()}
    assert summary["step_overlap"]["per_layer"][1] == summary["step_overlap"]["per_layer"][0]
    assert [i for i, share in enumerate(summary["layer_overlap"]["per_layer"]) if share is not None] == [2, 3]


@pytest.mark.parametrize("level", LEVELS)
def test_levels_formats_and_recomputed_summaries(
    model: Transformer, run: Path, level: str, tmp_path: Path
) -> None:
    folder = run if level == "full" else tmp_path / "run"
    if folder != run:
        serve(model, folder, level=level)
    assert verify(folder).level == level
    run = RunReader(folder)
    written = run.summary()
    export_run(run, "parquet", tmp_path / "parquet")
    export_run(RunReader(tmp_path / "parquet"), "jsonl", tmp_path / "back")
    for name in ("trace_steps.jsonl", "requests.jsonl", "summary.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    again = RunReader(tmp_path / "back").manifest
    in_parquet = RunReader(tmp_path / "parquet").manifest["files"]
    assert again.pop("source_files") == in_parquet | run.manifest["files"]  # all that it was made from
    assert again == run.manifest
    kept = RunReader(tmp_path / "parquet").steps(("source_layer",))
    counts = Counter(record.get("source_layer") for record in kept)
    num_rows = len(LENGTHS) * NEW_TOKENS
    assert counts == {None: 3 * num_rows, 0: num_rows, 3: num_rows}
    for source in (folder, tmp_path / "parquet"):
        again = summarize_runs([source])
        for name in ("bytes_read", "layer_overlap", "step_overlap", "counts"):
            assert close(again[name], written[name])


def close(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    return left == right or math.isclose(left, right, rel_tol=1e-9)


@pytest.mark.parametrize(
    "offload",
    [
        OffloadSettings(hbm_blocks=24, offload_index_keys=True),
        OffloadSettings(hbm_blocks=4, granularity="row", prefetch="previous-layer", offload_index_keys=True),
        OffloadSettings(hbm_blocks=4, granularity="row", prefetch="previous-step"),
    ],
    ids=["blocks", "rows, previous layer", "rows, previous step"],
)
def test_offloaded_it_answers_and_selects_the_same(
    model: Transformer, answers: list[list[int]], run: Path, offload: OffloadSettings, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert serve(model, out, offload) == answers
    assert verify(out).state == "complete"
    assert selections(out) == selections(run)
    tiers = RunReader(out).summary()["tiers"]
    if offload.offload_index_keys:
        # One put per indexer and forward, and none for a layer without one.
        assert tiers["index_keys"]["local_pool"]["write_batches"] % (ARGS.n_layers - len(SHARED)) == 0
    assert (offload.prefetch == "none") or tiers["prefetch"]["used_units"] > 0


def test_the_cache_holds_keys_of_indexers_only(model: Transformer) -> None:
    cache = model.new_cache(2, BLOCK)
    tensors = [*cache.latent, *cache.index_k, *(cache.index_scale or [])]
    assert cache.bytes_per_token * 2 * BLOCK == sum(x.numel() * x.element_size() for x in tensors)
    assert cache.indexer_layers == [0, 2, 3]


def test_a_run_that_broke_off_goes_on(model: Transformer, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"), engine_of(model, out) as engine:
        live = [engine.submit(request) for request in requests()]
        while "length" not in {one.state for one in live}:
            engine.step()
        raise RuntimeError("enough")
    resumed = prepare_resume(out)
    assert 0 < len(resumed.done) < len(LENGTHS)
    with engine_of(model, out, resumed=resumed) as engine:
        for request in requests():
            (engine.skip if request.request_id in resumed.done else engine.submit)(request)
        while engine.scheduler.has_work:
            engine.step()
    assert verify(out).state == "complete"
    assert selections(out) == selections(run)


def test_another_sharing_is_another_run(run: Path, tmp_path: Path) -> None:
    for name, shared in (("a", {1: 0}), ("b", {2: 0})):
        write_golden(tmp_path / name, shared_layers=shared)
    with pytest.raises(UserError, match=r"shared layers {2: 0}, but {1: 0}"):
        summarize_runs([tmp_path / "a", tmp_path / "b"])


def test_the_report_says_how_many_layers_choose(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 5 layers have an indexer; each of the others uses the selection of the last one" in shown
    assert (run / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("shared", [{1: 0}, {1: 0, 2: 0}, {2: 1}], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_any_sharing_adds_up(shared: dict[int, int], level: str, tmp_path: Path) -> None:
    """With all but the first layer shared, no pair of layers is compared at all."""
    folder = write_golden(tmp_path / "run", num_layers=3, shared_layers=shared, level=level)
    verify(folder)
    overlap = RunReader(folder).summary()["layer_overlap"]
    compared = [layer for layer in (1, 2) if layer not in shared]
    if not compared:
        assert overlap == {"pairs": 0, "mean": None, "random_mean": None, "per_layer": None}
    else:
        assert [i for i, share in enumerate(overlap["per_layer"]) if share is not None] == compared


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("shared", [{1: 0}, {1: 0, 2: 0, 3: 0}, {3: 2}], ids=str)
def test_three_ways_write_the_same_record(how: dict[str, Any], shared: dict[int, int]) -> None:
    rng = np.random.default_rng(3)
    needles = sample_needles(rng, [5, 60, 200])
    capture = sample_capture(rng, [5, 60, 200], num_layers=4, needles=needles, cached_blocks=[0, 1, 3])
    capture = with_shared_layers(capture, shared)
    config = config_for(**how)
    deriver = RecordDeriver(config, LAYOUT, default_tiers(LAYOUT), shared_layers=shared)
    step = deriver.derive(capture)
    lines = step_lines(step)
    assert bytes(StepLines().encode(step)) == lines
    fast = [json.loads(line) for line in lines.splitlines()]
    plain = plain_records(capture, config, shared_layers=shared)
    scores = ("scores_stats", "scores_topk", "kth_margin")  # float32 in one, double in the other
    for mine, other in zip(fast, plain, strict=True):
        assert list(mine) == list(other)
        assert without(mine, scores) == without(other, scores)


def test_the_estimate_knows_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = TraceLoad(5, 16, context=100, num_steps=8, batch_size=1, shared_layers=SHARED)
    records = [orjson.loads(line) for line in draw_sample(load, "full", "uniform").lines]
    for row in (records[i : i + 5] for i in range(0, len(records), 5)):
        assert [record.get("source_layer") for record in row] == [None, 0, None, None, 3]
        assert [record["indexer_scan"]["tokens"] > 0 for record in row] == [True, False, True, True, False]
        assert row[4]["selected_token_pos"] == row[3]["selected_token_pos"]
    config = tiny_config(tmp_path, indexer_types=["full", "shared", "full", "shared"])
    command = ["estimate", "--config", str(config), "--steps", "4", "--batch", "1", "--context", "64"]
    assert cli.main(command) == 0
    assert "4 layers" in capsys.readouterr().out


def test_two_ranks_serve_it(tmp_path: Path) -> None:
    """Each rank holds half the heads; the digest compares what both chose, layer by layer."""
    call_on_ranks(2, _serve_on_a_rank, str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first == second
    assert verify(tmp_path / "run").state == "complete"
    assert RunReader(tmp_path / "run").manifest["world_size"] == 2
    for row in by_row(tmp_path / "run"):
        for layer, source in SHARED.items():
            assert row[layer]["selected_token_pos"] == row[source]["selected_token_pos"]


def _serve_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = random_model(ARGS)
    out = Path(folder) / "run" if rank == 0 else None
    answers = serve(model, out, limit=2, traced=True)
    (Path(folder) / f"rank{rank}").write_text(json.dumps(answers))
    dist.destroy_process_group()


def test_sharing_is_told_by_source_layers() -> None:
    assert shared_layers(ARGS.source_layers) == SHARED
    assert shared_layers(SMALL.source_layers) == {}
