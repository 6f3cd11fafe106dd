"""Two ranks over gloo: the same tokens and selections as one, and a digest that notices when not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsatrace.errors import RankError, UserError, exits_cleanly
from dsatrace.model.convert import convert_checkpoint
from dsatrace.model.selection import Selection
from dsatrace.trace.observe import SelectionDigest, SelectionMismatch
from helpers.forked import call_on_ranks
from helpers.ranks import on_ranks

PROMPTS = "A ferry left the quay with hardly anyone on deck. " * 8 + "\n\nWhere to?\n"
COMPARED = ("request_id", "layer_id", "step_idx", "seq_len_current", "selected_token_pos")


@pytest.fixture(scope="module")
def two_ranks(tiny_hf, tiny_args):
    folder = tiny_hf.parent / "mp2"
    convert_checkpoint(tiny_hf, folder, tiny_args.n_routed_experts, model_parallel=2)
    return folder


@pytest.fixture(scope="module")
def fp64_config(tiny_args, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "fp64.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(tiny_args, dtype="fp64"))))
    return path


def generate(num_ranks: int, ckpt: Path, config: Path, out: Path, stdin: str = "", *flags: str):
    """Runs `generate`; what it says is kept beside `out`."""
    given = ["--ckpt-path", ckpt, "--config", config, "--temperature", 0, "--max-new-tokens", 12]
    argv = [*given, "--device", "cpu", "--trace-out", out, *flags]
    return on_ranks(num_ranks, "generate", argv, out.with_name(f"{out.name}.said"), stdin)


def answers(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if line.startswith("[r")]


def records(run: Path) -> list[dict]:
    lines = (run / "trace_steps.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in COMPARED} for line in lines]


def test_two_ranks_generate_and_select_what_one_does(tiny_checkpoint, two_ranks, fp64_config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    flags = ("--input-file", str(prompts))
    one = generate(1, tiny_checkpoint, fp64_config, tmp_path / "one", "", *flags)
    two = generate(2, two_ranks, fp64_config, tmp_path / "two", "", *flags)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert len(answers(one.stdout)) == 2
    assert answers(two.stdout) == answers(one.stdout)
    assert records(tmp_path / "two") == records(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["world_size"] == 2


def test_a_conversation_over_two_ranks(two_ranks, fp64_config, tmp_path):
    chat = generate(2, two_ranks, fp64_config, tmp_path / "chat", "Hello\nAgain\n/exit\n", "--interactive")
    assert chat.returncode == 0, chat.stderr
    assert {r["request_id"] for r in records(tmp_path / "chat")} == {"r0", "r1"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--interactive", "--no-such-flag"), "unrecognized arguments: --no-such-flag"),
        (("--interactive", "--prefill-chunk", "0"), "--prefill-chunk 0: use at least 1"),
        (("--input-file", "nowhere.txt"), "nowhere.txt: cannot read the prompts"),
    ],
)
def test_a_usage_error_is_printed_once(flags, says, tmp_path):
    done = generate(2, tmp_path, tmp_path / "config.json", tmp_path / "run", "", *flags)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert done.returncode != 0


@pytest.mark.parametrize(("error", "says"), [(UserError("mine"), ""), (RankError("mine"), "error: mine\n")])
def test_another_rank_leaves_a_usage_error_to_rank_0(error, says, monkeypatch, capsys):
    """It waits to be ended; what it alone has met it prints at once."""

    def ended_by_torchrun(seconds):
        raise SystemExit

    @exits_cleanly
    def fails():
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("dsatrace.errors.time.sleep", ended_by_torchrun)
    with contextlib.suppress(SystemExit):
        assert fails() == 2
    assert capsys.readouterr().err == says


def test_ranks_that_disagree_end_the_run(tmp_path):
    """Rank 1 chooses one other token in forward 6, layer 2: both ranks say so."""
    call_on_ranks(2, _disagree, str(tmp_path))
    for rank in range(2):
        message = (tmp_path / f"rank{rank}").read_text()
        assert "rank 1 selected other tokens than rank 0 in forward 6, layer 2" in message


def _disagree(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    digest = SelectionDigest(num_layers=3, device="cpu", interval=4)
    try:
        for step in range(8):
            for layer in range(3):
                positions = torch.arange(10).repeat(2, 1)
                if rank == 1:
                    positions = positions.flip(1)  # the order is no difference
                if rank == 1 and (step, layer) == (6, 2):
                    positions[1, 4] = 77
                unused = torch.zeros(2, 10)
                digest.on_select(layer, Selection(positions, unused, unused[:, 0], positions))
            digest.step_done()
        message = "no mismatch found"
    except SelectionMismatch as error:
        message = str(error)
    (Path(folder) / f"rank{rank}").write_text(message)
    dist.destroy_process_group()
