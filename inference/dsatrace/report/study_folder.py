"""A study's folder as the tables that the study printed, read back from its JSON, and its pictures
from these and its CSV files. Computes nothing.

if is_study(folder):
    show(study_parts(folder), WIDE)
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json
from ..study.compare import Comparison, Difference
from ..study.engine_check import EngineCheck
from ..study.explain import Definition
from ..study.output_folder import MANIFEST_FILE, OutputFolder
from ..study.sweep_cells import Cell
from . import study_figures as figures
from .grid import Grid
from .study_tables import (
    about_text,
    cache_text,
    compare_grids,
    engine_grid,
    explain_grid,
    mixed_grids,
    noted,
    rejected_grid,
    run_grids,
    size_grid,
    sweep_grids,
)

Record = Mapping[str, Any]
_FAULTS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What a file that is not a study's result raises when it is taken for one."""


def is_study(folder: Path) -> bool:
    """Whether its manifest is a study's; False too if there is none that can be read."""
    try:
        return "study" in json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def study_parts(folder: Path) -> Iterator[str | Grid]:
    """A line on the study, its tables, and the folder. Raises `UserError` for a file that is no result."""
    manifest = _read(folder / MANIFEST_FILE)
    yield f"study {manifest['study']}, {manifest.get('state')}, started {manifest.get('started_utc')}"
    num_tables = 0
    for path in _results(folder, manifest):
        try:
            grids = list(_grids(manifest["study"], path))
        except _FAULTS as error:
            raise UserError(f"{path}: not a result of a study: {error!r}; run the study again") from error
        num_tables += len(grids)
        yield from noted(grids, manifest)
    if not num_tables:
        yield "There is no table: the study wrote traces or pictures only, or it did not end."
    yield f"files: {folder}"


def draw_again(folder: Path, output: OutputFolder) -> Iterator[str]:
    """Draws a study's pictures from its files into another folder; yields a line for each, and for those
    that the files do not hold."""
    manifest = _read(folder / MANIFEST_FILE)
    given = manifest.get("source", {})
    paths = [given["path"]] if "path" in given else [file["path"] for file in given.get("files", ())]
    source = " ".join((given.get("kind", "unknown source"), *paths, *given.get("workloads", ())))
    for path in _results(folder, manifest):
        record = _read(path)
        suffix = path.stem.removeprefix("comparison") if "per_turn" in record else ""
        try:
            if "cells" in record:
                cells = [_of(Cell, row) for row in record["cells"]]
                draw = figures.draw_all_mixed if manifest["study"] == "mixed" else figures.draw_all_capacities
                about = about_text(source, manifest, intervals=record.get("intervals"))
                yield from map(str, draw(output, about, cells))
            elif "curve" in record:
                picture = output.file("size.png")
                figures.draw_size(picture, about_text(source, manifest, "", record.get("intervals")), record)
                yield str(picture)
            elif isinstance(record.get("metrics", {}).get("num_requests"), dict):
                about = about_text(source, manifest, cache_text(record["cache"]), record.get("intervals"))
                picture = output.file(f"comparison{suffix}.png")
                figures.draw_comparison(picture, about, _comparison(record))
                yield str(picture)
        except _FAULTS as error:
            raise UserError(f"{path}: not a result of a study: {error!r}; run the study again") from error
    shares = {
        "request_metrics": ("sharing_fraction", "sharing_fraction_cdf", figures.draw_sharing),
        "block_metrics": ("hits", "block_hit_distribution", figures.draw_block_hits),
    }
    for table, (column, picture_name, draw_series) in shares.items():
        series = {
            path.stem.replace(f"_{table}", ""): _column(path, column)
            for path in sorted(folder.glob(f"*_{table}*.csv"))
        }
        if series:
            picture = output.file(f"{picture_name}.png")
            cache = cache_text(manifest["cache"]) if "cache" in manifest else "several caches"
            draw_series(picture, about_text(source, manifest, cache), series)
            yield str(picture)
    if any(folder.glob("*_block_metrics*.csv")):
        yield "reuse_gap_cdf.png: the files hold each block's mean gap and no others; run the study again"


def _column(path: Path, name: str) -> np.ndarray:
    """The numbers of a CSV's column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return np.array([float(row[name]) for row in csv.DictReader(file)])
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot read column {name}: {error!r}; run the study again") from error


def _results(folder: Path, manifest: Record) -> list[Path]:
    """The JSON files in the order that the study wrote them, which a study that did not end has not told."""
    there = sorted(path for path in folder.glob("*.json") if path.name != MANIFEST_FILE)
    written = manifest.get("files") or []
    return sorted(there, key=lambda path: written.index(path.name) if path.name in written else len(written))


def _grids(study: str, path: Path) -> Iterator[Grid]:
    """The tables of one file, which its content tells from the others in the folder."""
    record = _read(path)
    if "definitions" in record:
        lines = [_of(Definition, line | {"name": name}) for name, line in record["definitions"].items()]
        yield explain_grid(lines, record["cache"], record.get("intervals", {}))
        yield rejected_grid({"trace": record["rejected"]})
    elif "curve" in record:
        yield size_grid(record["curve"], record["recommendation"]["text"])
    elif "cells" in record:
        cells = [_of(Cell, row) for row in record["cells"]]
        yield from mixed_grids(cells) if study == "mixed" else sweep_grids(cells)
    elif "num_prefill_tokens" in record:
        yield engine_grid(_of(EngineCheck, record))
    elif "metrics" in record and study == "compare":
        if all(isinstance(both, dict) for both in record["metrics"].values()):  # else those of one trace
            yield from compare_grids(_comparison(record), record["cache"])
    elif "metrics" in record:
        yield from run_grids(record.get("trace", path.stem), record)


def _comparison(record: Record) -> Comparison:
    metrics = {
        name: Difference(name, both["single_turn"], both["multi_turn"])
        for name, both in record["metrics"].items()
    }
    return Comparison(metrics, record["per_turn"], record["rejected"], record.get("intervals", {}))


def _of(kind: type[Any], record: Record) -> Any:
    """The dataclass from its fields in a record, which may have more, and lack those with a default."""
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: record[name] for name in required} | {n: v for n, v in record.items() if n in known})


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path, unreadable="; check the folder", broken="; run the study again")
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a JSON object; run the study again")
    return record
