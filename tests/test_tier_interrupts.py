"""A run with KV in tiers that is stopped: nothing of it stays in a store, and it can be resumed."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dsatrace.commands.generate import main as generate
from dsatrace.commands.run_dataset import main
from dsatrace.engine.engine import Engine
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.checkpoints import tiny_config
from helpers.command_runs import recording
from helpers.forked import Started
from helpers.resume_samples import OF_THE_MOMENT, answers_of
from helpers.stores import valkey
from helpers.waiting import LIMIT_S, until

RULER = ("--dataset", "ruler", "--ruler-generate", "--ruler-length", 500, "--no-hub", "--max-new-tokens", 6)
ROWS = ("--cache-block-size", 16, "--hbm-blocks", 3, "--granularity", "row", "--max-batch-size", 2)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The flags of a model that selects 16 tokens."""
    config = tiny_config(tmp_path_factory.mktemp("tier_interrupts"), dtype="fp64", index_topk=16)
    return ("--ckpt-path", checkpoint, "--config", config, "--device", "cpu")


def run(*flags: object) -> int:
    return main([str(flag) for flag in flags])


def abort_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Ctrl-C in the midst of a run in this process, once."""
    step, done = Engine.step, iter(range(num_steps))

    def counted(self: Engine, next_arrival_ns: int | None = None) -> Any:
        if next(done, None) is None:
            monkeypatch.setattr(Engine, "step", step)
            signal.raise_signal(signal.SIGINT)
        return step(self, next_arrival_ns)

    monkeypatch.setattr(Engine, "step", counted)


def records(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By request, step and layer; without what depends on the moment, and on what lay in HBM then."""
    found = {}
    for record in RunReader(folder).steps():
        key = record["request_id"], record["step_idx"], record["layer_id"]
        left_out = (*OF_THE_MOMENT, "kv_fetch")
        found[key] = {name: value for name, value in record.items() if name not in left_out}
    return found


# ---- resume


@pytest.fixture(scope="module")
def undisturbed(
    model: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[object, ...], Path]:
    """The flags of a run, and what such a run recorded."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = (*model, *RULER, "--limit", 4, "--save-text", *ROWS, "--local", f"mmap:{folder}/units")
    flags = (*flags, "--prefetch", "previous-layer", "--offload-index-keys")
    assert run(*flags, "--trace-out", folder / "whole") == 0
    return flags, folder / "whole"


@pytest.mark.parametrize("num_steps", [5, 14])
def test_a_resumed_run_records_what_an_undisturbed_one_does(
    undisturbed: tuple[tuple[object, ...], Path],
    num_steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tiers of the second part are new and empty."""
    flags, whole = undisturbed
    folder = tmp_path / "run"
    abort_after(monkeypatch, num_steps)
    assert run(*flags, "--trace-out", folder) == 130
    stopped = RunReader(folder)
    assert stopped.state == "incomplete"
    assert stopped.summary()["tiers"]["local_pool"]["bytes_read"]["store"] > 0
    assert verify(folder).state == "incomplete"
    capsys.readouterr()
    assert run("--resume", folder) == 0
    assert "tiers: " in capsys.readouterr().out
    assert verify(folder).state == "complete"
    assert answers_of(folder) == answers_of(whole)
    texts = [{line["request_id"]: line["text"] for line in RunReader(f).requests()} for f in (folder, whole)]
    assert texts[0] == texts[1]
    assert records(folder) == records(whole)
    assert RunReader(folder).manifest["tiers"] == RunReader(whole).manifest["tiers"]
    (seam,) = RunReader(folder).manifest["resumed_at_forward"]
    assert RunReader(folder).summary()["tiers"]["since_forward"] == seam > 0


def test_a_password_is_asked_for_again(
    model: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with valkey("--requirepass", "hunter2") as server:
        folder, remote = tmp_path / "run", server.tcp.replace("://", "://default:hunter2@")
        abort_after(monkeypatch, 7)
        flags = (*model, *RULER, "--limit", 3, *ROWS, "--remote", remote)
        assert run(*flags, "--trace-out", folder) == 130
        written = b"".join(file.read_bytes() for file in folder.iterdir())
        assert b"hunter2" not in written
        capsys.readouterr()
        assert run("--resume", folder) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "does not keep the value of --remote; give it again beside --resume" in error
        assert RunReader(folder).state == "incomplete"
        assert run("--resume", folder, "--remote", remote) == 0
    assert verify(folder).state == "complete"


def test_other_tiers_cannot_go_on(
    model: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    abort_after(monkeypatch, 7)
    folder = tmp_path / "run"
    assert run(*model, *RULER, "--limit", 3, *ROWS, "--trace-out", folder) == 130
    capsys.readouterr()
    assert run("--resume", folder, "--hbm-blocks", 4) == 2
    assert "tiers.hbm.blocks was 3 and is 4 now; give the same tiers" in capsys.readouterr().err
    assert run("--resume", folder) == 0


# ---- signals


def test_ctrl_c_ends_generate_with_what_tiers_did(
    model: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("The lighthouse keeper counted 41 ships. " * 10)
    abort_after(monkeypatch, 6)
    flags = (*model, "--input-file", prompts, "--max-new-tokens", 20, *ROWS, "--trace-out", folder)
    assert generate([str(flag) for flag in flags]) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("tiers: ")
    assert err.splitlines()[-1] == "interrupted"
    assert RunReader(folder).state == "incomplete"
    assert RunReader(folder).summary()["tiers"]["local_pool"]["stored_units"] > 0


def started(folder: Path, *flags: object) -> contextlib.AbstractContextManager[Started]:
    """A process of `run_dataset` that has recorded a few steps."""
    process = Started((*flags, "--trace-out", folder), folder.with_name(f"{folder.name}.said"))
    return recording(process, folder)


MANY = ("--limit", 40, "--max-new-tokens", 200)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_leaves_no_key_and_a_whole_summary(
    model: tuple[object, ...], number: signal.Signals, tmp_path: Path
) -> None:
    redis = pytest.importorskip("redis", reason="redis-py counts the server's keys")
    folder = tmp_path / "run"
    with valkey() as server, redis.Redis.from_url(server.tcp) as client:
        with started(folder, *model, *RULER, *MANY, *ROWS, "--remote", server.tcp) as process:
            assert client.dbsize() > 0
            process.send_signal(number)
            out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, (out, err)
        assert client.dbsize() == 0
    assert "tiers: " in out
    assert f"interrupted; go on with --resume {folder}" in err
    assert "Traceback" not in err
    assert RunReader(folder).state == "incomplete"
    assert verify(folder).state == "incomplete"
    assert RunReader(folder).summary()["tiers"]["remote_pool"]["bytes_read"]["store"] > 0


def test_a_live_run_keeps_its_units_and_a_killed_one_none(model: tuple[object, ...], tmp_path: Path) -> None:
    """The first lives longer than the time to live of its units; the second gets no chance to drop them."""
    redis = pytest.importorskip("redis", reason="redis-py counts the server's keys")
    ttl_s = 3
    with valkey() as server, redis.Redis.from_url(server.tcp) as client:
        flags = (*model, *RULER, *MANY, *ROWS, "--remote", f"{server.tcp}?ttl_s={ttl_s}")
        with started(tmp_path / "live", *flags) as process:
            end = time.monotonic() + 1.2 * ttl_s
            while time.monotonic() < end:  # three quarters of it stopped: units grow old, requests do not end
                for number, seconds in ((signal.SIGSTOP, 0.15), (signal.SIGCONT, 0.05)):
                    process.send_signal(number)
                    time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, (out, err)
        tiers = RunReader(tmp_path / "live").summary()["tiers"]
        assert tiers["remote_pool"]["hit_units"] > 0
        assert (tiers["remote_pool"]["missed_units"], tiers["lost_units"], tiers["num_recomputes"]) == (
            0,
            0,
            0,
        )
        assert client.dbsize() == 0
        with started(tmp_path / "killed", *flags) as process:
            process.kill()
            process.communicate(timeout=LIMIT_S)
        assert client.dbsize() > 0
        until(lambda: client.dbsize() == 0)
        assert client.info("stats")["expired_keys"] > 0
        assert verify(tmp_path / "killed").state == "incomplete"


@pytest.mark.parametrize("store", ["mmap", "file"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_file_is_left_behind(
    model: tuple[object, ...], number: signal.Signals, store: str, tmp_path: Path
) -> None:
    """Nor is there one to be seen while the run goes on: it has lost its name."""
    units = tmp_path / "units"
    units.mkdir()
    folder = tmp_path / "run"
    with started(folder, *model, *RULER, *MANY, *ROWS, "--local", f"{store}:{units}/kv") as process:
        assert list(units.iterdir()) == []
        process.send_signal(number)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    assert list(units.iterdir()) == []
    assert RunReader(folder).state == "incomplete"
    assert verify(folder).state == "incomplete"
