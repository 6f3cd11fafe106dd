"""What the records of a run say of its ids: the detector over a run's folder.

checked = check_run(Path("outputs/mine"))
checked.findings, checked.problems
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dsatrace.captures.detector import Detector, Found
from dsatrace.captures.run_arrays import kind_of, recorded_rows
from dsatrace.text import plain
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.reader import RunReader
from dsatrace.trace.selections import read_selections


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was concluded of a run, one line each."""

    findings: list[str]
    problems: list[str]


def check_run(folder: Path, advance: Callable[[int], None] = lambda num_records: None) -> Checked:
    """Raises `UserError` for a folder that is no run, or whose records hold no ids."""
    run = RunReader(folder)
    kind = kind_of(run)
    # A hook may see fewer ids than top-k: sets without those that attention reads in any case.
    detector, num_records = Detector(kind, False if kind.door in ("attach", "layerwise") else None), 0
    for request in read_selections(run):
        prompt_tokens = request.num_prompt_tokens or 0
        for first, ids in recorded_rows(request, kind):
            detector.add(request.request_id, first, prompt_tokens, ids)
            num_records += ids.shape[0] * ids.shape[1]
            advance(ids.shape[0] * ids.shape[1])
        detector.end(request.request_id)
    found = detector.found()
    return Checked(list(_findings(run, kind, found)), list(_problems(kind, found, num_records)))


def _findings(run: RunReader, kind: SelectionKind, found: Found) -> Iterator[str]:
    yield (
        f"door {kind.door}, {kind.unit} ids, {kind.id_kind}s: {found.rows:,} rows, {found.sparse_records:,} "
        f"records past top-k"
    )
    if found.sparse_records and kind.unit != "expert":
        num_active = found.num_active(kind.id_kind == "position")
        yield f"sparse attention was active in {num_active:,} of them"
    if found.overlaps.share is not None:
        yield f"step overlap past top-k: {found.overlaps.share:.1%}, by chance {found.overlaps.chance:.1%}"
    if shared := found.shared_with_before:
        layers = kind.set_layers
        yield "layers equal to the one before them in every row: " + ", ".join(
            f"{layers[s]}={layers[s - 1]}" for s in shared
        )
    if "scores" in kind.tells:
        margins = (record["kth_margin"] for record in run.steps(("kth_margin",)))
        ties = Counter(margin == 0 for margin in margins if margin is not None)
        if ties:
            yield f"ties at the k-th score: {ties[True]:,} of {ties.total():,} records"


def _problems(kind: SelectionKind, found: Found, num_records: int) -> Iterator[str]:
    if not num_records:
        yield "holds no step records: nothing was recorded"
        return
    for name, phase in (("prompt", found.prompt), ("decode", found.decode)):
        if phase.not_captured:
            request, position = phase.first_not_captured or ("", 0)
            yield (
                f"{phase.not_captured:,} {name} rows are zeros, the first of request {plain(request)} at "
                f"position {position}: never captured; capture it again"
            )
        broken = phase.first_broken
        if broken is not None and (kind.id_kind == "position" or phase.miscounted):
            yield (
                f"{phase.broken:,} {name} rows are no {kind.id_kind}s, the first of request "
                f"{plain(broken.request)} at position {broken.position}, layer "
                f"{kind.set_layers[broken.set_index]}: {broken.why}"
            )
    if kind.unit != "expert" and (why := found.inactive(kind.id_kind == "position", kind.max_width)):
        yield why
