"""Units in a file mapped into memory: the kernel's page cache stands between it and the disk.

A read is a copy where the page is cached, and a page fault of unknown length where not.
For reads that certainly reach the disk see `direct_file`.

    store = mmap_store("mmap:/mnt/nvme/kv", Path("/mnt/nvme/kv"), unit_bytes=41984, capacity_units=1024)
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from dsatrace.kv.stores.checked import CheckedStore
from dsatrace.kv.stores.files import open_private_file
from dsatrace.kv.stores.ram import ArrayMedium


def mmap_store(spec: str, path: Path, unit_bytes: int, capacity_units: int) -> CheckedStore:
    """A store in a new private file at `path`; the mapping, and with it the file, goes with the array."""
    num_bytes = unit_bytes * capacity_units
    fd = open_private_file(spec, path, num_bytes)
    try:
        mapping = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    array = np.frombuffer(mapping, dtype=np.uint8).reshape(capacity_units, unit_bytes)
    return CheckedStore(ArrayMedium(array), unit_bytes, capacity_units)
