"""A sweep's and a mix's cells as tables: hit rates in per cent, a policy a row. Computes nothing.

for grid in sweep_grids(cells):
    console.print(rich_table(grid))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..study.sweep_cells import OPT, OVERALL, Cell
from .study_tables import Grid


def sweep_grids(cells: Sequence[Cell]) -> Iterator[Grid]:
    """A table a workload and block size; columns are capacities."""
    for workload, size in dict.fromkeys((cell.workload, cell.block_size) for cell in cells):
        chosen = [cell for cell in cells if (cell.workload, cell.block_size) == (workload, size)]
        capacities = sorted({cell.capacity_blocks for cell in chosen})
        by_place = {(cell.policy, cell.capacity_blocks): cell for cell in chosen}
        rows = [
            (policy, *(_percent(by_place.get((policy, capacity))) for capacity in capacities))
            for policy in _opt_last(cell.policy for cell in chosen)
        ]
        for field in ("accesses", "rejected"):
            numbers = (getattr(by_place[OPT, capacity], field) for capacity in capacities)
            rows.append((field, *(f"{number:,}" for number in numbers)))
        yield Grid(
            f"{workload}, blocks of {size} tokens: hit rate in % of prompt blocks, "
            f"{chosen[0].requests:,} requests",
            ("policy", *(f"{capacity:,} blocks" for capacity in capacities)),
            rows,
        )


def mixed_grid(cells: Sequence[Cell]) -> Grid:
    """A policy a row, overall first and then each workload."""
    workloads = list(_unique(cell.workload for cell in cells))
    by_place = {(cell.policy, cell.workload): cell for cell in cells}
    rows = []
    for policy in _opt_last(cell.policy for cell in cells):
        overall = by_place[policy, OVERALL]
        counts = (f"{overall.hits:,}", f"{overall.misses:,}")
        rows.append((policy, *(_percent(by_place.get((policy, name))) for name in workloads), *counts))
    for field in ("requests", "rejected", "accesses"):
        rows.append((field, *(f"{getattr(by_place[OPT, name], field):,}" for name in workloads), "", ""))
    cell = cells[0]
    title = (
        f"Mixed: hit rate in % of prompt blocks, {cell.capacity_blocks} blocks of {cell.block_size} tokens"
    )
    return Grid(title, ("policy", *workloads, "hits", "misses"), rows)


def _percent(cell: Cell | None) -> str:
    return "-" if cell is None or not cell.accesses else f"{100 * cell.hit_rate:.2f}"


def _unique(names: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(names)


def _opt_last(policies: Iterable[str]) -> list[str]:
    """As they come, the bound below them."""
    names = list(_unique(policies))
    return [name for name in names if name != OPT] + [name for name in names if name == OPT]
