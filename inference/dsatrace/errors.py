"""The exception for a user's mistake, and how a program ends on it and on any other.

    raise UserError("prompts.txt: the file is empty; write one prompt per paragraph")

    @exits_cleanly                # 2 on that, with one line
    def main(argv=None): ...

`DSATRACE_DEBUG=1` shows the traceback above the line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dsatrace.text import plain

USAGE, UNFORESEEN, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141
"""Exit codes: a mistake that the user can fix, a fault of ours, Ctrl-C, a reader that went away."""

DEBUG = "DSATRACE_DEBUG"

GRACE_S = 5.0
"""How long another rank leaves rank 0 to say what is wrong; torchrun then ends them all."""


class UserError(ValueError):
    """A mistake that the user can fix: the message names the file, row or flag, and the remedy."""


def not_a_run(path: Path, error: OSError) -> UserError:
    """For a manifest or summary that cannot be read; names what stands there instead, where that is known."""
    if not isinstance(path, Path):  # at a URL, where nobody looks around
        return UserError(f"{path}: cannot read it: {error.strerror}; is this a run's folder?")
    folder = path.parent
    if isinstance(error, NotADirectoryError):
        return UserError(f"{folder}: a file, where a run's folder belongs; `import` makes a run of a capture")
    if isinstance(error, FileNotFoundError) and (folder / "replay.json").exists():
        return UserError(f"{folder}: a replay's folder, not a run's; name the run that was replayed")
    try:
        runs = sorted(file.parent.name for file in folder.glob("*/requests.jsonl"))
    except OSError:
        runs = []
    inside = f" it holds runs, such as {', '.join(runs[-3:])}" if runs else ""
    return UserError(f"{path}: cannot read it: {error.strerror}; is this a run's folder?{inside}")


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


_TOLD_TO_END: list[bool] = []
"""Not empty once a signal has told this process to end, and it goes on for a while."""


def note_ending() -> None:
    """Call where SIGTERM or SIGHUP only asks: what another rank loses after it is not its fault."""
    _TOLD_TO_END.append(True)


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a `main()`, so that it ends on any exception with one line on stderr and an exit code.

    Of several ranks, which all meet a mistake in their flags or lose the rank that met it, only rank 0
    prints the line. A pipe whose reader went away, such as `head`, is no error and has no line.
    """

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> int:
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()  # here, where a closed pipe is told from a fault
            return code
        except UserError as error:
            if not isinstance(error, RankError):
                leave_to_rank_0()
            return _end(f"error: {plain(error)}", USAGE)
        except KeyboardInterrupt:
            return _end("interrupted", INTERRUPTED) if is_rank_0() else INTERRUPTED
        except (BrokenPipeError, SystemExit) as error:
            _settle_output()
            # rich makes its own exit of a closed pipe
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise
            return BROKEN_PIPE
        except Exception as error:
            leave_to_rank_0()  # which this one may only have lost
            # Whoever ends all ranks has said why.
            said = bool(_TOLD_TO_END) and not is_rank_0()
            return UNFORESEEN if said else _end(_unforeseen(error), UNFORESEEN)

    return run


def _end(line: str, code: int) -> int:
    """Prints the line, below the traceback if that is asked for, and returns the exit code."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exc()
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(line, file=sys.stderr, flush=True)
    _settle_output()
    tell_torchrun(line)
    return code


def _unforeseen(error: Exception) -> str:
    """The line for an exception that nobody foresaw: what, where, and how to see more."""
    said = plain(" ".join(f"{error}".split()))
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if len(said) > 300:
        said = f"{said[:300]} ..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if f"{os.sep}dsatrace{os.sep}" in frame.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "nowhere"  # noqa: PTH119
    rank = "" if is_rank_0() else f"rank {os.environ['RANK']}: "
    return f"error: {rank}unforeseen, {said} ({place}); set {DEBUG}=1 to see the traceback, and report it"


def _settle_output() -> None:
    """Writes what the buffers hold, or drops it, so that the interpreter ends without a word of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell_torchrun(line: str) -> None:
    """Gives torchrun the line for the summary of failed ranks that it prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": f"{int(time.time())}"}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump({"message": message}, file)
