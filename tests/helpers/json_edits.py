"""Edits of JSON-ready values, for tests that spoil a file: every place in it, and copies changed there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

Path = tuple[Any, ...]


def at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A copy that holds `new` at the path; `...` deletes what is there. The rest is the value's own."""
    key, *inner = path
    copied = copy.copy(value)
    if inner:
        copied[key] = changed(value[key], inner, new)
    elif new is ...:
        del copied[key]
    else:
        copied[key] = new
    return copied


def key_paths(value: Any, above: Path = ()) -> Iterator[Path]:
    """Every key of every object, and the first place of every list."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:1]
    for key, inner in items:
        yield (*above, key)
        yield from key_paths(inner, (*above, key))


def number_paths(value: Any, above: Path = ()) -> Iterator[Path]:
    """Every number, in objects and lists."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from number_paths(inner, (*above, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield above
