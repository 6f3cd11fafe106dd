"""Looks at every row of captures, and says what their ids are and what is wrong with them.

captures = open_captures([Path("responses.jsonl")], "sglang", described)
examined = examine(paths, "sglang", described, captures)
list(examined.findings()), list(examined.problems())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from dsatrace.captures.description import Description
from dsatrace.captures.detector import Broken, Detector, Found, PhaseFound
from dsatrace.captures.formats import FORMATS
from dsatrace.captures.rows import Advance, Capture, WithoutSets, one_shape, silent_sets, unwatched
from dsatrace.errors import UserError
from dsatrace.text import counted, plain
from dsatrace.trace.kind import SelectionKind


@dataclasses.dataclass(frozen=True)
class Examined:
    """Captures, and what the detector found in them."""

    paths: Sequence[Path]
    format: str
    captures: Sequence[Capture]
    kind: SelectionKind  # as if ids were positions
    found: Found
    described: Description
    num_silent: int = 0  # layers that hold zeros only

    @property
    def id_kind(self) -> Literal["position", "slot"]:
        """What a run's ids are called: only what is proven, or declared, is called a position."""
        if self.kind.unit == "expert":
            return "position"
        if self.described.ids is not None:
            return self.described.ids
        judged = self.found.decode if self.found.decode.rows else self.found.prompt
        return "position" if judged.what in ("position", "ragged") else "slot"

    def findings(self) -> Iterator[str]:
        """What was found and concluded, one line each."""
        requests = sum(len(capture.requests) for capture in self.captures)
        of_heads = f" of {self.described.heads} KV heads" if (self.described.heads or 1) > 1 else ""
        yield (
            f"requests: {requests:,}; a row holds {len(set(self.kind.set_layers))} layers{of_heads}, up to "
            f"{self.kind.max_width} ids each"
        )
        for capture in self.captures:
            yield from capture.notes
        if self.num_silent:
            yield f"layers left out: {self.num_silent} that hold zeros only, so they select nothing"
        held = {request.name for capture in self.captures for request in capture.requests}
        if absent := [name for name in self.described.requests if plain(name, 200) not in held]:
            number = counted(len(absent), "request")
            yield f"described and not captured: {number}, the first {plain(absent[0])}"
        found = self.found
        for name, phase in (("prompt", found.prompt), ("decode", found.decode)):
            if phase.rows:
                yield f"{name} rows: {phase.rows:,}, {_said(phase, self.kind)}"
            if phase.what == "slot" and phase.first_broken and self.id_kind == "slot":
                yield f"{name} ids are no positions: {self._where(phase.first_broken)}"
            if phase.not_captured:
                request, position = phase.first_not_captured or ("", 0)
                yield (
                    f"{name} rows left out: {phase.not_captured:,} of zeros, which were never captured, the "
                    f"first of request {plain(request)} at position {position}"
                )
        if self.id_kind == "slot" and found.decode.what == "undetermined":
            known = FORMATS[self.format].when_positions
            yield (
                "decode ids are recorded as slots: past top-k, slots can pass for positions; "
                f"if {known}, say --ids position"
            )
        elif self.described.ids == "position" and found.decode.what == "undetermined":
            yield "ids are recorded as positions, since you say so (--ids position) and no row contradicts"
        if found.overlaps.share is not None:
            yield (
                f"step overlap past top-k: {found.overlaps.share:.1%}, by chance {found.overlaps.chance:.1%}"
            )
        if shared := found.shared_with_before:
            layers = self.kind.set_layers
            pairs = ", ".join(f"{layers[s]}={layers[s - 1]}" for s in shared[:16])
            yield f"layers equal to the one before them in every row: {pairs}{' ...' * (len(shared) > 16)}"

    def problems(self, of_prompt: bool = True) -> Iterator[str]:
        """What makes it another thing than it claims to be, each with a remedy; without what only the
        prompt's rows suffer from unless `of_prompt`."""
        found, declared = self.found, self.described.ids
        if not found.rows:
            yield "holds no rows: the engine captured nothing; check its flags and its log"
            return
        if found.prompt.what in ("not captured", "no rows") and found.decode.what in (
            "not captured",
            "no rows",
        ):
            yield f"none of its {found.rows:,} rows was captured: all are zeros; check the engine's flags"
            return
        for name, phase in (("decode", found.decode), ("prompt", found.prompt)):
            broken = phase.first_broken
            if broken is None or (phase is found.prompt and not of_prompt):
                continue
            if declared == "slot" and not phase.miscounted:
                continue  # whatever they pass for
            if self.kind.unit == "expert":
                yield f"{self._where(broken)}: no routing of experts; correct --top-k, --experts or --layers"
            elif phase.what == "mixed" and phase.proven:
                yield (
                    f"{name} rows are mixed: {phase.proven:,} are positions, and {phase.broken:,} are not: "
                    f"{self._where(broken)}; {FORMATS[self.format].remedy}"
                )
            elif phase.what == "mixed":
                yield (
                    f"{self._where(broken)}; either --start, --layers or --top-k is not the capture's, or "
                    f"the row is another request's: {FORMATS[self.format].remedy}"
                )
            elif declared == "position" and phase is found.decode:
                yield (
                    f"said to be positions, but {self._where(broken)}; these are {phase.what}s; "
                    f"{FORMATS[self.format].remedy}"
                )
        fits = not (found.decode.miscounted or found.prompt.miscounted)
        if fits and self.inactive is not None:
            yield self.inactive

    @property
    def inactive(self) -> str | None:
        """The problem that no set shows sparse attention at work; None where one does, or none could."""
        if self.kind.unit == "expert":
            return None
        are_positions = (self.described.ids or self.found.decode.what) == "position"
        why = self.found.inactive(are_positions, self.kind.max_width)
        remedy = "check that the engine ran it" if self.found.sparse_records else "capture a longer context"
        return why and f"{why}; {remedy}"

    def _where(self, broken: Broken) -> str:
        layer, head = self.kind.set_layers[broken.set_index], self.kind.set_heads[broken.set_index]
        of_head = "" if head is None else f", KV head {head}"
        return (
            f"request {plain(broken.request)}, row of position {broken.position}, layer {layer}{of_head}: "
            f"{broken.why}"
        )


def _said(phase: PhaseFound, kind: SelectionKind) -> str:
    if kind.unit == "expert":
        return "experts" if not phase.broken else f"{phase.broken:,} of them no routing"
    what = {
        "position": f"positions ({phase.proven:,} rows within top-k prove it)",
        "ragged": "offsets into a batch, repaired: minus row 0's id",
        "slot": f"the engine's slots ({phase.broken:,} rows cannot be positions)",
        "undetermined": "undetermined: no row within top-k proves what the ids are",
        "mixed": f"mixed: {phase.broken:,} rows contradict the others"
        if phase.proven
        else f"neither positions nor slots: {phase.broken:,} rows",
        "not captured": "never captured",
        "no rows": "none",
    }[phase.what]
    return what + (f"; {phase.future:,} with future ids, which are cut" if phase.future else "")


def open_captures(
    paths: Sequence[Path], format: str, described: Description, advance: Advance = unwatched
) -> list[Capture]:
    """Looks through the files for the requests that they hold; only text is read for that as a whole."""
    taken: set[str] = set()
    return [FORMATS[format].open(path, described, taken, advance) for path in paths]


def examine(
    paths: Sequence[Path],
    format: str,
    described: Description,
    captures: Sequence[Capture],
    advance: Advance = unwatched,
) -> Examined:
    """Every row through the detector. Raises `UserError` for captures without a row."""
    requests = [request for capture in captures for request in capture.requests]
    if not sum(request.num_rows for request in requests):
        raise UserError(
            f"{plain(paths[0])}: holds no rows: the engine captured nothing; check its flags and its log"
        )
    opened = zip(paths, captures, strict=True)
    shape = one_shape([(str(path), capture.shape) for path, capture in opened if capture.requests])
    if described.top_k not in (None, shape[1]):
        raise UserError(
            f"--top-k {described.top_k}: rows of {plain(paths[0])} hold {shape[1]} ids; correct it"
        )
    for path, capture in zip(paths, captures, strict=True):
        if capture.said != captures[0].said:
            raise UserError(
                f"{plain(path)}: says of its ids what {plain(paths[0])} does not say; import them apart"
            )
    described = described.with_said(captures[0].said)
    silent = silent_sets(captures) if (described.heads or 1) == 1 else []
    if silent:
        layers = described.layer_ids or list(range(shape[0]))
        if len(layers) == shape[0]:
            kept = [layer for s, layer in enumerate(layers) if s not in silent]
            described = described.with_layers(kept)
            captures, shape = [WithoutSets(one, silent) for one in captures], (len(kept), shape[1])
    kind = described.kind(FORMATS[format].unit, shape)
    detector = Detector(kind)
    for capture in captures:
        left = [request.num_rows for request in capture.requests]
        for chunk in capture.chunks({}, advance):
            request = capture.requests[chunk.request]
            detector.add(request.name, chunk.first, request.prompt_tokens, chunk.ids)
            left[chunk.request] -= len(chunk.ids)
            if not left[chunk.request]:
                detector.end(request.name)
    return Examined(paths, format, captures, kind, detector.found(), described, len(silent))
