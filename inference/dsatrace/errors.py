"""The exception for a user's mistake, and how a program ends on it.

raise UserError("prompts.txt: the file is empty; write one prompt per paragraph")
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can fix: the message names the file, row or flag, and the remedy."""


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a `main()`: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C 130."""

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return run
