"""Which shards of a checkpoint may be deleted, and when: those that hold nothing but layers that are done.

A shard with the head, the final norm, a next-token module, or with a layer that is not computed whole, is
never one of them.

    freed_after(Path("DeepSeek-V3.2"), work)[3]      # those of use no more once three layers are done
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.layerwise.weights import EMBEDDING, LayerWork
from dsatrace.model.plan import read_source, shard_places

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def freed_after(weights: Path, work: Sequence[LayerWork]) -> dict[int, list[Path]]:
    """By the number of layers that are done. Raises `UserError` for one that is a link out of the folder."""
    places = shard_places(weights)
    if places is None:
        places = {name: stored.path.name for name, stored in read_source(weights).items()}
    done_at = {one.layer: i for i, one in enumerate(work, 1) if one.part == "all"}
    last_use: dict[str, float] = {}
    for name, file in places.items():
        match = _LAYER.match(name)
        use = done_at.get(int(match[1]), float("inf")) if match else float("inf")
        last_use[file] = max(last_use.get(file, 0), 1 if name == EMBEDDING else use)
    freed: dict[int, list[Path]] = {}
    for file, use in last_use.items():
        path = weights / file
        if use == float("inf") or not path.exists():
            continue
        if path.is_symlink() or path.resolve().parent != weights.resolve():
            raise UserError(f"--delete-shards: {path} is a link to another place; only files in --weights go")
        freed.setdefault(int(use), []).append(path)
    return freed
