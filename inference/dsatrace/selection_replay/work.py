"""What a replay has to do: runs cut into pieces of whole requests, each with what it takes beside step files.

for work in find_work([Path("outputs/mine")], settings, shard=(0, 4)):
    work.key, work.num_records
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsatrace.errors import UserError
from dsatrace.files import digest_of
from dsatrace.selection_replay.prefixes import Prefix, beginnings_of, find_prefixes
from dsatrace.selection_replay.result import RESULT_VERSION
from dsatrace.selection_replay.settings import ReplaySettings
from dsatrace.selection_replay.streams import Recorded
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selection_parts import SelectionPart, selection_parts
from dsatrace.version import __version__

MOST_WORK = 2048
"""Pieces that a run is cut into: a result takes some MB and a second to add, however much it sums up."""


class About(NamedTuple):
    """What is known of a request beside its selections."""

    answer_tokens: int | None = None  # steps from this one on lie past its answer; None: it does not tell
    prefix: Prefix | None = None  # where requests share buffers


@dataclasses.dataclass(frozen=True)
class Work:
    """Some of a run's requests, with all that replaying them needs but their step files."""

    folder: Path
    name: str  # of the run, as results show it
    parts: tuple[SelectionPart, ...]
    content: str  # digests of the files that the parts lie in
    recorded: Recorded
    header: dict[str, Any]  # of its result
    about: dict[str, About]  # by request; empty where a replay need not know
    tells_answers: bool  # whether the run kept answers from ending, so that steps may lie past them

    @property
    def key(self) -> str:
        """Names its result: the same records, settings and version give the same one."""
        recorded = dataclasses.asdict(self.recorded)
        requests = [part.request_ids for part in self.parts]
        told = [
            self.name,
            self.content,
            requests,
            recorded,
            self.header,
            self.about,
            __version__,
            RESULT_VERSION,
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    @property
    def num_records(self) -> int:
        return sum(part.num_records for part in self.parts)


def find_work(
    folders: Sequence[Path], settings: ReplaySettings, shard: tuple[int, int] = (0, 1)
) -> list[Work]:
    """The parts of these runs, or those of shard (i, n): every n-th file where files hold whole requests,
    else every n-th part. A shard may have none.

    Raises `UserError` for a run that cannot be replayed, naming why.
    """
    index, count = shard
    turns = itertools.count()
    work: list[Work] = []
    names = [folder.absolute().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder.resolve()) for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        run = RunReader(folder)
        recorded = Recorded.of(run.manifest, settings, str(folder))
        header = _header(run.manifest, recorded, settings)
        about = _about(run, str(folder), settings)
        if run.is_for_replay and settings.share != "prefix":
            paths = [path for path in run.step_paths if next(turns) % count == index]
            parts = selection_parts(run, paths=paths)
        else:  # requests that share lie in any file
            groups = {request: one.prefix.group for request, one in about.items() if one.prefix}
            parts = [part for part in selection_parts(run, groups=groups) if next(turns) % count == index]
        known = {folder / file: told for file, told in (run.manifest.get("files") or {}).items()}
        paths = sorted({span.path for part in parts for span in part.spans})
        digests = {path: _digest(path, known.get(path)) for path in paths}
        size = -(-len(parts) // MOST_WORK) or 1
        for together in (tuple(parts[i : i + size]) for i in range(0, len(parts), size)):
            content = "".join(sorted(digests[span.path] for part in together for span in part.spans))
            requests = (request for part in together for request in part.request_ids)
            facts = {request: about[request] for request in requests if request in about}
            tells = "answer_end" in run.manifest
            work.append(Work(folder, name, together, content, recorded, header, facts, tells))
    if next(turns) == 0:
        raise UserError(
            f"{', '.join(map(str, folders))}: no step was recorded, so there is nothing to replay"
        )
    return work


def _about(run: RunReader, name: str, settings: ReplaySettings) -> dict[str, About]:
    about: dict[str, About] = {}
    if "answer_end" in run.manifest:
        lines = run.requests()
        about = {line["request_id"]: About(line.get("answer_tokens")) for line in lines}
    if settings.share == "prefix":
        trace = run.manifest["trace"]
        prefixes = find_prefixes(
            beginnings_of(run, name), trace["prefix_key_tokens"], trace["block_size_tokens"]
        )
        about |= {one: about.get(one, About())._replace(prefix=prefix) for one, prefix in prefixes.items()}
    return about


def _digest(path: Path, known: Mapping[str, Any] | None) -> str:
    """As the manifest has it, of a file that still has its size."""
    if known is None or path.stat().st_size != known["bytes"]:
        known = digest_of(path)
    return str(known["sha256"])


def _header(manifest: Mapping[str, Any], recorded: Recorded, settings: ReplaySettings) -> dict[str, Any]:
    per_id, selection = recorded.per_block(settings), recorded.selection
    return {
        "settings": settings.to_json(),
        "unit": f"block of {settings.block}" if settings.block else selection.unit,
        "unit_tokens": recorded.tokens_per_id(settings),
        "id_kind": selection.id_kind,
        "door": selection.door,
        "top_k": [layer.top_k for layer in selection.layers if layer.heads],
        "bytes_per_id": recorded.bytes_per_id and recorded.bytes_per_id * per_id,
        "index_bytes_per_id": recorded.index_bytes_per_id and recorded.index_bytes_per_id * per_id,
        "model_config_digest": manifest["model_config_digest"],
        "selections": manifest["selections"],
        "keeps_order": bool(manifest["trace"]["keep_order"]),
    }
