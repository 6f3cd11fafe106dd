"""A report's page, read back: its elements, its tables' numbers, its heat maps, every place it points to.

page = Page(path.read_text())
page.column("curve", "lru missed")      # [0.433, ...], None where a cell holds none
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from dsatrace.report.page.svg import text_width

SMALL_SWEEP = (
    *("--workloads", "qa", "chat_multi", "--num-requests", "40", "--capacities", "32", "128"),
    *("--policies", "lru", "fifo", "s3-fifo", "--workers", "1", "--skip-visualization"),
)
"""Flags of a study with a page."""


VOID = {"meta", "input", "br", "link", "img", "hr"}


class Element:
    """A tag, its attributes and all that stands in it, in order: texts and elements."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.content: list[Element | str] = []

    def all(self, tag: str = "", **attributes: str) -> Iterator[Element]:
        """All elements below, in order."""
        for part in self.content:
            if isinstance(part, Element):
                wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
                has = all(part.attributes.get(name) == value for name, value in wanted.items())
                if has and tag in ("", part.tag):
                    yield part
                yield from part.all(tag, **attributes)

    def first(self, tag: str = "", **attributes: str) -> Element:
        return next(self.all(tag, **attributes))

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)


class Page(HTMLParser):
    """Raises AssertionError where tags do not close each other."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], f"<{self._open[-1].tag}> is not closed"

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        element = Element(tag, dict(attrs))
        self._open[-1].content.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].content.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> in <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].content.append(data)

    def sections(self) -> dict[str, Element]:
        """By key."""
        return {f"{one.attributes['id']}": one for one in self.root.all("section")}

    def left_out(self) -> list[tuple[str, list[str]]]:
        """Every reason, and the titles of what is not shown for it."""
        section = self.sections().get("left-out")
        lines = [] if section is None else list(section.all("li"))
        return [
            (f"{line.content[-1]}".removeprefix(": "), [one.text for one in line.all("span")])
            for line in lines
        ]

    def table(self, key: str) -> list[dict[str, Any]]:
        """A section's numbers, row by row: a cell is its number, or its text."""
        table = self.root.first("table", id=f"{key}-table")
        columns = [cell.text for cell in table.first("thead").all("th")]
        assert len(set(columns)) == len(columns), f"{key}: two columns have one name: {columns}"
        return [dict(zip(columns, cells, strict=True)) for cells in self.rows(f"{key}-table")]

    def rows(self, name: str) -> list[list[Any]]:
        """The cells of the table with this id, the same way."""
        rows = self.root.first("table", id=name).first("tbody").all("tr")
        return [[_value(cell) for cell in row.content if isinstance(cell, Element)] for row in rows]

    def column(self, key: str, name: str) -> list[Any]:
        return [row[name] for row in self.table(key)]

    def heat_map(self, key: str) -> tuple[np.ndarray, dict[str, Any]]:
        """The (rows, columns) values of a section's first canvas, NaN for none, and its facts."""
        return self.heat_maps(key)[0]

    def heat_maps(self, key: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """The same of all its canvases."""
        found = []
        for canvas in self.sections()[key].all("canvas"):
            facts = json.loads(canvas.attributes["data-facts"] or "")
            packed = gzip.decompress(base64.b64decode(canvas.attributes["data-cells"] or ""))
            cells = np.frombuffer(packed, np.uint8).reshape(facts["rows"], facts["columns"]).astype(float)
            values = np.where(cells == 0, np.nan, (cells - 1) / facts["levels"] * facts["high"])
            found.append((values, facts))
        return found

    def addresses(self) -> list[str]:
        """Everything that a browser could follow or load: attributes, style sheets and scripts."""
        found = []
        for element in self.root.all():
            for name in ("src", "href", "action", "srcset", "poster", "data", "xlink:href", "formaction"):
                if element.attributes.get(name) is not None:
                    found.append(f"{element.attributes[name]}")
            if style := element.attributes.get("style"):
                found += re.findall(r"url\([^)]*\)", style)
            if element.tag in ("style", "script"):
                calls = r"url\([^)]*\)|@import[^;]*|\bimport\b[^;]*|\bfetch\([^)]*\)|XMLHttpRequest|\w+://[^\s'\"]*"
                found += re.findall(calls, element.text)
        return found

    def text_boxes(self, svg: Element) -> list[tuple[float, float, float, float, str]]:
        """Left, top, right, bottom and text of a drawing's upright labels, their widths estimated."""
        boxes = []
        for text in svg.all("text"):
            if "transform" in text.attributes:
                continue
            small = "small" in (text.attributes.get("class") or "")
            width, size = text_width(text.text, 11 if small else 12), 11 if small else 12
            x, y = float(text.attributes["x"] or 0), float(text.attributes["y"] or 0)
            left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.attributes["text-anchor"] or ""]
            boxes.append((left, y - size * 0.75, left + width, y + size * 0.2, text.text))
        return boxes


def _value(cell: Element) -> Any:
    stored = cell.attributes.get("data-value")
    if stored is None:
        return cell.text or None
    return json.loads(stored) if stored else None
