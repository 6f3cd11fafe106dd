"""The exception for a user's mistake, and how a program ends on it.

raise UserError("prompts.txt: the file is empty; write one prompt per paragraph")
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable

from dsatrace.text import plain

GRACE_S = 5.0
"""How long another rank leaves rank 0 to say what is wrong; torchrun then ends them all."""


class UserError(ValueError):
    """A mistake that the user can fix: the message names the file, row or flag, and the remedy."""


class RankError(UserError):
    """A mistake that only this rank may have met, so that it says so itself."""


def is_rank_0() -> bool:
    """Whether this process is the one that writes and speaks; the only one, unless torchrun started more."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_to_rank_0() -> None:
    """Waits on another rank until rank 0 has printed the same error and torchrun ends this process.

    Returns if rank 0 has not met it: the files of another machine may differ.
    """
    if not is_rank_0():
        time.sleep(GRACE_S)


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a `main()`: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130.

    Of several ranks, which all meet a mistake in their flags, only rank 0 prints it.
    """

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if not isinstance(error, RankError):
                leave_to_rank_0()
            print(f"error: {plain(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if is_rank_0():
                print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return run
