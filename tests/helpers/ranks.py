"""A command on several ranks over gloo, forked from a server that has imported everything.

What torchrun does, without the twenty seconds of CPU that its launcher and the imports take. That
torchrun itself works is shown by test_tier_ranks.py, test_readme.py, test_exits.py and test_run_scripts.py.
"""

from __future__ import annotations

import itertools
import multiprocessing.connection
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.forked import start
from helpers.stores import free_port
from helpers.waiting import LIMIT_S


class Ranks:
    """A command under way on several ranks, with what `subprocess.Popen` has for it.

    What they say is kept in `folder`; all ranks read `stdin`.
    """

    def __init__(
        self, num_ranks: int, command: str, argv: Sequence[object], folder: Path, stdin: str = ""
    ) -> None:
        folder.mkdir()
        (folder / "stdin").write_text(stdin)
        self.args = [command]
        self._said = [(folder / f"rank{rank}.out", folder / f"rank{rank}.err") for rank in range(num_ranks)]
        for file in itertools.chain.from_iterable(self._said):
            file.touch()  # a rank that is ended before it opens its own has said nothing
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": num_ranks}
        self._processes = [
            start(
                argv,
                out,
                {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks},
                command=command,
                errors=err,
                stdin=folder / "stdin",
            )
            for rank, (out, err) in enumerate(self._said)
        ]

    @property
    def returncode(self) -> int | None:
        """Of the rank that ended worst, once one has failed or all have ended."""
        codes = [one.exitcode for one in self._processes]
        return None if None in codes and not any(codes) else max(abs(code or 0) for code in codes)

    poll = returncode.fget

    def kill(self) -> None:
        for one in self._processes:
            one.kill()

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, ...]:
        """What they said until their end; one rank that fails ends the others, and so does the time."""
        running = list(self._processes)
        while running:
            ended = multiprocessing.connection.wait([one.sentinel for one in running], timeout)
            stuck = not ended
            running = [one for one in running if one.sentinel not in ended]
            if stuck or any(one.exitcode for one in self._processes if one not in running):
                for one in running:
                    one.kill() if stuck else one.terminate()
        return tuple("".join(file.read_text() for file in files) for files in zip(*self._said, strict=True))


def on_ranks(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command of `Ranks` to its end."""
    ranks = Ranks(*args, **kwargs)
    out, err = ranks.communicate()
    assert ranks.returncode is not None
    return subprocess.CompletedProcess(ranks.args, ranks.returncode, out, err)
