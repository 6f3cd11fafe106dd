"""The interactive mode: streamed answers, commands after a slash, and Ctrl-C that ends one answer only.

SIGTERM and SIGHUP end the answer under way and then the chat. An answer's thoughts are shown, and left out of
the conversation that the next turn continues.

Under tensor parallel rank 0 talks and sends each turn's tokens to the other ranks.
"""

from __future__ import annotations

import io
import signal
import sys

import torch

from dsatrace.commands.interrupt import on_ending, on_interrupt
from dsatrace.commands.serving import PAST_ANSWER, Serving
from dsatrace.engine.engine import Engine
from dsatrace.engine.live import LiveRequest
from dsatrace.text import plain, plain_lines
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.request import Request

_ENDS = {"aborted": " [stopped]", "failed": " [failed]"}
"""Printed after an answer that is not whole, by its state."""

COMMANDS = {
    "/help": "lists these commands",
    "/clear": "forgets the conversation",
    "/exit": "ends the chat, as Ctrl-D does; Ctrl-C ends an answer only",
}
_HINT = "/help lists the commands, /exit ends."


def chat(serving: Serving) -> int:
    """Talks until `/exit` or the end of input; returns the exit code, 1 when an answer failed."""
    with serving.open(num_requests=1) as engine:
        if serving.is_rank_0:
            leave = _Leave(engine)
            with on_interrupt(engine.request_abort), on_ending(leave):
                _say(f"Chat with {serving.settings.ckpt_path}. {_HINT}")
                _talk(serving, engine, leave)
        else:
            with on_interrupt(lambda: None):  # rank 0 decides when an answer ends
                _follow(serving, engine)
        num_failed = engine.scheduler.num_failed
    if serving.is_rank_0 and serving.run.traced and serving.run.trace is not None:
        _say(f"trace: {serving.run.trace.out}")
    return int(num_failed > 0)


class _Leave:
    """The action of SIGTERM and SIGHUP: ends the answer under way, or the wait for a line, and with it the
    conversation."""

    def __init__(self, engine: Engine) -> None:
        self.asked = False
        self.at_prompt = False
        self._engine = engine

    def __call__(self) -> None:
        self.asked = True
        self._engine.request_abort()
        if self.at_prompt:
            raise EOFError


def _talk(serving: Serving, engine: Engine, leave: _Leave) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # no byte foreign to the terminal ends the conversation
    turns: list[Message] = []
    num_requests = 0
    while (line := _read_line(leave)) is not None and line != "/exit":
        engine.abort_requested = False  # a Ctrl-C that came too late for the last answer
        if not line or line.startswith("/"):
            _obey(line, turns)
            continue
        ids = serving.encode([*turns, Message("user", line)])
        if len(ids) > engine.scheduler.max_tokens:
            limit = f"{engine.scheduler.max_tokens} that the KV cache holds"
            print(f"error: {len(ids)} tokens exceed the {limit}; /clear starts anew", file=sys.stderr)
            continue
        _send(serving, ids)
        live = _answer(serving, engine, ids, num_requests)
        num_requests += 1
        if live.state == "failed":
            print(f"error: {plain(live.error)}; ask again", file=sys.stderr)
            continue
        answer = serving.chat.tokenizer.decode(serving.chat.answer(live.answer) or [])
        turns += [Message("user", line), Message("assistant", answer)]
    _send(serving, [])


def _obey(line: str, turns: list[Message]) -> None:
    """Does what a line that begins with a slash says; none of them reaches the model."""
    if line == "/clear":
        turns.clear()
        _say("The conversation is forgotten.")
    elif line == "/help":
        _say("\n".join(f"{name:8}{meaning}" for name, meaning in COMMANDS.items()))
    elif line:
        _say(f"{line.split(maxsplit=1)[0]} is no command. {_HINT}")


def _say(text: str) -> None:
    print(plain_lines(text), flush=True)


def _follow(serving: Serving, engine: Engine) -> None:
    num_requests = 0
    while ids := _receive(serving):
        _answer(serving, engine, ids, num_requests)
        num_requests += 1


def _answer(serving: Serving, engine: Engine, ids: list[int], number: int) -> LiveRequest:
    """Streams one answer to rank 0's terminal."""
    max_new_tokens = min(serving.max_new_tokens, engine.scheduler.max_tokens - len(ids) + 1)
    live = engine.submit(Request(f"r{number}", tuple(ids), max_new_tokens, serving.temperature))
    stream, stop_tokens = serving.chat.tokenizer.stream(), serving.chat.stop_tokens
    said_so = False
    for i, (_, token) in enumerate(engine.run()):
        if not serving.is_rank_0 or token in stop_tokens:
            continue
        if not said_so and live.answer_end is not None and i >= live.answer_end:
            said_so = True
            print(f"{plain_lines(stream.flush())}\n[{PAST_ANSWER}] ", end="")
        print(plain_lines(stream.push(token)), end="", flush=True)
    if serving.is_rank_0:
        print(plain_lines(stream.flush()) + _ENDS.get(live.state, ""), flush=True)
    return live


def _read_line(leave: _Leave) -> str | None:
    """The next line, or None at the end of input; Ctrl-C here only says how to leave."""
    handler = signal.getsignal(signal.SIGINT)
    while True:
        try:
            leave.at_prompt = True
            if leave.asked:
                return None
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return input(">>> ").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n/exit ends")
        finally:
            leave.at_prompt = False
            signal.signal(signal.SIGINT, handler)


def _send(serving: Serving, ids: list[int]) -> None:
    """Rank 0's tokens to the others; none means the end."""
    group = serving.model.setup.group
    if group.size > 1:
        group.broadcast(torch.tensor([len(ids)], device=serving.device))
        if ids:
            group.broadcast(torch.tensor(ids, device=serving.device))


def _receive(serving: Serving) -> list[int]:
    group = serving.model.setup.group
    length = int(group.broadcast(torch.zeros(1, dtype=torch.int64, device=serving.device)))
    if length == 0:
        return []
    ids: list[int] = group.broadcast(torch.zeros(length, dtype=torch.int64, device=serving.device)).tolist()
    return ids
