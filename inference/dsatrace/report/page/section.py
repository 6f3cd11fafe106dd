"""One section of the page: a figure or a table, what it says, and the command that gives its numbers.

Knows no run. Everything that is not marked as HTML is escaped here, once.

    cells = [number(4096, ","), percent(0.134)]
    Section("curve", "How large must it be?", line_chart(...), "Misses are ...", "dsatrace replay RUN",
            (("size", "LRU"), [cells])).html()
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from ...text import plain
from ..grid import Cell

Row = Sequence[str]
Table = tuple[Sequence[str], Sequence[Row]]
"""The columns' names and the rows; a cell that shows a number is a `grid.Cell`, which keeps it."""


def told(value: object, max_chars: int | None = 400) -> str:
    """Text from anywhere as HTML text, or as an attribute's value in double quotes."""
    return escape(plain(value, max_chars))


def prose(text: str) -> str:
    """The same of sentences, in which commands stand in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", told(text, None))


@dataclasses.dataclass(frozen=True)
class Section:
    """`body` is HTML that its maker has escaped; all else is plain text."""

    key: str  # the element's id
    title: str  # the question, or the answer
    body: str
    note: str  # definition, denominator, sample size, measured or modelled
    command: str  # gives the same numbers in a terminal; a line each; "" for none
    table: Table | None = None  # what the figure shows, to read and to copy
    is_open: bool = False  # the table is shown at once

    def html(self) -> str:
        heading = f'<h2 id="{self.key}-title"><a href="#{self.key}">{told(self.title)}</a></h2>'
        parts = [f'<section id="{self.key}" aria-labelledby="{self.key}-title">', heading, self.body]
        if self.note:
            parts.append(f'<p class="note">{prose(self.note)}</p>')
        if self.table is not None:
            parts.append(_numbers(self.key, self.title, self.table, self.is_open))
        parts += [
            f'<p class="command"><code>{told(line, None)}</code></p>'
            for line in self.command.split("\n")
            if line
        ]
        return "\n".join([*parts, "</section>"])


def figures_html(parts: Sequence[str]) -> str:
    """A paragraph of texts and numbers in turn; each number stands whole in the page too."""
    if not parts:
        return ""
    return f'<p class="answer">{"".join(map(figure_html, parts))}</p>'


def figure_html(part: str) -> str:
    """A text, or a number with its whole value."""
    shown = told(part, None)
    return f'<data value="{told(_value(part.value))}">{shown}</data>' if isinstance(part, Cell) else shown


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A section that this run has no data for, and why: a clause that follows its title and a colon."""

    title: str
    why: str


def _numbers(key: str, title: str, table: Table, is_open: bool) -> str:
    """The table, mostly closed at first, with a button that copies it."""
    state = ' whole" open' if is_open else '"'
    return (
        f'<details class="numbers{state}><summary>Numbers</summary>'
        f'<button type="button" class="copy" data-table="{key}-table">Copy CSV</button>'
        f"{table_html(table, title, f'{key}-table')}</details>"
    )


def table_html(table: Table, caption: str, key: str = "") -> str:
    """The table in a frame that scrolls; a number's cell holds it whole in `data-value`."""
    columns, rows = table
    named = f' id="{key}"' if key else ""
    head = "".join(_head(name, [row[i] for row in rows if i < len(row)]) for i, name in enumerate(columns))
    head = f"<thead><tr>{head}</tr></thead>\n" if any(columns) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row, range(len(row))))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{told(caption)}"><table{named}>'
        f"<caption>{told(caption)}</caption>{head}<tbody>{body}</tbody></table></div>"
    )


def _head(name: str, cells: Sequence[str]) -> str:
    """A column's name, flush right where most of its cells are numbers, which are."""
    num_numbers = sum(isinstance(cell, Cell) for cell in cells)
    kind = ' class="number"' if 2 * num_numbers > len(cells) else ""
    return f'<th scope="col"{kind}>{told(name)}</th>'


def _cell(cell: str, column: int) -> str:
    if isinstance(cell, Cell):
        return f'<td class="number" data-value="{told(_value(cell.value))}">{told(cell)}</td>'
    return f'<th scope="row">{told(cell)}</th>' if column == 0 else f"<td>{told(cell)}</td>"


def _value(value: Any) -> str:
    """As Python writes it, which gives the same number when read; empty for none."""
    return "" if value is None else f"{value}"
