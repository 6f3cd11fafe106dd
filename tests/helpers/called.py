"""Functions for processes of a pool to call; a module of its own, since each of them imports it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dsatrace.errors import UserError


def after(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def refuse(number: int) -> int:
    raise UserError(f"{number}: is no number to use")


def leave_pid_and_stay(path: str) -> None:
    Path(path).write_text(f"{os.getpid()}")
    time.sleep(600)
