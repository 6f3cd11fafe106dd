"""A command on several ranks over gloo, forked from a server that has imported everything.

What torchrun does, without the twenty seconds of CPU that its launcher and the imports take. That
torchrun itself works is shown by test_tier_ranks.py, test_chat.py, test_exits.py and test_run_scripts.py.
"""

from __future__ import annotations

import multiprocessing.connection
import subprocess
from collections.abc import Sequence
from pathlib import Path

from helpers.forked import start
from helpers.stores import free_port
from helpers.waiting import LIMIT_S


def on_ranks(
    num_ranks: int, command: str, argv: Sequence[object], folder: Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `dsatrace.commands.<command>` to its end; one rank that fails ends the others.

    What they say is kept in `folder`; all ranks read `stdin`.
    """
    folder.mkdir()
    (folder / "stdin").write_text(stdin)
    said = [(folder / f"rank{rank}.out", folder / f"rank{rank}.err") for rank in range(num_ranks)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": num_ranks}
    processes = [
        start(
            argv,
            out,
            {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks},
            command=command,
            errors=err,
            stdin=folder / "stdin",
        )
        for rank, (out, err) in enumerate(said)
    ]
    running = list(processes)
    while running:
        ended = multiprocessing.connection.wait([one.sentinel for one in running], LIMIT_S)
        stuck = not ended
        running = [one for one in running if one.sentinel not in ended]
        if stuck or any(one.exitcode for one in processes if one not in running):
            for one in running:
                one.kill() if stuck else one.terminate()
    out, err = ("".join(file.read_text() for file in files) for files in zip(*said, strict=True))
    return subprocess.CompletedProcess([command], max(abs(one.exitcode or 0) for one in processes), out, err)
