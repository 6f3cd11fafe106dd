"""The commands with KV in tiers: the same answers, what users are told, and what they get wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.generate import main as generate
from dsatrace.commands.run_burstgpt import main as run_burstgpt
from dsatrace.commands.run_dataset import main as run_dataset
from dsatrace.schema import MANIFEST_FIELDS, problems
from dsatrace.trace.reader import RunReader
from dsatrace.units import size_text
from dsatrace.verify.run import verify
from helpers.checkpoints import tiny_config
from helpers.command_runs import selections, told_error
from helpers.stores import free_port, valkey

PROMPTS = ("The lighthouse keeper counted 41 ships. " * 10, "Which ship was the last?")
TOP_K = 16
TIERS = ("--cache-block-size", 16, "--max-batch-size", 2, "--hbm-blocks", 20)
ROWS = ("--cache-block-size", 16, "--max-batch-size", 2, "--hbm-blocks", 3, "--granularity", "row")
RULER = ("--dataset", "ruler", "--ruler-generate", "--ruler-length", 500, "--limit", 2, "--no-hub")
LOG = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
0,ChatGPT,200,4,204,API log
0,ChatGPT,360,4,364,API log
"""
SHARE = (
    r"tiers: (\d+\.\d) % of the selected (blocks of 16 tokens|rows of one token) found in HBM "
    r"\(whole run, prefill included\); "
)
FULL = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
"""Of a server that takes nothing: it needs as much for itself."""

Call = Callable[..., int]
COMMANDS = ("generate", "run_dataset", "run_burstgpt")


@pytest.fixture(scope="module")
def call(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Call:
    """`call(command, trace_out, *flags)` on a small workload; returns the exit code."""
    folder = tmp_path_factory.mktemp("asked")
    config = tiny_config(folder, index_topk=TOP_K)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS))
    log = folder / "log.csv"
    log.write_text(LOG)
    workloads: dict[str, tuple[Callable[..., int], tuple[object, ...]]] = {
        "generate": (generate, ("--input-file", prompts, "--max-new-tokens", 6, "--temperature", 0)),
        "run_dataset": (run_dataset, (*RULER, "--max-new-tokens", 4, "--save-text")),
        "run_burstgpt": (run_burstgpt, ("--burstgpt-csv", log)),
    }

    def call(command: str, out: Path, *flags: object) -> int:
        main, own = workloads[command]
        model = ("--ckpt-path", checkpoint, "--config", config, "--trace-out", out)
        return main([str(argument) for argument in (*model, *own, *flags)])

    return call


@pytest.fixture(scope="module")
def without_tiers(call: Call, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A command's run with all KV in HBM, and what it said."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(command: str) -> tuple[Path, str]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert call(command, folder / command, *TIERS[:4]) == 0
        return folder / command, said.getvalue()

    return run


def ends(folder: Path) -> list[tuple[str, str, int, str | None]]:
    return sorted(
        (line["request_id"], line["state"], line["num_output_tokens"], line.get("text"))
        for line in RunReader(folder).requests()
    )


# ---- the same answers


@pytest.mark.parametrize("flags", [TIERS, ROWS], ids=["block", "row"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_answers_and_a_line_of_what_tiers_did(
    command: str,
    flags: tuple[object, ...],
    call: Call,
    without_tiers: Callable[[str], tuple[Path, str]],
    tmp_path: Path,
    capsys: Any,
) -> None:
    if command != "generate" and flags is TIERS:
        flags = (*flags, "--hbm-blocks", 2 * TOP_K)
    assert flags[:4] == TIERS[:4]
    folder, whole = without_tiers(command)
    assert call(command, tmp_path / "tiers", *flags) == 0
    said = capsys.readouterr().out
    assert "tiers:" not in whole
    assert [line for line in said.splitlines() if line.startswith("[r")] == [
        line for line in whole.splitlines() if line.startswith("[r")
    ]
    (told,) = [line for line in said.splitlines() if line.startswith("tiers:")]
    shown = re.match(SHARE + r"local pool (.*) read, (.*) written in [\d.e-]+ s$", told)
    summary = RunReader(tmp_path / "tiers").summary()
    units, pool = summary["tiers"]["selected_units"], summary["tiers"]["local_pool"]
    assert shown is not None
    assert shown[1] == f"{100 * units['hit_units'] / units['requested_units']:.1f}"
    assert shown[3] == size_text(pool["bytes_read"]["store"])
    assert shown[4] == size_text(pool["bytes_written"]["store"])
    assert selections(tmp_path / "tiers") == selections(folder)
    assert ends(tmp_path / "tiers") == ends(folder)
    assert verify(tmp_path / "tiers").state == "complete"
    manifest = RunReader(tmp_path / "tiers").manifest
    assert "failed_requests" not in manifest
    assert manifest["tiers"]["granularity"] == ("row" if "row" in flags else "block")
    assert RunReader(tmp_path / "tiers").summary()["kv_fetch"]["local_pool"]["bytes_read"] > 0


def test_a_modelled_remote_pool_may_lie_in_ram(call: Call, tmp_path: Path, capsys: Any) -> None:
    remote = ("--local", "ram", "--local-blocks", 12, "--remote", "sim:rdma-400g+ram")
    assert call("generate", tmp_path / "run", *TIERS, *remote) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiers:"))
    assert re.search(r"local pool [^;]+ s; remote pool [^;]+ s \(modelled\)$", told)
    assert verify(tmp_path / "run").state == "complete"


# ---- failed requests


def test_a_failed_prompt_says_why_where_its_answer_would_stand(
    call: Call, tmp_path: Path, capsys: Any
) -> None:
    with valkey(*FULL) as server:
        failing = ("--remote", server.tcp, "--on-tier-error", "fail")
        assert call("generate", tmp_path / "run", *ROWS, *failing) == 1
    out, err = capsys.readouterr()
    answers = dict(re.findall(r"^\[(r\d)\] (.*)$", out, flags=re.MULTILINE))
    assert answers.keys() == {"r0", "r1"}
    assert re.match(
        r"error: request r0: a tier lost its KV: .*do not take what leaves HBM: they are full", answers["r0"]
    )
    num_failed = sum(answer.startswith("error: ") for answer in answers.values())
    assert f"error: {num_failed} of 2 prompts failed" in err
    assert "lost" in next(line for line in out.splitlines() if line.startswith("tiers:"))
    assert RunReader(tmp_path / "run").state == "complete"
    assert RunReader(tmp_path / "run").manifest["failed_requests"] == num_failed > 0
    assert verify(tmp_path / "run").state == "complete"


@pytest.mark.parametrize("command", ["run_dataset", "run_burstgpt"])
def test_a_workload_tells_its_first_failure_once(
    command: str, call: Call, tmp_path: Path, capsys: Any
) -> None:
    with valkey(*FULL) as server:
        failing = ("--remote", server.tcp, "--on-tier-error", "fail")
        assert call(command, tmp_path / "run", *ROWS, *failing) == 1
    out, err = capsys.readouterr()
    num_failed = sum(state == "failed" for _, state, *_ in ends(tmp_path / "run"))
    assert num_failed > 0
    assert f"{num_failed} failed" in out
    assert err.count("a tier lost its KV") == 1
    assert f"error: {num_failed} failed, the first: request " in err
    manifest = RunReader(tmp_path / "run").manifest
    assert (manifest["state"], manifest["failed_requests"]) == ("complete", num_failed)
    assert problems(manifest, fields=MANIFEST_FIELDS) == []
    assert verify(tmp_path / "run").state == "complete"


# ---- what users get wrong


def existing_file(folder: Path) -> tuple[object, ...]:
    (folder / "taken").write_bytes(b"precious")
    return ("--local", f"mmap:{folder}/taken")


def nobody_listens(folder: Path) -> tuple[object, ...]:
    return ("--remote", f"redis://me:hunter2@127.0.0.1:{free_port()}")


def flags(*values: object) -> Callable[[Path], tuple[object, ...]]:
    return lambda folder: values


MISTAKES: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    "unknown store": (flags("--local", "floppy"), "floppy: no such store; use one of ram, mmap:PATH"),
    "unknown remote store": (flags("--remote", "rediss://h"), "rediss://h: no such store"),
    "unknown preset": (flags("--remote", "sim:abacus+ram"), "no such preset"),
    "a file that exists": (existing_file, "exists already; name a file that does not"),
    "a folder that does not exist": (flags("--local", "file:/nowhere/kv"), "name a file in a folder"),
    "a server that is down": (nobody_listens, "start a server with `valkey-server --port"),
    "not an address": (flags("--remote", "redis://127.0.0.1:port"), "not an address"),
    "no block in HBM": (flags("--hbm-blocks", 0), "--hbm-blocks 0: use at least 1"),
    "hbm blocks not a number": (flags("--hbm-blocks", "all"), "--hbm-blocks"),
    "no local block": (flags("--local-blocks", 0), "--local-blocks 0: use at least 1"),
    "too few local blocks": (flags("--local-blocks", 2), "or add --remote"),
    "local blocks of no pool": (flags("--remote", "sim:rdma-400g+ram", "--local-blocks", 4), "--local ram"),
    "unknown policy": (flags("--tier-policy", "belady"), "--tier-policy belady: use one of"),
    "unknown granularity": (flags("--granularity", "page"), "--granularity"),
    "unknown guess": (flags("--prefetch", "oracle"), "--prefetch"),
    "unknown end": (flags("--on-tier-error", "ignore"), "--on-tier-error"),
    "no time": (flags("--tier-timeout-s", 0), "--tier-timeout-s 0.0: use a time above 0"),
    "time not a number": (flags("--tier-timeout-s", "nan"), "--tier-timeout-s nan"),
    "endless time": (flags("--tier-timeout-s", "inf"), "--tier-timeout-s inf"),
    "HBM too small": (flags("--hbm-blocks", 3), "HBM holds 3; use --hbm-blocks"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake: str, call: Call, tmp_path: Path, capsys: Any) -> None:
    wrong, expected = MISTAKES[mistake]
    told = told_error(capsys, lambda: call("generate", tmp_path / "run", *TIERS, *wrong(tmp_path)))
    assert expected in told
    assert "hunter2" not in told
    if mistake == "HBM too small":  # which only a step can tell
        assert RunReader(tmp_path / "run").state == "incomplete"
    else:
        assert not (tmp_path / "run").exists()
    if mistake == "a file that exists":
        assert (tmp_path / "taken").read_bytes() == b"precious"


def test_a_server_that_is_down_is_found_before_the_weights_are_read(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    weightless = tmp_path / "weightless"
    shutil.copytree(checkpoint, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    run = ("generate", tmp_path / "run", *TIERS, "--ckpt-path", weightless)
    assert "safetensors" in told_error(capsys, lambda: call(*run))
    (weightless / "model0-mp1.safetensors").touch()
    told = told_error(capsys, lambda: call(*run, *nobody_listens(tmp_path)))
    assert "start a server with" in told


GIVEN = (
    ("--hbm-blocks", 4),
    ("--local", "ram"),
    ("--local-blocks", 4),
    ("--remote", "redis://127.0.0.1"),
    ("--granularity", "row"),
    ("--tier-policy", "fifo"),
    ("--prefetch", "previous-layer"),
    ("--offload-index-keys",),
    ("--on-tier-error", "fail"),
    ("--tier-timeout-s", 1),
)


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given[0])
def test_the_simulator_and_hbm_alone_have_no_tiers(
    given: tuple[object, ...], call: Call, tmp_path: Path, capsys: Any
) -> None:
    flag, out = given[0], tmp_path / "run"
    simulated = told_error(capsys, lambda: call("run_dataset", out, "--runner", "simulator", *given))
    assert simulated == f"error: {flag} does nothing with --runner simulator, which moves no KV; leave it out"
    if flag != "--hbm-blocks":
        alone = told_error(capsys, lambda: call("run_dataset", out, *given))
        assert alone == f"error: {flag} does nothing without --hbm-blocks; add it"
    assert not out.exists()


# ---- resume


def test_the_flags_of_tiers_survive_in_the_manifest(call: Call, tmp_path: Path) -> None:
    from dsatrace.trace.resumed_argv import resumed_argv

    flags = (*ROWS, "--local", "ram", "--prefetch", "previous-step", "--offload-index-keys")
    flags += ("--tier-policy", "sieve", "--on-tier-error", "fail", "--tier-timeout-s", "2.5")
    assert call("run_dataset", tmp_path / "run", *flags, "--limit", 1) == 0
    kept = resumed_argv(tmp_path / "run")
    assert " ".join(map(str, flags)) in " ".join(kept)
    assert (
        json.loads((tmp_path / "run" / "manifest.json").read_text())["tiers"]["prefetch"] == "previous-step"
    )
