"""Numbers as people read them, in decimal units.

size_text(671_000_000)      # 671.0 MB
"""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Bytes, in the largest unit that leaves 1 or more; never below kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
