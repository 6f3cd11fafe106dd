"""The report: tables beside their baselines, the picture, and a clear word when the folder is no run."""

from __future__ import annotations

import json
import struct

import pytest

from conftest import INFERENCE
from dsatrace import cli
from dsatrace.commands.generate import main as generate


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """Two prompts, the second with the first one's beginning."""
    folder = tmp_path_factory.mktemp("report")
    prompt = "The tide pulled back and left its usual collection of rope. " * 5
    (folder / "prompts.txt").write_text(f"{prompt}\n\n{prompt}And then?\n")
    config = str(INFERENCE / "config_tiny.json")
    flags = [
        "--ckpt-path",
        str(tiny_checkpoint),
        "--config",
        config,
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
    ]
    files = ["--input-file", str(folder / "prompts.txt"), "--trace-out", str(folder / "run")]
    assert generate([*flags, *files]) == 0
    return folder / "run"


def test_tables_say_what_the_summary_says(run, capsys):
    assert cli.main(["report", str(run), "--no-figure"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["blocks_touched"]:
        line = next(line for line in out.splitlines() if f"{row['block_size_tokens']} tokens" in line)
        for key in ("mean", "uniform_mean", "recency_mean", "context_mean"):
            assert f"{row[key]:.1f}" in line
    assert f"{summary['step_overlap']['mean']:.1%}" in out
    assert "weights are random" in out
    hottest = summary["prefix_hot_blocks"]["r1"][0]
    assert f"{hottest['block_id']} ({hottest['touches']}x)" in out
    assert f"{summary['bytes_read']['indexer_scan'] / 1e6:,.2f}" in out
    assert not (run / "report.png").exists()


def test_the_picture_is_a_png_of_some_size(run):
    assert cli.main(["report", str(run), "--layer", "1"]) == 0
    data = (run / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 700


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


def test_the_command_lists_its_verbs_and_refuses_others(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in cli.VERBS)
    assert cli.main(["frobnicate"]) == 2
    assert "no verb 'frobnicate'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out
