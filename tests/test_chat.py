"""`generate.py --interactive` on a pseudo-terminal, as a person uses it; with KV in tiers, too."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import INFERENCE
from dsatrace.commands import generate
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.forked import call
from helpers.ranks import on_ranks
from helpers.stores import valkey
from helpers.waiting import LIMIT_S, until, until_asleep

pexpect = pytest.importorskip("pexpect")
fdspawn = pytest.importorskip("pexpect.fdpexpect").fdspawn

PROMPT = ">>> "
CTRL_C, CTRL_D = b"\x03", b"\x04"
NEW_TOKENS = 12
CHAT_TOKENS = 4  # begin of sentence, user, assistant, end of thinking


def on_terminal(name: str, flags: list[str]) -> None:
    """A chat whose terminal this becomes, as of a process of its own."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first one that a session opens is the one it obeys
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(INFERENCE)
    sys.exit(generate.main(flags))


class Terminal:
    """A chat under way; what it prints is read up to the next prompt."""

    def __init__(self, checkpoint: Path, run: Path, max_new_tokens: int, *more: object) -> None:
        flags = ["--ckpt-path", checkpoint, "--config", "config_tiny.json", "--interactive"]
        flags += ["--max-new-tokens", max_new_tokens, "--temperature", 0, "--device", "cpu"]
        flags += ["--trace-out", run, *more]
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 1000, 0, 0))
        self.process = call(on_terminal, os.ttyname(theirs), list(map(str, flags)))
        until(lambda: Path(f"/proc/{self.process.pid}/fd/0").readlink() == Path(os.ttyname(theirs)))
        os.close(theirs)  # now the end of the process is the end of what can be read
        self.child = fdspawn(self._ours, encoding="utf-8", codec_errors="replace", timeout=LIMIT_S)
        self.child.delaybeforesend = None
        self.banner = self.expect_prompt()

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        os.close(self._ours)

    def expect_prompt(self) -> str:
        """What was printed before the prompt that now waits."""
        self.child.expect_exact(PROMPT)
        return self.child.before

    def settle(self) -> None:
        """Python sleeps in `input()`: a signal before that waits for a key."""
        until_asleep(self.process.pid)

    def say(self, line: str) -> str:
        """Sends a line and returns what is printed until the next prompt, without the line's echo."""
        self.child.sendline(line)
        return self.expect_prompt().removeprefix(line).strip("\r\n")

    def exit_code(self) -> int:
        self.child.expect(pexpect.EOF)
        self.process.join(LIMIT_S)
        self.last_words = self.child.before or ""
        assert "Traceback" not in self.last_words
        return self.process.exitcode


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def terminal(request: pytest.FixtureRequest, checkpoint: Path, run: Path) -> Iterator[Terminal]:
    """A chat whose answers are `request.param` tokens long."""
    terminal = Terminal(checkpoint, run, request.param)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("terminal", [NEW_TOKENS], indirect=True)
def test_a_conversation_grows_until_clear(terminal: Terminal, run: Path) -> None:
    opening, followup = "How many ships passed the lighthouse?", "And today?"
    answer = terminal.say(opening)
    assert re.fullmatch(rf"[a-z ]{{{NEW_TOKENS}}}", answer)
    assert terminal.say("") == ""
    assert terminal.say("   ").strip() == ""
    second = terminal.say(followup)
    assert re.fullmatch(rf"[a-z ]{{{NEW_TOKENS}}}", second)
    assert terminal.say("/clear") == "The conversation is forgotten."
    assert terminal.say(opening) == answer  # nothing is left of the conversation before
    terminal.child.sendline("/exit")
    assert terminal.exit_code() == 0
    assert terminal.last_words.strip().splitlines()[-1] == f"trace: {run}"

    trace = RunReader(run)
    assert trace.state == "complete"
    first_len = CHAT_TOKENS + len(opening)
    # The second prompt repeats the first turn, ends it, and adds one of its own.
    second_len = first_len + NEW_TOKENS + 1 + (CHAT_TOKENS - 1) + len(followup)
    turns = list(trace.requests())
    assert [turn["request_id"] for turn in turns] == ["r0", "r1", "r2"]
    assert [turn["num_prompt_tokens"] for turn in turns] == [first_len, second_len, first_len]
    assert {turn["num_output_tokens"] for turn in turns} == {NEW_TOKENS}
    assert {turn["state"] for turn in turns} == {"length"}

    begin = {r["request_id"]: r for r in trace.steps() if (r["step_idx"], r["layer_id"]) == (0, 0)}
    assert [begin[f"r{i}"]["seq_len_current"] for i in range(3)] == [
        first_len + 1,
        second_len + 1,
        first_len + 1,
    ]
    # A turn shares its prompt with the turn before; `/clear` ends the conversation, not the analyzer.
    block = trace.manifest["trace"]["block_size_tokens"]
    cached = [begin[f"r{i}"]["prefix"]["prefix_cached_blocks"] for i in range(3)]
    assert cached == [0, first_len // block, first_len // block]
    assert cached[1] > 0


@pytest.mark.parametrize("terminal", [NEW_TOKENS], indirect=True)
def test_a_slash_never_reaches_the_model(terminal: Terminal, checkpoint: Path, run: Path) -> None:
    assert f"Chat with {checkpoint}. /help lists the commands, /exit ends." in terminal.banner
    told = terminal.say("/help")
    assert all(name in told for name in ("/help", "/clear", "/exit"))
    assert terminal.say("/quit now") == "/quit is no command. /help lists the commands, /exit ends."
    assert terminal.say("/").startswith("/ is no command.")
    terminal.child.sendline("  /exit")
    assert terminal.exit_code() == 0
    assert not list(RunReader(run).requests())


def test_two_ranks_answer_as_one(tiny_hf: Path, tiny_args: ModelArgs, tmp_path: Path) -> None:
    """Rank 0 reads what is typed, the others follow it to the end; test_readme.py does it under torchrun."""
    convert_checkpoint(tiny_hf, tmp_path / "mp2", tiny_args.n_routed_experts, model_parallel=2)
    flags = ["--ckpt-path", tmp_path / "mp2", "--config", INFERENCE / "config_tiny.json", "--interactive"]
    flags += ["--device", "cpu", "--max-new-tokens", 5, "--temperature", 0, "--trace-out", tmp_path / "run"]
    typed = "How many ships?\n/nothing\n/clear\nAnd today?\n/exit\n"
    done = on_ranks(2, "generate", flags, tmp_path / "said", typed)
    assert done.returncode == 0, done.stderr
    for said in ("Chat with ", "/nothing is no command.", "is forgotten.", f"trace: {tmp_path / 'run'}"):
        assert done.stdout.count(said) == 1, done.stdout
    trace = RunReader(tmp_path / "run")
    assert (trace.state, trace.manifest["world_size"]) == ("complete", 2)
    assert [turn["request_id"] for turn in trace.requests()] == ["r0", "r1"]
    assert verify(tmp_path / "run").num_requests == 2


def test_thoughts_that_never_ended_are_shown_and_not_told_again(checkpoint: Path, run: Path) -> None:
    opening, followup = "What does </think> mean?", "And <think>?"
    terminal = Terminal(checkpoint, run, NEW_TOKENS, "--thinking")
    try:
        for line in (opening, followup):
            assert re.fullmatch(rf"[a-z ]{{{NEW_TOKENS}}}", terminal.say(line))
        terminal.child.sendline("/exit")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()
    first_len = CHAT_TOKENS + len(opening)
    second_len = first_len + 1 + (CHAT_TOKENS - 1) + len(followup)  # an empty answer, and its end
    assert [turn["num_prompt_tokens"] for turn in RunReader(run).requests()] == [first_len, second_len]


@pytest.mark.parametrize("terminal", [NEW_TOKENS], indirect=True)
def test_bytes_that_are_no_text_end_nothing(terminal: Terminal) -> None:
    terminal.press("Grüße\n".encode("latin-1"))
    assert re.search(rf"\n[a-z ]{{{NEW_TOKENS}}}\r\n$", terminal.expect_prompt())
    terminal.child.sendline("/exit")
    assert terminal.exit_code() == 0


@pytest.mark.parametrize("terminal", [20_000], indirect=True)
def test_ctrl_c_ends_an_answer_and_not_the_program(terminal: Terminal, run: Path) -> None:
    terminal.settle()
    terminal.press(CTRL_C)
    assert "/exit ends" in terminal.expect_prompt()

    terminal.child.sendline("Tell me everything.")
    terminal.child.expect(r"\n[a-z ]{20}")  # streamed: the answer is far from its end
    terminal.press(CTRL_C)
    assert terminal.expect_prompt().endswith(" [stopped]\r\n")

    terminal.settle()
    terminal.press(CTRL_C)
    assert "/exit ends" in terminal.expect_prompt()
    terminal.child.sendline("Go on.")
    terminal.child.expect(r"\n[a-z ]{20}")
    terminal.press(CTRL_C)
    assert terminal.expect_prompt().endswith(" [stopped]\r\n")
    terminal.press(CTRL_D)
    assert terminal.exit_code() == 0

    trace = RunReader(run)
    assert trace.state == "complete"
    turns = list(trace.requests())
    assert [turn["state"] for turn in turns] == ["aborted", "aborted"]
    first, second = (turn["num_prompt_tokens"] for turn in turns)
    answered = turns[0]["num_output_tokens"]
    assert 20 <= answered < 20_000
    # What was said before Ctrl-C stays in the conversation.
    assert second == first + answered + 1 + (CHAT_TOKENS - 1) + len("Go on.")
    steps = [r["step_idx"] for r in trace.steps() if r["request_id"] == "r0" and r["layer_id"] == 0]
    assert steps == list(range(len(steps)))
    # The step under way when Ctrl-C came is finished: each token but the prompt's has its records.
    assert len(steps) == answered - 1


ROWS = ("--cache-block-size", 16, "--max-seq-len", 2048, "--hbm-blocks", 9, "--granularity", "row")
STORY = "The lighthouse keeper counted 41 ships. " * 5


def test_a_store_that_dies_fails_an_answer_and_not_the_program(checkpoint: Path, run: Path) -> None:
    with valkey() as server:
        flags = (*ROWS, "--remote", server.tcp, "--on-tier-error", "fail")
        terminal = Terminal(checkpoint, run, NEW_TOKENS, *flags)
        try:
            answer = terminal.say(STORY)
            assert re.fullmatch(rf"[a-z ]{{{NEW_TOKENS}}}", answer)
            server.kill()
            failed = terminal.say(STORY)
            assert re.search(r" \[failed\]\r\nerror: request r1: a tier lost its KV: .*; ask again$", failed)
            server.start()
            terminal.say("/clear")
            assert terminal.say(STORY) == answer
            terminal.child.sendline("/exit")
            assert terminal.exit_code() == 1
        finally:
            terminal.close()
    assert [turn["state"] for turn in RunReader(run).requests()] == ["length", "failed", "length"]
    assert RunReader(run).manifest["failed_requests"] == 1
    assert verify(run).state == "complete"


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("at the prompt", signal.SIGTERM),
        ("in an answer", signal.SIGTERM),
        ("in an answer", signal.SIGHUP),
    ],
)
def test_a_signal_ends_a_chat_and_takes_its_kv_along(
    checkpoint: Path, run: Path, when: str, number: signal.Signals
) -> None:
    redis = pytest.importorskip("redis", reason="redis-py counts the server's keys")
    with valkey() as server, redis.Redis.from_url(server.tcp) as client:
        num_tokens = NEW_TOKENS if when == "at the prompt" else 20_000
        terminal = Terminal(checkpoint, run, num_tokens, *ROWS, "--remote", server.tcp)
        try:
            terminal.child.sendline(STORY)
            if when == "at the prompt":
                terminal.expect_prompt()
                terminal.settle()
            else:
                terminal.child.expect(r"\n[a-z ]{20}")
                assert client.dbsize() > 0
            terminal.signal(number)
            assert terminal.exit_code() == 0
        finally:
            terminal.close()
        assert client.dbsize() == 0
    assert RunReader(run).state == "complete"
    assert RunReader(run).summary()["tiers"]["remote_pool"]["stored_units"] > 0
