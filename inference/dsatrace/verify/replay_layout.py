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

_KEYS = ("request_id", "layer_id", "kv_head", "step_idx")


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
        heads = table["kv_head"].to_pylist() if "kv_head" in table.schema.names else [None] * len(layers)
        sets = [(layer, head or 0) for layer, head in zip(layers, heads, strict=True)]
        compare(known.get("records"), len(requests), f"files.{name}.records")
        compare(known.get("requests"), len(set(requests)), f"files.{name}.requests")
        before = None
        for request, set_, step in zip(requests, sets, steps, strict=True):
            if before is None or before[0] != request:
                require(request not in seen, f"files.{name}", request, "a request that stands elsewhere too")
                seen.add(request)
            else:
                rule = f"after layer {before[1][0]}, step {before[2]} of request {request}"
                require((set_, step) > before[1:], f"files.{name}", [set_[0], step], rule)
            before = request, set_, step
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
            names = [name for name in _KEYS if name in file.schema_arrow.names]
            return file.read(names)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{run.folder / name}: cannot read it: {error}; export the run again") from error
