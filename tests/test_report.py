"""The report: tables beside their baselines, the picture, and a clear word when the folder is no run."""

from __future__ import annotations

import io
import json
import re
import struct

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from conftest import INFERENCE, ROOT
from dsatrace import cli
from dsatrace.commands.generate import main as generate
from dsatrace.report.figure import PANELS
from dsatrace.report.run_subject import RunSubject
from dsatrace.report.tables import sink_shares
from dsatrace.report.tier_tables import tier_tables
from dsatrace.report.workload_tables import workload_tables
from dsatrace.trace.rates import RATES, run_words
from dsatrace.trace.reader import RunReader
from dsatrace.units import size_text
from helpers.command_runs import told_error
from helpers.golden_run import SERVING, write_golden
from helpers.tier_samples import SETUPS
from test_trace_requests import serve_without_steps


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """Two prompts, the second with the first one's beginning."""
    folder = tmp_path_factory.mktemp("report")
    prompt = "The tide pulled back and left its usual collection of rope. " * 5
    (folder / "prompts.txt").write_text(f"{prompt}\n\n{prompt}And then?\n")
    model = ["--ckpt-path", str(tiny_checkpoint), "--config", str(INFERENCE / "config_tiny.json")]
    flags = [*model, "--max-new-tokens", "6", "--temperature", "0"]
    files = ["--input-file", str(folder / "prompts.txt"), "--trace-out", str(folder / "run")]
    assert generate([*flags, *files]) == 0
    return folder / "run"


def report(capsys, folder, *flags):
    """What the command prints."""
    assert cli.main(["report", str(folder), *flags]) == 0
    return capsys.readouterr().out


def golden_run(folder, more=(), **options):
    """A run without the cost of tracing, and its summary; `more` is added to that."""
    write_golden(folder, **options)
    summary = json.loads((folder / "summary.json").read_text()) | {"tracing_cost": None} | dict(more)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder, summary


def test_tables_say_what_the_summary_says(run, capsys):
    out = report(capsys, run, "--no-figure")
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["blocks_touched"]:
        line = next(line for line in out.splitlines() if f"{row['block_size_tokens']} tokens" in line)
        for key in ("mean", "uniform_mean", "recency_mean", "context_mean"):
            assert f"{row[key]:.1f}" in line
    assert f"{summary['step_overlap']['mean']:.1%}" in out
    assert "weights are random" in out
    hottest = summary["prefix_hot_blocks"]["r1"][0]
    assert f"{hottest['block_id']} ({hottest['touches']}x)" in out
    assert size_text(summary["bytes_read"]["indexer_scan"]) in out
    assert not (run / "report.png").exists()


def test_the_picture_is_a_png_of_some_size(run, capsys):
    report(capsys, run, "--layer", "1")
    width, height = picture_size(run)
    assert width > 1000
    assert height > 700


def picture_size(folder):
    """Width and height of its report.png, in pixels."""
    data = (folder / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_a_workloads_tables_and_panels(tmp_path, capsys):
    workload = {"name": "demo", "bad_rows": {"too_long": 3}}
    folder, summary = golden_run(tmp_path / "run", {"workload": workload}, serving=SERVING)
    out = report(capsys, folder)
    recall, serving = summary["needle_recall"], summary["serving"]
    for share in recall["per_layer"]:
        assert f"{share:.1%}" in out
    assert f"{recall['random_mean']:.1%}" in out
    assert "task task 1" in out
    assert f"{100 / 3:.2f}" in out
    assert "times of the virtual clock" in out
    for name in ("latency_ms", "time_to_first_token_ms", "time_per_output_token_ms", "queue_ms"):
        assert f"{serving[name]['p50']:,.1f}" in out
    assert "bad_rows too_long" in out
    assert picture_size(folder)[1] > 1500  # four rows of panels


def test_a_run_without_steps_is_shown_as_far_as_it_goes(tmp_path, capsys):
    serve_without_steps(tmp_path)
    out = report(capsys, tmp_path)
    assert "No step was recorded" in out
    assert "1 served, 1 rejected" in out
    assert picture_size(tmp_path)[1] < 700  # one row
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"serving": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "picture" not in report(capsys, tmp_path)


@pytest.mark.parametrize("damage", ["absent", "not json", "no run"])
def test_a_folder_that_is_no_run_is_named(tmp_path, capsys, damage):
    if damage == "not json":
        (tmp_path / "manifest.json").write_text("{")
    if damage == "no run":
        (tmp_path / "manifest.json").write_text("{}")
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path) in error
    assert error.count("\n") == 1


STUDIES = {
    "run": ("--min-turns", 2, "--runner", "engine", "--output-file", "mine.json"),
    "compare": ("--num-blocks", 40),
    "explain": (),
    "sweep": ("--workloads", "qa", "--num-requests", 20, "--capacities", 64, "--policies", "lru"),
    "mixed": ("--num-requests", 20, "--policies", "lru", "fifo", "--seeds", 2),
}


@pytest.mark.parametrize("verb", STUDIES)
def test_a_studys_folder_shows_what_the_study_printed(verb, tmp_path, capsys):
    def tables(text):
        lines = text.splitlines()
        return [line for line in lines if line[:1] in tuple("┏┃┡│└├┌")]

    flags = [str(flag) for flag in STUDIES[verb]]
    pictures = [] if verb == "explain" else ["--skip-visualization"]
    assert cli.main(["study", verb, *flags, *pictures, "--output-dir", str(tmp_path / "out")]) == 0
    printed = tables(capsys.readouterr().out)
    shown = report(capsys, tmp_path / "out")
    assert len(printed) > 3
    assert tables(shown) == printed
    assert shown.startswith(f"study {verb}, complete, started ")


def test_a_study_without_a_table_and_a_damaged_one(tmp_path, capsys):
    assert cli.main(["study", "prepare", "--output-dir", str(tmp_path / "traces")]) == 0
    capsys.readouterr()
    assert "There is no table" in report(capsys, tmp_path / "traces")
    for flags in (("--panel", "map"), ("--format", "pdf"), ("--layer", "1")):
        line = told_error(capsys, lambda flags=flags: cli.main(["report", str(tmp_path / "traces"), *flags]))
        assert line.startswith(f"error: {flags[0]}: ") or "no such panel" in line
        assert "a study, which drew its pictures when it ran" in line
    for damage in ('{"cells": [{"workload": "qa"}]}', '{"definitions": 3, "cache": 1}', "[]", "{"):
        (tmp_path / "traces" / "sweep.json").write_text(damage)
        line = told_error(capsys, lambda: cli.main(["report", str(tmp_path / "traces")]))
        assert str(tmp_path / "traces" / "sweep.json") in line


def test_the_command_lists_its_verbs_and_refuses_others(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in cli.VERBS)
    assert cli.main(["frobnicate"]) == 2
    assert "no verb 'frobnicate'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(verb, capsys):
    try:
        code = cli.main([verb, "--help"])  # a verb with verbs of its own returns
    except SystemExit as ended:  # argparse leaves
        code = ended.code
    assert code == 0
    assert "usage" in capsys.readouterr().out


def test_the_prefix_cache_shows_what_it_saved():
    cache = {
        "prompt_tokens": 200, "hit_tokens": 50, "hit_rate": 0.25, "computed_tokens": 150,
        "prefill_s": 3.0, "saved_s": 1.0, "saved_kind": "modelled",
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    for part in workload_tables({"prefix_cache": cache}):
        console.print(part)
    shown = console.file.getvalue()
    assert "50 of 200" in shown
    assert "25.0%" in shown
    assert "saved, modelled" in shown


def test_sinks_and_the_recent_window_are_counted_by_layer(tmp_path):
    records = [
        {"layer_id": 1, "seq_len_current": 400, "phase": "decode", "path": "sparse",
         "selected_token_pos": [0, 15, 16, 335, 336, 399]},
        {"layer_id": 0, "seq_len_current": 100, "phase": "decode", "path": "sparse",
         "selected_token_pos": [99, 98]},
        {"layer_id": 0, "seq_len_current": 2, "phase": "decode", "path": "dense",
         "selected_token_pos": [0, 1]},
        {"layer_id": 0, "seq_len_current": 100, "phase": "prefill", "path": "sparse",
         "selected_token_pos": [0]},
    ]  # fmt: skip

    class Run:
        def steps(self, fields):
            return iter(records)

    assert sink_shares(Run()) == {
        0: [0, 16 / 100, 1, 64 / 100, 1],
        1: [2 / 6, 16 / 400, 2 / 6, 64 / 400, 1],
    }


@pytest.mark.parametrize("name", SETUPS)
def test_where_the_selected_kv_was(tmp_path, capsys, name):
    folder, summary = golden_run(tmp_path / "run", tiers=SETUPS[name])
    out = report(capsys, folder, "--no-figure")
    total = summary["kv_fetch"]["hbm"]["requested_tokens"]
    for tier, fetched in summary["kv_fetch"].items():
        if tier != "hbm" and tier not in SETUPS[name].pools:
            assert tier.replace("_", " ") not in out
            continue
        assert f"{fetched['hit_tokens'] / total:.1%}" in out
        assert f"{fetched['bytes_read'] / fetched['bytes_useful']:.2f}x" in out
        assert f"{fetched['evicted_units']:,}" in out
    for tier, pool in SETUPS[name].pools.items():
        said = summary["tiers"][tier]
        assert f"{said['read_us'] / said['read_batches']:,.1f} us, {pool.latency_kind}" in out
    assert "secret" not in out
    assert "latents read, all tiers" in out
    assert "66.7% of them selected, which were 66.7% of what HBM lacked" in " ".join(out.split())


@pytest.mark.parametrize("name", SETUPS)
def test_the_bars_of_tiers_are_their_shares(tmp_path, name):
    subject = RunSubject(RunReader(write_golden(tmp_path / "run", tiers=SETUPS[name])))
    fetched = subject.summary["kv_fetch"]
    found, moved = Figure().subplots(2)
    PANELS["found"].draw(found, subject)
    bars = found.containers
    pools = [pool.replace("_", " ") for pool in SETUPS[name].pools]
    assert [bar.get_label() for bar in bars] == ["HBM", *pools]
    tokens = [tier["hit_tokens"] for tier in fetched.values() if tier["requested_tokens"]]
    assert [bar[0].get_width() for bar in bars] == pytest.approx([n / sum(tokens) for n in tokens])
    for measure in zip(*bars, strict=True):
        assert sum(part.get_width() for part in measure) == pytest.approx(1)
    PANELS["moved"].draw(moved, subject)
    shown = [text.get_text() for text in moved.texts]
    read, written = [fetched[pool] for pool in SETUPS[name].pools], [fetched["hbm"]]
    expected = [f"{one['bytes_read'] / 2**20:,.2f} MiB, {one['read_ops']:,} reads" for one in read]
    expected += [f"{one['bytes_written'] / 2**20:,.2f} MiB" for one in (*written, *read)]
    assert shown == expected


def test_every_hit_rate_has_one_name_and_the_summarys_number(tmp_path, capsys):
    """Of what it is and over which steps stands beside each, in words that are told once."""
    cache = {
        "prompt_tokens": 91, "hit_tokens": 28, "hit_rate": 28 / 91, "computed_tokens": 63,
        "prefill_s": 3.0, "saved_s": 1.0, "saved_kind": "modelled",
    }  # fmt: skip
    folder, summary = golden_run(tmp_path / "run", {"prefix_cache": cache}, tiers=SETUPS["block"])
    words = run_words(json.loads((folder / "manifest.json").read_text()))
    tables = json.loads(report(capsys, folder, "--json"))["tables"]

    def table(title):
        return next(table for table in tables if table["title"] == title)

    shares = {}
    for name, rate in RATES.items():
        hits, asked = rate.counts(summary)
        shares[name] = hits / asked
        assert 0 < hits < asked, name
    for name in ("tokens", "blocks"):
        over = RATES[name].over.format(**words)
        assert over == "recorded steps, prompts' last positions included"
        served = table(f"Where the selected KV was ({over})")
        (row,) = (row for row in served["rows"] if row[0] == RATES[name].of.format(**words))
        assert row[served["columns"].index("HBM")] == pytest.approx(shares[name])
    note = table("What the pools did (whole run)")["note"]
    assert f"{shares['units']:.1%} of the {RATES['units'].name(words)}" in note
    rows = dict(table(f"Prefix cache ({RATES['prompts'].over})")["rows"])
    assert rows["hit rate, of those prompt tokens"] == pytest.approx(shares["prompts"])
    assert len({rate.name(words) for rate in RATES.values()}) == len(RATES) == len(set(shares.values()))
    printed = " ".join(report(capsys, folder, "--no-figure").split())
    assert f"{shares['units']:.1%} of the {RATES['units'].name(words)}" in printed
    assert re.search(r"\d [kMGT]B\b", printed) is None


def test_sizes_are_in_binary_units_everywhere():
    """As on the terminal; rates of links stay in GB/s, and benchmarks.md what its tools measured in."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("*/*/README.md")]
    pages = [page for page in pages if page.name != "benchmarks.md"]
    decimal = re.compile(r"\d ?[kKMGT]B\b(?!/s)")
    lines = [(page.name, line) for page in pages for line in page.read_text("utf-8").splitlines()]
    assert len(lines) > 500
    assert [one for one in lines if decimal.search(one[1])] == []


def test_a_run_in_hbm_has_no_table_of_tiers(tmp_path, capsys):
    folder, summary = golden_run(tmp_path / "run")
    assert list(tier_tables({"tiers": None}, summary)) == list(tier_tables({}, summary)) == []
    assert "Where the selected KV was" not in report(capsys, folder, "--no-figure")
