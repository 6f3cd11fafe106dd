"""A server of Redis's protocol that misbehaves at every Nth command, in front of a real one.

with FaultProxy(server.port, "dropped", every=20) as proxy:
    open_store(proxy.spec, unit_bytes=656)
proxy.num_fired
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

Fault = Callable[[socket.socket, bytes], bool]
"""Answers a client that should get this reply; returns whether the connection stays open."""


def _sends(make: Callable[[bytes], bytes], stays_open: bool) -> Fault:
    def fault(client: socket.socket, reply: bytes) -> bool:
        client.sendall(make(reply))
        return stays_open

    return fault


HANG_S = 0.6


def _hang(client: socket.socket, reply: bytes) -> bool:
    time.sleep(HANG_S)
    return False


def _altered(reply: bytes) -> bytes:
    """The last byte of the last value is another."""
    return reply[:-3] + bytes([reply[-3] ^ 1]) + reply[-2:]


FAULTS: dict[str, tuple[Fault, tuple[bytes, ...]]] = {
    "dropped": (_sends(lambda reply: b"", False), (b"SET", b"MGET")),
    "truncated reply": (_sends(lambda reply: reply[: len(reply) // 2], False), (b"SET", b"MGET")),
    "hang": (_hang, (b"SET", b"MGET")),
    "wrong bytes": (_sends(_altered, True), (b"MGET",)),
    "error reply": (_sends(lambda reply: b"-ERR out of order\r\n", True), (b"SET", b"MGET")),
    "another protocol": (_sends(lambda reply: b"HTTP/1.1 400 Bad\r\n\r\n", True), (b"SET", b"MGET")),
    "full store": (_sends(lambda reply: b"-OOM command not allowed\r\n", True), (b"SET",)),
}
"""What happens, and at which commands. The server has carried them out all the same."""


class FaultProxy:
    """Passes on one command at a time on each of its connections."""

    def __init__(self, port: int, fault: str | None, every: int) -> None:
        """`port`: the server's, on loopback; without a `fault` all commands are passed on."""
        self.num_fired = 0
        self._fault, self._concerned = FAULTS[fault] if fault else (None, ())
        self._every = every
        self._numbers = itertools.count(1)
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.spec = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client:
            with socket.create_connection(("127.0.0.1", self._port), 5) as server:
                for end in (client, server):  # else each small reply waits for 40 ms
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                commands, replies = client.makefile("rb"), server.makefile("rb")
                while self._pass_on(client, server, commands, replies):
                    pass
            client.shutdown(socket.SHUT_RDWR)

    def _pass_on(
        self, client: socket.socket, server: socket.socket, commands: BinaryIO, replies: BinaryIO
    ) -> bool:
        command = _message(commands)
        server.sendall(command)
        reply = _message(replies)
        name = command.split(b"\r\n", 3)[2]
        if self._fault and name in self._concerned and next(self._numbers) % self._every == 0:
            self.num_fired += 1
            return self._fault(client, reply)
        client.sendall(reply)
        return True

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _message(stream: BinaryIO) -> bytes:
    """One whole message; raises `EOFError` at the end of the connection."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise EOFError
    size = int(line[1:]) if line[:1] in b"*$" else 0
    if line[:1] == b"*":
        return line + b"".join(_message(stream) for _ in range(size))
    if line[:1] == b"$" and size >= 0:
        body = stream.read(size + 2)
        if len(body) < size + 2:
            raise EOFError
        return line + body
    return line
