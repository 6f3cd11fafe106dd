"""Numbers as people read them: bytes in binary units, as tools for memory show them.

size_text(671_000_000)      # 639.9 MiB
"""

from __future__ import annotations

MIB = 1 << 20


def size_text(num_bytes: float) -> str:
    """Bytes, in the largest unit that leaves 1 or more; never below KiB."""
    for unit, size in (("TiB", MIB << 20), ("GiB", MIB << 10), ("MiB", MIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
