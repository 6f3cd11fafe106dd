"""From captures that were examined to a run.

The captures are read a second time, a few rows at a time, and the run's folder appears whole or not at
all. Rows that were never captured split a request: each stretch of rows without a gap is a request of
the run, so that its steps are consecutive.

    imported = write_run(examined, Path("outputs/mine"))
    imported.num_rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from dsatrace.captures.examine import Examined
from dsatrace.captures.formats import FORMATS
from dsatrace.captures.rows import Advance, Capture, CapturedRequest, request_name, unwatched
from dsatrace.errors import UserError
from dsatrace.flags import Flag, check, flags_of
from dsatrace.kv.layout import named_layouts
from dsatrace.text import plain
from dsatrace.trace.capture import StepCapture
from dsatrace.trace.config import TraceConfig
from dsatrace.trace.export import new_folder
from dsatrace.trace.kind import SelectionKind
from dsatrace.trace.manifest import RunInfo
from dsatrace.trace.request_facts import RecordedRequest, RequestFacts
from dsatrace.trace.tracer import Tracer

PromptRows = Literal["last", "off", "all"]
LAYOUTS = named_layouts(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """How a run is made of a capture."""

    prompt_rows: Annotated[
        PromptRows,
        Flag(
            "rows of the prompt to record; last: where every request has it and its ids are positions; "
            "all: from position 0 on, or nothing is imported"
        ),
    ] = "last"
    allow_inactive: Annotated[bool, Flag("import a capture in which sparse attention was never active")] = (
        False
    )
    cache_layout: Annotated[
        str, Flag("bytes per token that are counted: those of DeepSeek-V3.2 in it", choices=tuple(LAYOUTS))
    ] = "serving_fp8"
    block_size: Annotated[int, Flag("tokens in a block", ("--kv-block-size",), at_least=1)] = (
        TraceConfig.block_size
    )
    format: Annotated[
        Literal["jsonl", "parquet"], Flag("what step records are written as", ("--trace-format",))
    ] = "jsonl"

    def __post_init__(self) -> None:
        check(self)


IMPORT_FLAGS = flags_of(ImportSettings)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    num_requests: int
    num_rows: int
    prompt_rows: PromptRows


def write_run(
    examined: Examined,
    out: Path,
    settings: ImportSettings | None = None,
    advance: Advance = unwatched,
    argv: Sequence[str] = (),
) -> Imported:
    """Writes the run; `out` must be new or empty. Raises `UserError`, and leaves nothing behind."""
    settings = settings or ImportSettings()
    prompt = examined.found.prompt
    needs_prompt = examined.id_kind == "position" or prompt.miscounted > 0  # miscounted: a wrong --start
    for problem in examined.problems(of_prompt=settings.prompt_rows != "off" and needs_prompt):
        is_inactive = problem == examined.inactive
        if not (settings.allow_inactive and is_inactive):
            remedy = ", or add --allow-inactive" if is_inactive else ""
            raise UserError(f"{plain(examined.paths[0])}: {problem}{remedy}")
    shape = len(examined.kind.set_layers), examined.kind.max_width
    unit = FORMATS[examined.format].unit
    kind = examined.described.kind(unit, shape, examined.id_kind, _anchors(examined))
    prompt_rows = _prompt_rows(examined, settings.prompt_rows)
    num_decode = sum(
        max(one.end - one.prompt_tokens, 0) for capture in examined.captures for one in capture.requests
    )
    if not num_decode and prompt_rows != "all":
        raise UserError(
            f"{plain(examined.paths[0])}: holds no rows of decode steps; to record the prompt's, say "
            "--prompt-rows all"
        )
    try:
        with new_folder(out) as folder:
            config = TraceConfig(
                folder,
                block_size=settings.block_size,
                format=settings.format,
                prefill=prompt_rows,
            )
            run = RunInfo(
                model_config={"name": examined.described.model or "unknown"},
                layouts=(LAYOUTS[settings.cache_layout],),
                device="unknown",
                argv=argv,
                data_source=f"{examined.format}: {', '.join(path.name for path in examined.paths)}",
                kind=kind,
            )
            with Tracer(config, run) as tracer:
                writer = _Writer(tracer, kind, examined)
                for capture in examined.captures:
                    writer.write(capture, prompt_rows, advance)
                tracer.describe_workload(
                    {
                        "name": "import",
                        "counts": {
                            "rows": writer.num_rows,
                            "rows_never_captured": writer.num_left_out,
                            "captured_requests": sum(len(one.requests) for one in examined.captures),
                        },
                    }
                )
            if not writer.num_rows:
                raise UserError(f"{plain(examined.paths[0])}: none of its decode rows was captured")
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write there: {error.strerror}") from error
    return Imported(out, writer.num_requests, writer.num_rows, prompt_rows)


def _anchors(examined: Examined) -> dict[int, int]:
    """Of each shared layer, the one whose selection it is; only where a layer has one set."""
    if (examined.described.heads or 1) > 1 or examined.kind.unit == "expert":
        return {}
    anchors: dict[int, int] = {}
    for s in examined.found.shared_with_before:
        anchors[s] = anchors.get(s - 1, s - 1)
    return anchors


def _prompt_rows(examined: Examined, asked: PromptRows) -> PromptRows:
    """Those that are recorded: what is asked for, or off where not every request has those rows, captured,
    with ids in the decode rows' own space. Raises `UserError` where all are asked for and there are not."""
    prompt, decode = examined.found.prompt, examined.found.decode
    is_declared = examined.described.ids == "position" and prompt.what == "undetermined"
    is_known = is_declared or prompt.what in ("position", "ragged") or examined.kind.unit == "expert"
    requests = [one for capture in examined.captures for one in capture.requests]
    reasons = {
        "the ids are slots": examined.id_kind == "slot",
        f"the ids of its rows are {prompt.what}": not is_known,
        "some rows were never captured": prompt.not_captured + decode.not_captured > 0,
        "some requests lack rows of it": any(
            one.first > _first_recorded(one, asked) or one.prompt_tokens > one.end for one in requests
        ),
        "its first rows see no whole entry": asked == "all" and examined.kind.unit == "entry",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if asked == "all" and found:
        raise UserError(f"--prompt-rows all: {found[0]}; use last, or off")
    return "off" if found else asked


def _first_recorded(request: CapturedRequest, prompt_rows: PromptRows) -> int:
    """Position of its first row that is recorded."""
    return {"off": request.prompt_tokens, "last": request.prompt_tokens - 1, "all": 0}[prompt_rows]


class _Writer:
    """Puts rows, and begins a new request of the run after each gap."""

    def __init__(self, tracer: Tracer, kind: SelectionKind, examined: Examined) -> None:
        self._tracer, self._kind, self._bases = tracer, kind, examined.found.bases
        self._names = {one.name for capture in examined.captures for one in capture.requests}
        # Captured request -> the run's, its next position.
        self._open: dict[str, tuple[RecordedRequest, int]] = {}
        self.num_requests = self.num_rows = self.num_left_out = 0

    def write(self, capture: Capture, prompt_rows: PromptRows, advance: Advance) -> None:
        starts = {i: _first_recorded(one, prompt_rows) for i, one in enumerate(capture.requests)}
        for chunk in capture.chunks(starts, advance):
            captured = capture.requests[chunk.request]
            ids = self._as_recorded(captured, chunk.first, chunk.ids)
            for row in range(len(ids)):
                self._put(captured, chunk.first + row, ids[row])
            if chunk.first + len(ids) >= captured.end:
                self._end(captured)

    def _as_recorded(self, captured: CapturedRequest, first: int, ids: np.ndarray) -> np.ndarray:
        """Rows without what their queries cannot see, and with positions for offsets."""
        position = first + np.arange(len(ids))
        if base := self._bases.get(captured.name, 0):
            is_prompt = (position < captured.prompt_tokens)[:, None, None]
            ids = np.where(is_prompt & (ids >= 0), ids - base, ids)
        visible = self._kind.visible(position + 1)
        is_dense = (visible <= self._kind.max_width)[:, None, None]
        if self._kind.id_kind == "position" and is_dense.any():
            ids = np.where(is_dense & (ids >= visible[:, None, None]), -1, ids)
        return np.asarray(ids, dtype=np.int32)

    def _put(self, captured: CapturedRequest, position: int, ids: np.ndarray) -> None:
        is_zero = (ids == 0).all(axis=1) & (self._kind.top_k > 1)
        if is_zero.any() or (ids < 0).all(axis=1).any():
            self.num_left_out += 1
            return
        request, expected = self._open.get(captured.name, (None, position))
        if request is None or position != expected:
            request = self._begin(captured, position)
        num_prompt = len(request.prompt_token_ids)
        self._tracer.put(
            StepCapture(
                phase="prefill" if position < num_prompt else "decode",
                request_ids=(request.request_id,),
                step_idx=(position - num_prompt,),
                seq_len=np.array([position + 1], dtype=np.int32),
                batch_size=1,
                positions=ids[:, None, :],
                score_stats=None,
                scores=None,
                prefixes=(),
                forward_idx=self.num_rows,
                step_wall_us=None,
                step_synced=None,
            )
        )
        self.num_rows += 1
        self._open[captured.name] = request, position + 1

    def _begin(self, captured: CapturedRequest, position: int) -> RecordedRequest:
        is_first = captured.name not in self._open
        if not is_first:
            self._end(captured)
        name = captured.name if is_first else request_name(f"{captured.name} from {position}", self._names)
        request = RecordedRequest(name, range(max(captured.prompt_tokens, position)))
        self._tracer.add_request(request)
        self.num_requests += 1
        return request

    def _end(self, captured: CapturedRequest) -> None:
        if captured.name not in self._open:
            return
        request, end = self._open.pop(captured.name)
        num_output = end - len(request.prompt_token_ids) + 1  # the last one is never fed back
        state = captured.state if end == captured.end else "length"
        self._tracer.finish_request(request, RequestFacts(num_output_tokens=num_output, state=state))
