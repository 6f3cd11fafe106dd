"""What the page is made of: a run's manifest and summary, and its replay's figures, or why there are none.

material = Material.of(RunReader(folder), record)
material.command("verify")      # dsatrace verify outputs/mine
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from ...selection_replay.settings import ReplaySettings
from ...trace.kind import SelectionKind
from ...trace.reader import RunReader
from ..tables import run_kind

Record = Mapping[str, Any]
REPLAY_FLAGS = {
    "policies": "--policy",
    "sizes": "--sizes",
    "block": "--unit",
    "pin_newest": "--pin-newest",
    "start": "--start",
    "share": "--share",
    "steps": "--steps",
    "union": "--union",
    "seed": "--seed",
}
"""By a setting's name in replay.json."""


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
        """`replay` is the record of a replay.json, or why there is none.

        Raises `UserError` for a run laid out for replay.
        """
        run.require_order_of_steps("report on")
        made = cls(run, run.manifest, run.summary(), run_kind(run.manifest), None, "", request, layer)
        return made.with_replay(replay)

    def with_replay(self, replay: Record | str) -> Material:
        """The same with that replay, or with why there is none."""
        record, why = (None, replay) if isinstance(replay, str) else (replay, "")
        return dataclasses.replace(self, replay=record, no_replay=why)

    def command(self, verb: str, *flags: str) -> str:
        """A command line on this run, to paste into a shell."""
        return shlex.join(["dsatrace", verb, f"{self.run.folder}", *flags])

    @property
    def replay_command(self) -> str:
        """The command whose replay.json is `replay`."""
        assert self.replay is not None, "only what was replayed has a command"
        return self.command("replay", *replay_flags(self.replay["settings"]))

    @property
    def size(self) -> str | None:
        """The buffer that sections by layer speak of: the chosen one, or the first that holds a step."""
        if self.replay is None:
            return None
        cells = self.replay["overall"]["policies"].get("lru", {})
        chosen = (self.replay.get("chosen") or {}).get("size")
        fitting = [size for size in cells if cells[size]["miss_rate"] is not None]
        return chosen if chosen in fitting else next(iter(fitting), None)

    @property
    def per(self) -> str:
        """What has a buffer of its own in the replay."""
        shares = self.replay is not None and self.replay["settings"]["share"] == "request"
        return "per request" if shares else "per layer"

    @property
    def ids(self) -> str:
        """What a replayed id is, in the plural."""
        unit = self.replay["unit"] if self.replay is not None else self.kind.unit
        plural = {"token": "tokens", "entry": "entries", "block": "blocks", "expert": "experts"}
        if unit.startswith("block of "):
            return f"blocks of {unit.removeprefix('block of ')} tokens"
        return plural[unit] if self.kind.id_kind == "position" or unit == "expert" else "slots"


def replay_flags(settings: Record) -> list[str]:
    """The flags of `dsatrace replay` that give these settings; those that it takes by itself are left out."""
    usual, flags = ReplaySettings().to_json(), []
    for name, flag in REPLAY_FLAGS.items():
        value = settings[name]
        if value == usual[name]:
            continue
        flags.append(flag)
        if name == "block":
            flags.append(f"block:{value}")
        elif value is not True:
            flags.append(",".join(value) if isinstance(value, list | tuple) else f"{value}")
    return flags
