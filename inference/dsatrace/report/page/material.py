"""What the page is made of: a run's manifest and summary, and its replay's figures, or why there are none.

material = Material.of(RunReader(folder), record)
material.command("replay", "--policy", "lru")      # dsatrace replay outputs/mine --policy lru
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from ...trace.kind import SelectionKind, engine_kind
from ...trace.manifest import selection_kind
from ...trace.reader import RunReader

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Material:
    run: RunReader
    manifest: Record
    summary: Record
    kind: SelectionKind
    replay: Record | None  # as in replay.json
    no_replay: str  # why there is none: a clause
    request: str | None = None  # whose positions are drawn; None: by the rule of position_maps
    layer: int | None = None

    @classmethod
    def of(
        cls, run: RunReader, replay: Record | str, request: str | None = None, layer: int | None = None
    ) -> Material:
        """`replay` is the record of a replay.json, or why there is none."""
        kind = selection_kind(run.manifest) or engine_kind(1, 1)  # an old manifest may not tell
        record, why = (None, replay) if isinstance(replay, str) else (replay, "")
        return cls(run, run.manifest, run.summary(), kind, record, why, request, layer)

    def command(self, verb: str, *flags: str) -> str:
        """A command line on this run, to paste into a shell."""
        return shlex.join(["dsatrace", verb, f"{self.run.folder}", *flags])
