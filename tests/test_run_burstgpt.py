"""`run_burstgpt.py` on the tiny checkpoint: arrivals, clocks, serving modes, latencies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import INFERENCE
from dsatrace.commands.run_burstgpt import main
from dsatrace.model.convert import convert_checkpoint
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.command_runs import runs_below
from helpers.json_lines import read_json_lines
from helpers.ranks import on_ranks
from helpers.real_data import real_file

CONFIG = INFERENCE / "config_tiny.json"
HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"

Run = Callable[..., Path]


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Run:
    return runs_below(tmp_path, main, "--ckpt-path", tiny_checkpoint, "--config", CONFIG, "--no-hub")


def requests(folder: Path) -> dict[str, dict[str, Any]]:
    return {record["request_id"]: record for record in read_json_lines(folder / "requests.jsonl")}


def log(tmp_path: Path, *rows: tuple[float, int, int]) -> Path:
    file = tmp_path / "log.csv"
    lines = (f"{t},ChatGPT,{asked},{said},{asked + said},API log\n" for t, asked, said in rows)
    file.write_text(HEADER + "".join(lines))
    return file


def test_the_embedded_sample_is_served_on_a_virtual_clock(run: Run) -> None:
    folder = run("--limit", 8)
    assert verify(folder).state == "complete"
    manifest, summary = RunReader(folder).manifest, RunReader(folder).summary()
    assert manifest["data_source"].startswith("embedded burstgpt_sample.csv")
    assert manifest["serving"] == {
        "mode": "fifo-batch", "clock": "virtual", "max_batch_size": 8, "step_time": "measured",
    }  # fmt: skip
    serving = summary["serving"]
    assert serving["counts"]["served"] == 8
    latencies = sorted(r["finish_s"] - r["arrival_s"] for r in requests(folder).values())
    assert serving["latency_ms"]["max"] == pytest.approx(latencies[-1] * 1e3, abs=1e-3)
    assert serving["latency_ms"]["p50"] == pytest.approx(latencies[3] * 1e3, abs=1e-3)


def test_lengths_are_the_logs_and_the_cap_holds(run: Run, tmp_path: Path) -> None:
    file = log(tmp_path, (5, 30, 3), (6, 200, 40), (6, 7, 0))
    served = requests(run("--burstgpt-csv", file, "--max-new-tokens-cap", 10))
    assert {i: (r["num_prompt_tokens"], r["num_output_tokens"]) for i, r in served.items()} == {
        "row0": (30, 3),
        "row1": (200, 10),
    }
    kept = requests(run("--burstgpt-csv", file, "--max-new-tokens-cap", 10, "--keep-failures"))
    assert kept["row2"]["num_output_tokens"] == 1


def test_the_virtual_clock_skips_a_gap(run: Run, tmp_path: Path) -> None:
    served = requests(run("--burstgpt-csv", log(tmp_path, (100, 20, 2), (86_500, 20, 2))))
    assert served["row1"]["arrival_s"] == 86_400
    assert 86_400 < served["row1"]["finish_s"] < 86_460
    assert served["row1"]["admitted_s"] == 86_400


def test_the_real_clock_waits(run: Run, tmp_path: Path) -> None:
    file = log(tmp_path, (0, 20, 2), (10, 20, 2))
    served = requests(run("--burstgpt-csv", file, "--time-scale", 0.1, "--clock", "real"))
    assert served["row1"]["arrival_s"] == 1
    assert served["row1"]["admitted_s"] >= 1


def test_only_fifo_batch_waits_for_the_batch(run: Run, tmp_path: Path) -> None:
    file = log(tmp_path, (0, 20, 2), (0, 20, 30), (0, 20, 2))
    flags = ("--burstgpt-csv", file, "--batch-size", 2)
    fifo = requests(run(*flags, "--serving", "fifo-batch"))
    assert fifo["row2"]["admitted_s"] >= fifo["row1"]["finish_s"]
    continuous = requests(run(*flags, "--serving", "continuous"))
    assert continuous["row2"]["admitted_s"] < continuous["row1"]["finish_s"]


def test_a_small_cache_preempts_and_still_serves_everyone(run: Run, tmp_path: Path) -> None:
    file = log(tmp_path, *((0, 24, 24) for _ in range(4)))
    flags = ("--burstgpt-csv", file, "--serving", "continuous", "--cache-block-size", 16)
    folder = run(*flags, "--cache-blocks", 6)  # of 12 that the four need
    assert RunReader(folder).summary()["serving"]["counts"]["preemptions"] > 0
    assert verify(folder).state == "complete"
    assert {i: r["num_output_tokens"] for i, r in requests(folder).items()} == {
        f"row{i}": 24 for i in range(4)
    }


def test_generated_arrivals_say_their_parameters(run: Run, capsys: Any) -> None:
    flags = ("--burstgpt-generate", "--limit", 5, "--max-request-tokens", 64, "--max-response-tokens", 4)
    folder = run(*flags, "--seed", 3)
    assert "zipf_exponent 1.1" in capsys.readouterr().out
    assert len(requests(folder)) == 5
    again = requests(run(*flags, "--seed", 3))
    length = "num_prompt_tokens"
    assert {i: r[length] for i, r in requests(folder).items()} == {i: r[length] for i, r in again.items()}


def test_sessions_share_prefixes(run: Run) -> None:
    flags = ("--limit", 12, "--batch-size", 1, "--max-new-tokens-cap", 2, "--kv-block-size", 4)
    shares = [
        RunReader(run(*flags, "--shared-prefix-share", share)).summary()["prefix_intersection_ratio"]["max"]
        for share in (0.9, 0)
    ]
    assert shares[0] > 0
    assert shares[1] == 0


@pytest.mark.parametrize("runner", ["model", "simulator"])
@pytest.mark.parametrize("name", ["BurstGPT_1_head400.csv", "BurstGPT_3_head105.csv"])
def test_real_logs_of_both_layouts(run: Run, name: str, runner: str) -> None:
    flags = ("--burstgpt-csv", real_file(f"burstgpt/{name}"), "--limit", 3, "--max-new-tokens-cap", 4)
    folder = run(*flags, "--runner", runner)
    step_time = {"model": "measured", "simulator": "modelled"}[runner]
    assert RunReader(folder).manifest["serving"]["step_time"] == step_time
    assert len(requests(folder)) == 3
    assert verify(folder).state == "complete"


def test_two_ranks_agree_on_arrivals(tiny_hf: Path, tiny_args: Any, tmp_path: Path) -> None:
    """Each rank measures other step times; rank 0's clock decides who has arrived."""
    converted = tmp_path / "mp2"
    convert_checkpoint(tiny_hf, converted, tiny_args.n_routed_experts, model_parallel=2)
    flags = ("--limit", "10", "--serving", "continuous", "--time-scale", "0.05", "--max-new-tokens-cap", "6")
    where = ("--ckpt-path", converted, "--config", CONFIG, "--trace-out", tmp_path / "two", "--no-hub")
    done = on_ranks(2, "run_burstgpt", (*where, *flags), tmp_path / "said")
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "two").state == "complete"
    assert RunReader(tmp_path / "two").summary()["serving"]["counts"]["served"] == 10


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--burstgpt-csv", "nowhere.csv"), "nowhere.csv"),
        (("--time-scale", -1), "time_scale"),
        (("--max-new-tokens-cap", 0), "--max-new-tokens-cap"),
        (("--shared-prefix-share", 2), "shared_share"),
        (("--burstgpt-generate", "--gap-shape", 0), "gap_shape"),
        (("--limit", -4), "--limit"),
    ],
)
def test_a_mistake_is_one_clear_line(run: Run, capsys: Any, flags: tuple[object, ...], said: str) -> None:
    run(*flags, code=2)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert error.startswith("error: ")
    assert said in error
