"""A file that only this process can reach, for the stores that keep their units in a file.

The file loses its name as soon as it is open: a crash leaves nothing behind, and no other process can
read or shorten it. Its room on the disk is allocated before the first unit is stored.

    fd = open_private_file(StoreSettings("mmap:/mnt/nvme/kv", unit_bytes=41984), num_bytes=1 << 30)
"""

from __future__ import annotations

import errno
import os

from dsatrace.errors import UserError
from dsatrace.kv.stores.interface import StoreSettings


def open_private_file(settings: StoreSettings, num_bytes: int, flags: int = 0) -> int:
    """A new file of `num_bytes` bytes at `settings.path`, which must not exist; returns its descriptor.

    `flags` are added to the open flags. Raises `UserError`, which names the spec.
    """
    spec, path = settings.spec, settings.path
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UserError(f"{spec}: {path} exists already; name a file that does not") from None
    except OSError as error:
        raise UserError(f"{spec}: {error.strerror}; name a file in a folder you may write to") from error
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        if flags:
            os.close(fd)
            fd = -1
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise UserError(_why(spec, error, num_bytes)) from error
    finally:
        path.unlink()
    return fd


def _why(spec: str, error: OSError, num_bytes: int) -> str:
    if error.errno == errno.ENOSPC:
        return f"{spec}: no room for {num_bytes / 1e9:.1f} GB; ask for fewer blocks, or name another disk"
    if error.errno == errno.EINVAL:
        return f"{spec}: this file system takes no direct reads; use mmap:PATH, or name another disk"
    return f"{spec}: {error.strerror}"
