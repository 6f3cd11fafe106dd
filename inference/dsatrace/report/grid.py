"""A table as text: printed in a terminal, or as markdown to paste into a report.

console.print(Grid("Scores", ("group", "mean"), [("all", "71.43")]))      # rich asks for __rich__
print(grid.markdown())
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..text import plain

NONE = "-"
"""Shown where a value does not exist."""
MAX_ROWS = 64
"""Of a table that grows with the data."""
MAX_CELL_CHARS = 400
WIDTH, WIDE = 100, 120
"""Columns of a terminal that a table of a run and one of a study take at most."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Columns are flush right except those in `left`. Without any column name there is no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)
    note: str = ""  # below the table

    def __rich__(self) -> Group:
        """The title stands above the table, where a narrow table does not fold it."""
        table = Table(show_header=any(self.columns))
        for i, column in enumerate(self.columns):
            table.add_column(
                Text(plain(column, MAX_CELL_CHARS)),
                justify="left" if i in self.left else "right",
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(plain(cell, MAX_CELL_CHARS)) for cell in row))  # a name is not markup
        parts: list[Table | Text] = [Text(plain(self.title), style="bold"), table]
        if self.note:
            parts.append(Text(plain(self.note), style="dim italic"))
        return Group(*parts)

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            texts = (plain(cell, MAX_CELL_CHARS).replace("|", r"\|") for cell in cells)
            return f"| {' | '.join(texts)} |"

        rule = "|" + "|".join("---" if i in self.left else "---:" for i in range(len(self.columns))) + "|"
        parts = [f"**{plain(self.title)}**", "", line(self.columns), rule, *map(line, self.rows), ""]
        return "\n".join([*parts, plain(self.note), ""] if self.note else parts)


def percent(part: float, whole: float = 1) -> str:
    """`12.3%`, or `none` where there is nothing to divide by."""
    return f"{part / whole:.1%}" if whole else "none"


def first_rows(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """At most `MAX_ROWS`, and a row that says how many more there are in summary.json."""
    shown = list(rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        shown.append((f"... and {len(rows) - MAX_ROWS} more in summary.json",))
    return shown


def show(parts: Iterable[str | Grid], width: int = WIDTH) -> None:
    """Prints tables and lines on the terminal. A line is no markup."""
    console = Console(width=width)
    for part in parts:
        console.print(Text(plain(part)) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
