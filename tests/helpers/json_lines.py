"""Files of JSON lines, written and read back whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
