"""A connection to a Redis or Valkey server, for batches of values that are all equally long.

Requests are arrays of bytes (`Frames`) and replies are parsed where they were received, so a batch
costs one copy each way and a few calls, however many values it has. A request has one deadline. After
a failure the connection is closed, so that no late answer is taken for a later question. A request
whose connection broke is sent once more on a new one, in what is left of its time: all that is sent
here may be done twice. Knows no key's meaning.

    connection = Connection(Address("redis://127.0.0.1:6379", host="127.0.0.1", port=6379), timeout_s=5)
    connection.lines(b"*1\\r\\n$4\\r\\nPING\\r\\n", 1)        # [b"+PONG"]

    frames = Frames(b"*3\\r\\n$3\\r\\nSET\\r\\n", key_bytes=24, value_bytes=41984)
    request = frames.filled(keys, data, rows)      # (N, frame bytes) uint8, N times SET
    unpack(reply, begins, out, rows)               # the values found in a reply
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dsatrace.jit import cached_njit
from dsatrace.kv.stores.interface import ErrorKind, StoreError

NIL = -1
_MALFORMED = -1
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens: a unix socket's `path`, or `host` and `port`."""

    label: str  # what messages call it: without a password
    host: str = "127.0.0.1"
    port: int = 6379
    path: str | None = None
    username: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    database: int = 0


def command(*words: bytes | str) -> bytes:
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)


class Connection:
    """One socket, opened on demand. Used by one thread at a time."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self.num_retries = 0
        self._socket: socket.socket | None = None
        self._reply = np.empty(1 << 20, dtype=np.uint8)

    def lines(self, request: bytes | np.ndarray, num_lines: int) -> list[bytes]:
        """Sends, and returns `num_lines` one-line replies, errors (`-...`) included."""
        return self._asked(lambda deadline: self._lines(request, num_lines, deadline))

    def _lines(self, request: bytes | np.ndarray, num_lines: int, deadline: float) -> list[bytes]:
        self._send(request, deadline)
        received = b""
        while received.count(b"\r\n") < num_lines:
            received += self._receive(self._reply.data, deadline)
            if received[:1] not in (b"+", b"-", b":"):
                raise self.refusal(received.split(b"\r\n")[0])
        *replies, rest = received.split(b"\r\n")
        if len(replies) != num_lines or rest:
            raise self._failed("protocol", "it answered more than it was asked")
        return replies

    def values(
        self, request: np.ndarray, num_values: int, likely_bytes: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sends a request whose reply is a list of values, usually of `likely_bytes` bytes.

        Returns the raw reply, and the values' begins and lengths in it, (N,) int64; the length of a
        missing value is NIL.
        """
        return self._asked(lambda deadline: self._values(request, num_values, likely_bytes, deadline))

    def _values(
        self, request: np.ndarray, num_values: int, likely_bytes: int, deadline: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._send(request, deadline)
        room = num_values * (likely_bytes + 16) + 32
        if len(self._reply) < room:
            self._reply = np.empty(room, dtype=np.uint8)
        head = b"*%d\r\n" % num_values
        begins, lengths = np.empty((2, num_values), dtype=np.int64)
        filled, done, place = 0, 0, len(head)
        while done < num_values or place > filled:
            if filled == len(self._reply):
                self._reply = np.concatenate([self._reply, np.empty_like(self._reply)])
            filled += len(self._receive(self._reply.data[filled:], deadline))
            start = self._reply[: min(filled, len(head))].tobytes()
            if not head.startswith(start):
                line = self._reply[: min(filled, 60)].tobytes().split(b"\r\n")[0]
                raise self.refusal(line)
            if filled > len(head):
                done, place = _find_values(self._reply[:filled], done, place, begins, lengths)
                if place == _MALFORMED:
                    raise self._failed("protocol", "its reply is malformed")
        if place != filled:
            raise self._failed("protocol", "it answered more than it was asked")
        return self._reply, begins, lengths

    def refusal(self, line: bytes) -> StoreError:
        """The error for a reply that is none to what was asked; what follows it is not read."""
        if line.startswith(b"-"):
            return self._failed("refused", f"it refuses: {line[1:].decode(errors='replace')}")
        return self._failed("protocol", f"it does not speak the Redis protocol: {line[:40]!r}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _asked(self, ask: Callable[[float], Answer]) -> Answer:
        """What `ask(deadline)` returns; called twice if the connection breaks before the deadline."""
        deadline = time.monotonic() + self._timeout_s
        try:
            return ask(deadline)
        except StoreError as error:
            if error.kind != "connection" or time.monotonic() >= deadline:
                raise
        self.num_retries += 1
        return ask(deadline)

    def _send(self, request: bytes | np.ndarray, deadline: float) -> None:
        if self._socket is None:
            self._connect(deadline)
        assert self._socket is not None
        try:
            self._socket.settimeout(_left(deadline))
            self._socket.sendall(request if isinstance(request, bytes) else request.data)
        except OSError as error:
            raise self._broken(error) from error

    def _receive(self, memory: memoryview, deadline: float) -> memoryview:
        """Reads what has arrived, at least one byte, into the beginning of `memory`."""
        assert self._socket is not None
        try:
            self._socket.settimeout(_left(deadline))
            num_bytes = self._socket.recv_into(memory)
        except OSError as error:
            raise self._broken(error) from error
        if not num_bytes:
            raise self._failed("connection", "it closed the connection")
        return memory[:num_bytes]

    def _connect(self, deadline: float) -> None:
        to = self._address
        family = socket.AF_INET if to.path is None else socket.AF_UNIX
        try:
            if to.path is None:
                self._socket = socket.create_connection((to.host, to.port), _left(deadline))
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                self._socket = socket.socket(family, socket.SOCK_STREAM)
                self._socket.settimeout(_left(deadline))
                self._socket.connect(to.path)
        except OSError as error:
            raise self._broken(error) from error
        greeting = [command("PING")]
        if to.password is not None:
            names = [to.username] if to.username else []
            greeting.insert(0, command("AUTH", *names, to.password))
        if to.database:
            greeting.append(command("SELECT", str(to.database)))
        for reply in self._lines(b"".join(greeting), len(greeting), deadline):
            if reply.startswith(b"-"):
                raise self.refusal(reply)

    def _broken(self, error: OSError) -> StoreError:
        if isinstance(error, TimeoutError):
            return self._failed("timeout", f"no answer within {self._timeout_s:g} s")
        return self._failed("connection", error.strerror or str(error))

    def _failed(self, kind: ErrorKind, cause: str) -> StoreError:
        self.close()
        return StoreError(kind, f"{self._address.label}: {cause}")


def _left(deadline: float) -> float:
    """Seconds until then; above 0, which would mean not to wait at all."""
    return max(deadline - time.monotonic(), 1e-6)


@cached_njit("UniTuple(int64, 2)(uint8[::1], int64, int64, int64[::1], int64[::1])", nogil=True)
def _find_values(reply, done, place, begins, lengths):  # type: ignore[no-untyped-def]
    """Continues to parse `$<length>\\r\\n<value>\\r\\n` and `$-1\\r\\n` with value `done` at `place`.

    Returns how many values' heads are parsed and where the next one begins, which may be beyond
    what has been received so far; place -1 for a malformed reply.
    """
    while done < len(begins) and place < len(reply):
        if reply[place] != ord("$"):
            return done, _MALFORMED
        end, length, sign = place + 1, 0, 1
        while end < len(reply) and reply[end] != ord("\r"):
            if reply[end] == ord("-"):
                sign = -1
            elif ord("0") <= reply[end] <= ord("9"):
                length = length * 10 + (reply[end] - ord("0"))
            else:
                return done, _MALFORMED
            end += 1
        if end + 1 >= len(reply):
            break
        missing = sign < 0
        begins[done], lengths[done] = end + 2, NIL if missing else length
        place = end + 2 + (0 if missing else length + 2)
        done += 1
    return done, place


class Frames:
    """Requests of one kind: `start`, a key, with `value_bytes` a value, and `end`, in wire format."""

    def __init__(self, start: bytes, key_bytes: int, value_bytes: int = 0, end: bytes = b"") -> None:
        key = b"$%d\r\n%s\r\n" % (key_bytes, bytes(key_bytes))
        value = b"$%d\r\n%s\r\n" % (value_bytes, bytes(value_bytes)) if value_bytes else b""
        self._template = np.frombuffer(start + key + value + end, dtype=np.uint8)
        self._frames = np.empty((0, len(self._template)), dtype=np.uint8)
        self._key_end = len(start + key) - 2
        self._value_begin = len(start + key + value) - value_bytes - 2

    def filled(
        self, keys: np.ndarray, data: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """One frame per key of `keys`, (N, key_bytes) uint8, with the values `data[rows]`.

        Returns (N, frame bytes) uint8, valid until the next call.
        """
        if len(self._frames) < len(keys):
            self._frames = np.tile(self._template, (len(keys), 1))
        frames = self._frames[: len(keys)]
        frames[:, self._key_end - keys.shape[1] : self._key_end] = keys
        if data is not None and rows is not None:
            _pack(data, rows, frames, self._value_begin)
        return frames


@cached_njit("void(uint8[:,::1], int64[::1], uint8[:,::1], int64)", nogil=True)
def _pack(data, rows, frames, value_begin):  # type: ignore[no-untyped-def]
    """`frames[i, value_begin:][:unit] = data[rows[i]]`."""
    for i in range(len(rows)):
        unit = data[rows[i]]
        place = frames[i, value_begin : value_begin + len(unit)]
        for j in range(len(unit)):
            place[j] = unit[j]


@cached_njit("void(uint8[::1], int64[::1], uint8[:,::1], int64[::1])", nogil=True)
def unpack(reply, begins, out, rows):  # type: ignore[no-untyped-def]
    """`out[rows[i]]` = the unit that begins at `reply[begins[i]]`."""
    for i in range(len(rows)):
        unit = out[rows[i]]
        value = reply[begins[i] : begins[i] + len(unit)]
        for j in range(len(unit)):
            unit[j] = value[j]
