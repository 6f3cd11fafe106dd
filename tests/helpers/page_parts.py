"""What a page holds, read back from its HTML: tables as numbers, heat maps as bytes, the text.

page = PageParts(html)
page.tables["blocks-table"]        # [["all", 16.0, 85.7, ...], ...]
page.maps[0].cells                 # (R, C) uint8, with page.maps[0].facts
"""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any, NamedTuple

import numpy as np


class HeatMap(NamedTuple):
    facts: dict[str, Any]
    cells: np.ndarray  # (R, C) uint8: 0 for no value, else 1 + its level

    @property
    def values(self) -> np.ndarray:
        """(R, C), NaN for none."""
        known = (self.cells.astype(float) - 1) / self.facts["levels"] * self.facts["high"]
        return np.where(self.cells == 0, np.nan, known)


class PageParts(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.tables: dict[str, list[list[Any]]] = {}
        self.maps: list[HeatMap] = []
        self.attributes: dict[str, dict[str, str]] = {}
        """By the name of a `data-` attribute, all attributes of the first element that has it."""
        self._table: list[list[Any]] | None = None
        self._cell: Any = None
        self._in_head = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if "id" in told:
            self.ids.append(told["id"])
        for name in told:
            if name.startswith("data-"):
                self.attributes.setdefault(name, told)
        if tag == "table":
            self._table = self.tables.setdefault(told.get("id", f"table {len(self.tables)}"), [])
        elif tag == "thead":
            self._in_head = True
        elif tag == "tr" and self._table is not None and not self._in_head:
            self._table.append([])
        elif tag in ("td", "th") and not self._in_head:
            self._cell = "" if "data-value" not in told else _number(told["data-value"])
            self._is_number = "data-value" in told
        elif tag == "canvas" and "data-cells" in told:
            facts = json.loads(told["data-facts"])
            cells = np.frombuffer(gzip.decompress(base64.b64decode(told["data-cells"])), np.uint8)
            self.maps.append(HeatMap(facts, cells.reshape(facts["rows"], facts["columns"])))

    def handle_endtag(self, tag: str) -> None:
        if tag == "thead":
            self._in_head = False
        elif tag in ("td", "th") and self._cell is not None and self._table is not None:
            self._table[-1].append(self._cell)
            self._cell = None
        elif tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None and not self._is_number:
            self._cell += data


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
