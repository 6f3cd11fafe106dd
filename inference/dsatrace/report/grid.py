"""A table: printed in a terminal, as markdown to paste into a report, as JSON, or as a data frame.

A cell is a text, and one that shows a number is a `Cell`, which keeps it.

    grid = Grid("Scores", ("group", "mean"), [("all", number(71.428, ".2f"))])
    console.print(grid)                          # rich asks for __rich__
    grid.markdown()
    grid.to_json()["rows"]                       # [["all", 71.428]]
    grid.frame().to_pandas()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..text import plain
from ..units import size_text

if TYPE_CHECKING:
    from ..trace.frame import Frame

NONE = "-"
"""Shown where a value does not exist."""
MAX_ROWS = 64
"""Printed of a table that grows with the data."""
MAX_CELL_CHARS = 400
WIDTH, WIDE = 100, 120
"""Columns of a terminal that a table of a run and one of a study take at most."""


class Cell(str):
    """The text of a cell that shows a number, or several, or that there is none (`value` is None)."""

    __slots__ = ("value",)
    value: Any

    def __new__(cls, text: str, value: Any) -> Cell:
        cell = super().__new__(cls, text)
        cell.value = value
        return cell


def number(value: float | None, form: str = "", unit: str = "", none: str = NONE) -> Cell:
    """A value in the format `form`, its unit behind it; `none` where there is none."""
    return Cell(none if value is None else f"{value:{form}}{unit}", value)


def size(num_bytes: float | None) -> Cell:
    """Bytes, as people read them."""
    return Cell(NONE if num_bytes is None else size_text(num_bytes), num_bytes)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Columns are flush right except those in `left`. Without any column name there is no header.

    At most `most` rows are printed, and then a line says how many more there are, and where.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)
    note: str = ""  # below the table
    most: int | None = None
    rest: str = "summary.json"  # has the rows that are not printed

    def _printed(self) -> Iterable[Sequence[str]]:
        yield from self.rows[: self.most]
        if self.most is not None and len(self.rows) > self.most:
            yield (f"... and {len(self.rows) - self.most} more in {self.rest}",)

    def to_json(self) -> dict[str, Any]:
        """Title, columns, all rows, note; a cell is its number, null where it has none, or its text."""
        rows = [[_value(cell) for cell in row] for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "note": self.note}

    def frame(self) -> Frame:
        """All rows. A column of numbers alone holds those, another one its cells' texts.

        A column without a name is called `name` if it is the first, else `value`; of several with one name
        the later ones are numbered.
        """
        from ..trace.frame import Frame

        columns = [[row[i] if i < len(row) else "" for row in self.rows] for i in range(len(self.columns))]
        names: list[str] = []
        for i, column in enumerate(self.columns):
            name = column or ("value" if i else "name")
            same = sum(known == name or known.startswith(f"{name} (") for known in names)
            names.append(f"{name} ({same + 1})" if same else name)
        return Frame.of(dict(zip(names, map(_of_one_type, columns), strict=True)))

    def __rich__(self) -> Group:
        """The title stands above the table, where a narrow table does not fold it."""
        table = Table(show_header=any(self.columns))
        for i, column in enumerate(self.columns):
            table.add_column(
                Text(plain(column, MAX_CELL_CHARS)),
                justify="left" if i in self.left else "right",
                overflow="fold",
            )
        for row in self._printed():
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
        parts = [f"**{plain(self.title)}**", "", line(self.columns), rule, *map(line, self._printed()), ""]
        return "\n".join([*parts, plain(self.note), ""] if self.note else parts)


def _value(cell: str) -> Any:
    return cell.value if isinstance(cell, Cell) else cell


def _of_one_type(cells: Sequence[str]) -> list[Any]:
    """Numbers and None where all cells are, empty ones too; else texts, None where a cell shows none."""
    values = [None if cell == "" else _value(cell) for cell in cells]
    if all(value is None or type(value) in (int, float) for value in values):
        kinds = {type(value) for value in values if value is not None}
        return values if len(kinds) < 2 else [None if value is None else float(value) for value in values]
    return [None if isinstance(cell, Cell) and cell.value is None else f"{cell}" for cell in cells]


def percent(part: float, whole: float = 1) -> Cell:
    """`12.3%`, or `none` where there is nothing to divide by; the value is the share."""
    share = part / whole if whole else None
    return number(share, ".1%", none="none")


def show(parts: Iterable[str | Grid], width: int = WIDTH) -> None:
    """Prints tables and lines on the terminal. A line is no markup."""
    console = Console(width=width)
    for part in parts:
        console.print(Text(plain(part)) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
