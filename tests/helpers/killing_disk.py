"""A disk that ends the process, or refuses to write, at a chosen change of a run's folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from dsatrace import files


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it happens, no handler cleans up."""


class Disk:
    """Counts what changes a run's folder, and ends or refuses it at the `at`th time, 1-based."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0, *, full: bool = False) -> None:
        self.num_changes = 0
        self.at, self.full = at, full
        disk, replace = self, Path.replace

        class File(FileIO):
            def write(self, data: Any) -> int:
                disk.change(lambda: super(File, self).write(data[: len(data) // 2]))
                return super().write(data)

            def truncate(self, size: int | None = None) -> int:
                if not disk.full:  # a full disk gives space back
                    disk.change()
                return super().truncate(size)

        def replaced(path: Path, target: Path) -> Path:
            if not disk.full:
                disk.change()
            return replace(path, target)

        monkeypatch.setattr(files, "FileIO", File)
        monkeypatch.setattr(Path, "replace", replaced)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def change(self, half: Callable[[], object] = lambda: None) -> None:
        self.num_changes += 1
        if self.at and self.num_changes >= self.at:
            if self.num_changes == self.at:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if self.full else Killed
