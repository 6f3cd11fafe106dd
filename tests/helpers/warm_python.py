"""Shell scripts whose Python is warm: `python`, `dsatrace`, `torchrun` are forks of the server of `forked`.

An interpreter takes three seconds of CPU before its script begins, most of them for torch. What is asked with
an option of its own (`-S`, `-m`, `-c`) goes to the real interpreter. torchrun and its ranks are torchrun's
own code; only their imports are done already.

    with warm_python() as path:
        subprocess.run(["bash", "scripts/demo.sh"], env=env | {"PATH": path})
"""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from conftest import INFERENCE
from helpers.forked import call, run_script

REAL = Path(sys.executable)
SHIM = """#!{python} -IS
import json, os, signal, socket, sys
argv = {first!r} + sys.argv[1:]
argv = argv[argv[:1] == ["-u"]:]  # as torchrun asks for its ranks
if not argv or argv[0].startswith("-"):
    os.execv({python!r}, [{python!r}, *argv])
os.environ["PYTHON_EXEC"] = {warm!r}  # for torchrun

def pass_on(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended, and its exit code is under way
        pass

signals = [number for number in (1, 2, 15) if signal.getsignal(number) != signal.SIG_IGN]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    asked.sendall(json.dumps([argv, os.getcwd(), dict(os.environ), os.getpid()]).encode())
    asked.shutdown(socket.SHUT_WR)
    said = asked.makefile()
    pid = int(said.readline())
    for number in signals:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    sys.exit(int(said.readline()))
"""
_starting = threading.Lock()


class _Asked(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        argv, cwd, environment, pid = json.loads(self.rfile.read())
        files = tuple(Path(f"/proc/{pid}/fd/{number}") for number in range(3))
        with _starting:
            process = call(_run, argv, cwd, environment, files)
        self.wfile.write(f"{process.pid}\n".encode())
        process.join()
        code = process.exitcode or 0
        self.wfile.write(str(code if code >= 0 else 128 - code).encode())


def _run(argv: list[str], cwd: str, environment: dict[str, str], files: tuple[Path, Path, Path]) -> None:
    """In a copy of the checkout (`PYTHONPATH`) the modules say that they come from there: data and outputs
    are looked for beside them."""
    os.environ.clear()
    os.environ.update(environment)
    folders = list(filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = folders
    package = next((folder for folder in folders if Path(folder, "dsatrace").is_dir()), INFERENCE)
    for name, module in sys.modules.items():
        if name.startswith("dsatrace.") and module.__file__:
            module.__file__ = str(package / Path(module.__file__).relative_to(INFERENCE))
    run_script(Path(cwd), argv, files)


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """The PATH on which `python`, `python3`, `dsatrace` and `torchrun` are warm."""
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"{name}/asked"
        for command in ("python", "python3", "dsatrace", "torchrun"):
            first = [] if command.startswith("python") else [str(REAL.parent / command)]
            warm = str(folder / "python")
            shim = SHIM.format(python=str(REAL), first=first, address=address, warm=warm)
            (folder / command).write_text(shim)
            (folder / command).chmod(0o700)
        with socketserver.ThreadingUnixStreamServer(address, _Asked) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield os.pathsep.join((name, str(REAL.parent), os.environ["PATH"]))
            finally:
                server.shutdown()
                thread.join()
