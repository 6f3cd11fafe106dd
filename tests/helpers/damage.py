"""Alters files as faults do: a value in JSON, bytes anywhere, or what stands in the file's place.

for draw in draws(seed, 100):
    alter(path, draw)          # in place
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.json_edits import changed, key_paths

VALUES: tuple[Any, ...] = (
    *(..., None, True, False, 0, -1, 1, 3, 1.5, -0.5, 1e308, 2**31, 2**63, 2**64, 10**30, float("nan")),
    *("", "x", "nan", "\ud800", "a\nb", "../x", [], {}, [None], [[]], [-1], [2**63], ["x"], {"x": {}}),
)
"""What a value becomes; `...` removes it."""


def overwrite(path: Path, data: bytes) -> None:
    """As `write_bytes`, ten times faster: ext4 sends a file to the disk at once that was cut to nothing."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        file.write(data)
        file.truncate()


def draws(seed: int, count: int) -> Iterator[random.Random]:
    """Independent draws, so that a case can be made again alone."""
    for i in range(count):
        yield random.Random(f"{seed} {i}")


def alter(path: Path, draw: random.Random) -> str:
    """Alters the file by one fault; returns what was done."""
    whole = path.read_bytes()
    kind = draw.choices(("value", "bytes", "whole", "place"), (75, 17, 6, 2))[0]
    if kind == "place":
        path.unlink()
        if draw.random() < 0.5:
            path.mkdir()
            return f"{path.name}: a directory"
        return f"{path.name}: missing"
    if kind == "value" and (altered := _other_value(whole, draw)):
        data, what = altered
    elif kind == "whole":
        data, what = _replaced(whole, draw)
    else:
        data, what = _other_bytes(whole, draw)
    overwrite(path, data)
    return f"{path.name}: {what}"


def _other_value(whole: bytes, draw: random.Random) -> tuple[bytes, str] | None:
    """One value of a JSON document, or of one of its lines."""
    lines = whole.splitlines(keepends=True)
    try:
        json.loads(whole)
        lines, row = [whole], 0
    except ValueError:
        row = draw.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[row])
    except (ValueError, IndexError):
        return None
    places = list(key_paths(value))
    if not places:
        return None
    place = draw.choice(places)
    new = draw.choice(VALUES)
    end = b"\n" if lines[row].endswith(b"\n") else b""
    lines[row] = json.dumps(changed(value, place, new)).encode() + end
    return b"".join(lines), f"row {row} {'.'.join(map(str, place))} = {new!r}"


def _replaced(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    others = {
        "nothing": b"",
        "deep": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "gzip": gzip.compress(whole[:100_000]),
        "UTF-16": whole[:100_000].decode("utf-8", "replace").encode("utf-16"),
        "a number": b"3",
        "a list": b"[]",
        "an object": b"{}",
        "a long number": b"9" * 5000,
        "lines": b"\n\n\n",
        "NULs": b"\0" * 64,
        "deep in an object": whole[:-2] + b',"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    }
    name = draw.choice(list(others))
    return others[name], name


def _other_bytes(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    if not whole:
        return b"\xff", "a byte"
    at = draw.randrange(len(whole))
    size = draw.choice((1, 1, 8, 100))
    some = bytes(draw.choice(b'\0\xff{}[]",:0-9e\\\n x') for _ in range(size))
    faults = {
        "cut off": whole[:at],
        "lost": whole[:at] + whole[at + size :],
        "put in": whole[:at] + some + whole[at:],
        "replaced": whole[:at] + some + whole[at + size :],
        "twice": whole[:at] + whole[max(0, at - 100) :],
    }
    name = draw.choice(list(faults))
    return faults[name], f"byte {at}: {size} {name}"
