"""The open trace in data/traces: a verified run of the model in data/models, small, and without a text."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from dsatrace.commands.report import main as report
from dsatrace.schema import MANIFEST_FILE, REQUESTS_FILE, STEPS_PARQUET_FILE, SUMMARY_FILE
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.json_lines import read_json_lines
from helpers.warm_python import warm_python

TRACE = ROOT / "data" / "traces" / "needle-2k"
FOLDERS = {"2k": 2048, "4k": 4096, "8k": 8192}
FILES = {MANIFEST_FILE, REQUESTS_FILE, SUMMARY_FILE, STEPS_PARQUET_FILE}
NUM_STEPS, NUM_LAYERS, TOP_K = 64, 4, 192


def test_it_is_small() -> None:
    assert {folder.name for folder in TRACE.iterdir() if folder.is_dir()} == set(FOLDERS)
    assert sum(file.stat().st_size for file in TRACE.rglob("*") if file.is_file()) <= 3_000_000


@pytest.mark.parametrize("name", FOLDERS)
def test_every_run_is_whole_and_verified(name: str) -> None:
    folder = TRACE / name
    assert {file.name for file in folder.iterdir()} == FILES
    done = verify(folder)
    assert (done.state, done.level, done.is_sealed, done.faults) == ("complete", "full", True, ())
    requests = read_json_lines(folder / REQUESTS_FILE)
    assert len(requests) >= 5
    assert done.num_records == len(requests) * (NUM_STEPS + 1) * NUM_LAYERS
    for line in requests:
        assert line["num_output_tokens"] == NUM_STEPS + 1 and line["answer_tokens"] < 10
        assert 0.9 * FOLDERS[name] < line["num_prompt_tokens"] <= FOLDERS[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_it_tells_what_was_run_and_no_text(name: str) -> None:
    folder = TRACE / name
    manifest = RunReader(folder).manifest
    assert manifest["model_config"]["index_topk"] == TOP_K
    assert manifest["answer_end"]["min_new_tokens"] == NUM_STEPS + 1
    assert manifest["trace"]["keep_order"] is True and manifest["trace"]["sample_rate"] == 1
    assert not any(argument.startswith("/") for argument in manifest["argv"])
    for line in read_json_lines(folder / REQUESTS_FILE):
        assert "text" not in line and "text_past_answer" not in line


def test_the_report_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(TRACE / "2k"), "--no-figure"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "decode steps past the answer" in out
    assert "156 sparse decode records, up to the answers' ends)" in out
    assert "│ 1 │ 59.8% │ 10.1% │" in out
    assert "past the answers: 15.9%, of 1892 records" in out


def test_the_selected_answer_is_that_of_the_answers_steps() -> None:
    run = RunReader(TRACE / "2k")
    ends = {line["request_id"]: line["answer_tokens"] for line in run.requests()}
    shares: dict[bool, list[float]] = {False: [], True: []}
    for record in run.steps():
        if record["layer_id"] == 1 and record["phase"] == "decode":
            needle = record["needle"]
            shares[record["step_idx"] >= ends[record["request_id"]]].append(
                needle["selected"] / needle["tokens"]
            )
    summary = run.summary()
    for name, found in (("needle_recall", shares[False]), ("needle_recall_past", shares[True])):
        assert summary[name]["per_layer"][1] == pytest.approx(sum(found) / len(found))
        assert summary[name]["records"] == NUM_LAYERS * len(found)


def test_the_readme_has_its_figures() -> None:
    text = (TRACE / "README.md").read_text(encoding="utf-8")
    past = [RunReader(TRACE / name).summary()["past_answer"] for name in FOLDERS]
    total, steps = (sum(one[key] for one in past) for key in ("past_steps", "decode_steps"))
    assert f"{total:,} of {steps:,} steps" in text
    for name in FOLDERS:
        summary = RunReader(TRACE / name).summary()
        size = (TRACE / name / STEPS_PARQUET_FILE).stat().st_size
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:5] == [
            f"{summary['counts']['requests']}",
            f"{summary['past_answer']['decode_steps']:,}",
            f"{summary['counts']['records']:,}",
        ]
        assert cells[5:] == [f"{size / 2**20:.2f} MiB", f"{summary['scores']['mean']:g}"]


def test_the_script_makes_such_runs(tmp_path: Path) -> None:
    env = {"VENV": "none", "RUNS": str(tmp_path / "runs"), "OUT": str(tmp_path / "out")}
    with warm_python() as path:
        done = subprocess.run(
            ["bash", "scripts/make_open_trace.sh"],
            cwd=ROOT,
            env=os.environ | env | {"LENGTHS": "1024", "PER_TASK": "1", "PATH": path},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "1k" / MANIFEST_FILE).read_text())
    assert made["state"] == "complete"
    assert made["trace"] | {"prefix_key_id": ""} == RunReader(TRACE / "2k").manifest["trace"] | {
        "prefix_key_id": ""
    }
    assert verify(tmp_path / "out" / "1k").num_records == 2 * (NUM_STEPS + 1) * NUM_LAYERS
