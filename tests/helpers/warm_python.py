"""Shell scripts whose Python is warm: `python` and `dsatrace` are forks of the server of `forked`.

An interpreter takes three seconds of CPU before its script begins, most of them for torch. What is asked with
an option of its own (`-S`, `-m`, `-c`) goes to the real interpreter, and so does all that torchrun starts.

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
import json, os, socket, sys
argv = {first!r} + sys.argv[1:]
if not argv or argv[0].startswith("-"):
    os.execv({python!r}, [{python!r}, *argv])
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({address!r})
    asked.sendall(json.dumps([argv, os.getcwd(), dict(os.environ), os.getpid()]).encode())
    asked.shutdown(socket.SHUT_WR)
    sys.exit(int(asked.makefile().read()))
"""
_starting = threading.Lock()


class _Asked(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        argv, cwd, environment, pid = json.loads(self.rfile.read())
        files = tuple(Path(f"/proc/{pid}/fd/{number}") for number in range(3))
        with _starting:
            process = call(_run, argv, cwd, environment, files)
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
    """The PATH on which `python`, `python3` and `dsatrace` are warm."""
    with tempfile.TemporaryDirectory() as name:
        folder, address = Path(name), f"{name}/asked"
        for command in ("python", "python3", "dsatrace"):
            first = [str(REAL.parent / command)] if command == "dsatrace" else []
            (folder / command).write_text(SHIM.format(python=str(REAL), first=first, address=address))
            (folder / command).chmod(0o700)
        with socketserver.ThreadingUnixStreamServer(address, _Asked) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield os.pathsep.join((name, str(REAL.parent), os.environ["PATH"]))
            finally:
                server.shutdown()
                thread.join()
