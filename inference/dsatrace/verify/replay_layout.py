"""A run laid out for replay: whole requests in one file each, by layer and step, as many as the manifest
says. What a record says is not derived again: its neighbours are those of another order.

    num_records, num_requests = check_layout(run)        # raises Mismatch
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsatrace.errors import UserError
from dsatrace.schema import STEPS_FOLDER
from dsatrace.verify.files import PlainRun
from dsatrace.verify.mismatch import compare, require

if TYPE_CHECKING:
    import pyarrow as pa


def check_layout(run: PlainRun) -> tuple[int, int]:
    """Returns the records and the requests."""
    seen: set[str] = set()
    num_records = 0
    for name, known in (run.manifest.get("files") or {}).items():
        if not name.startswith(f"{STEPS_FOLDER}/"):
            continue
        table = _keys_of(run, name)
        requests = table["request_id"].to_pylist()
        layers, steps = table["layer_id"].to_pylist(), table["step_idx"].to_pylist()
        compare(known.get("records"), len(requests), f"files.{name}.records")
        compare(known.get("requests"), len(set(requests)), f"files.{name}.requests")
        before = None
        for request, layer, step in zip(requests, layers, steps, strict=True):
            if before is None or before[0] != request:
                require(request not in seen, f"files.{name}", request, "a request that stands elsewhere too")
                seen.add(request)
            else:
                rule = f"after layer {before[1]}, step {before[2]} of request {request}"
                require((layer, step) > before[1:], f"files.{name}", [layer, step], rule)
            before = request, layer, step
        num_records += len(requests)
    return num_records, len(seen)


def _keys_of(run: PlainRun, name: str) -> pa.Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{run.folder}: holds Parquet, which pyarrow and numpy read; install them") from error
    try:
        with pq.ParquetFile(run.folder / name) as file:
            return file.read(["request_id", "layer_id", "step_idx"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{run.folder / name}: cannot read it: {error}; export the run again") from error
