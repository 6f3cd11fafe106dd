"""The work folder of a sweep, inside the run's: hidden states and what each layer selected.

A layer counts as done once `progress.json` says so; all that came after is made again. Knows files and
arrays, and no model.

    work = WorkFolder(out, settings, resume=True)
    rows = work.hidden(3, (32768, 7168), torch.float32, new=False)
    work.layer_done(3, 3, {"selected": ids}, bytes_read, seconds)
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsatrace.errors import UserError
from dsatrace.files import NO_LOCKS, read_json, write_json
from dsatrace.schema import MANIFEST_FILE

NAME = "layerwise"
_SETTINGS, _PROGRESS = "settings.json", "progress.json"


class RowFile:
    """A file of rows as a tensor: `rows` is the mapping, so what is written to it outlives the process.

    Its room on the disk is taken when it is made. Pages that were touched count as the process's memory
    until `release`, or until the system wants them back.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, new: bool) -> None:
        self.path = path
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0), 0o666)
            try:
                if new:
                    os.posix_fallocate(descriptor, 0, num_bytes)  # a write to a full disk would kill us
                elif os.fstat(descriptor).st_size != num_bytes:
                    raise UserError(f"{path}: not the {num_bytes} bytes that were written; start anew")
                self._map = mmap.mmap(descriptor, num_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"{path}: cannot hold {num_bytes:,} bytes: {error.strerror}; make room and go on "
                "with --resume"
            ) from error
        self.rows = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def release(self) -> None:
        """Takes the pages off the process's memory; what they hold stays in the file."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Writes through to the disk."""
        self._map.flush()
        self.release()


class WorkFolder:
    """Raises `UserError` for a folder that holds another run, or another sweep."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.out, self.path = out, out / NAME
        if resume:
            self._check_resumable(settings)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            remedy = "go on with it by --resume, or name another" if self.path.is_dir() else "name another"
            raise UserError(f"--out {out}: holds files already and is never overwritten; {remedy}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not resume:
                write_json(self.path / _SETTINGS, settings)
                self.progress: dict[str, Any] = {"layers_done": 0, "bytes_read": 0, "seconds": 0.0}
                write_json(self.path / _PROGRESS, self.progress)
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there: {error.strerror}") from error
        self.progress = read_json(self.path / _PROGRESS)

    def _check_resumable(self, settings: Mapping[str, Any]) -> None:
        if not (self.path / _PROGRESS).is_file():
            ended = (self.out / MANIFEST_FILE).is_file()
            why = "this run has ended" if ended else "no sweep was begun there"
            raise UserError(f"--resume, {self.out}: {why}; leave --resume out and name a new --out")
        before = read_json(self.path / _SETTINGS)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"--resume, {self.out}: {name} was {before.get(name)!r} and is {value!r} now; give what "
                    "it was begun with"
                )

    def _lock(self) -> None:
        """The kernel drops the lock of a process that ends."""
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"--out {self.out}: another sweep runs there; let it end first") from error
            if error.errno not in NO_LOCKS:
                raise

    @property
    def layers_done(self) -> int:
        """Of those to compute, from the first on."""
        return int(self.progress["layers_done"])

    def hidden(self, index: int, shape: tuple[int, ...], dtype: torch.dtype, new: bool) -> RowFile:
        """The rows that go into the `index`-th layer to compute."""
        return RowFile(self.path / f"hidden_{index:03}.bin", shape, dtype, new)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> RowFile:
        """Rows that are of use within one layer."""
        return RowFile(self.path / f"{name}.bin", shape, dtype, new=True)

    def shared(self, index: int, shape: tuple[int, ...], new: bool) -> RowFile:
        """Of every row: what the layer before selected, where the `index`-th to compute uses it."""
        return RowFile(self.path / f"selection_{index:03}.bin", shape, torch.int32, new)

    def layer_done(
        self, index: int, layer: int, arrays: Mapping[str, np.ndarray], bytes_read: int, seconds: float
    ) -> None:
        """Keeps what the layer selected, and then says that it is done."""
        try:
            for name, array in arrays.items():
                with (self.path / f"{name}_{layer:03}.npy").open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
            self.progress = {"layers_done": index + 1, "bytes_read": bytes_read, "seconds": seconds}
            write_json(self.path / _PROGRESS, self.progress)
            for path in (*self.path.glob("hidden_*.bin"), *self.path.glob("selection_*.bin")):
                if int(path.stem.rpartition("_")[2]) <= index:
                    path.unlink()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path}: cannot write there: {error.strerror}; make room and go on "
                "with --resume: no layer that is done is lost"
            ) from error

    def layer_array(self, name: str, layer: int) -> np.ndarray:
        """What was kept, mapped."""
        array: np.ndarray = np.load(self.path / f"{name}_{layer:03}.npy", mmap_mode="r")
        return array

    def remove(self) -> None:
        """Once the run is whole. The progress goes first: without it nothing here counts."""
        (self.path / _PROGRESS).unlink()
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Lets another sweep go on with it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
