"""All that `dsatrace report` tells of a folder, a run's or a study's: lines and tables, also in Python.

show(report_parts(folder))
dsatrace.tables("outputs/mine")["Scores"].to_pandas()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trace.reader import RunReader
from ..trace.url import run_path
from .grid import Grid
from .study_folder import is_study, study_parts
from .tables import run_tables

if TYPE_CHECKING:
    from ..trace.frame import Frame


def report_parts(folder: Path) -> Iterator[str | Grid]:
    """In the order in which they are printed. Raises `UserError` for what is neither a run nor a study."""
    return study_parts(folder) if is_study(folder) else run_tables(RunReader(folder))


def tables(folder: str | Path) -> dict[str, Frame]:
    """Every table of `dsatrace report` as a data frame, by its title. Shares are of 1, times as titled."""
    place = run_path(folder) if isinstance(folder, str) else folder
    grids = (part for part in report_parts(place) if isinstance(part, Grid))
    return {grid.title: grid.frame() for grid in grids}


def parts_json(parts: Iterable[str | Grid]) -> dict[str, Any]:
    """The lines, and the tables with numbers for texts."""
    kept = list(parts)
    return {
        "lines": [part for part in kept if isinstance(part, str)],
        "tables": [part.to_json() for part in kept if isinstance(part, Grid)],
    }
