"""Exports a fetched data set to `data/<name>/`: plain files that a run reads without the hub.

    data/ruler/<task>/validation_<length>.jsonl         as in the archive
    data/longbenchv2/longbenchv2_train[_limitN].jsonl   one row per line
    data/sharegpt/sharegpt_train[_limitN].jsonl
    data/burstgpt/burstgpt_train[_limitN].csv           the file's own columns

Rows are streamed, one in memory. An export appears whole or not at all; `SOURCE.json` beside
it says what it was made of.

    export_data_set(DATA_SETS["longbenchv2"], fetched, Path("data/longbenchv2"), limit=100)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.data_set import DataSet
from dsatrace.workloads.digests import Progress, file_sha256, folder_sha256, no_progress
from dsatrace.workloads.hub import Fetched
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.rows import BadRow, BadRows, check_limit

SOURCE_FILE = "SOURCE.json"


@dataclasses.dataclass(frozen=True)
class Export:
    """The content of `SOURCE.json`. `name` is the exported file, "." for a folder; `sha256` is its digest."""

    name: str
    sha256: str
    num_rows: int
    limit: int | None
    repo: str
    commit: str
    file: str
    file_sha256: str
    licence: str

    def text(self) -> str:
        return f"{self.repo}@{self.commit} {self.file} sha256:{self.file_sha256}"


def read_export(folder: Path) -> Export | None:
    """What the folder's files were exported from; None without a `SOURCE.json`."""
    path = folder / SOURCE_FILE
    try:
        values = json.loads(path.read_bytes())
        kinds = {field.name: field.type for field in dataclasses.fields(Export)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise ValueError("its keys are not those of an export")
        if any(not isinstance(values[key], str) for key, kind in kinds.items() if kind == "str"):
            raise ValueError("a text is missing")
        return Export(**values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not an export's description: {error}; export again, or delete it"
        ) from error


def export_data_set(
    data_set: DataSet,
    fetched: Fetched,
    folder: Path,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> Export:
    """Writes the first `limit` rows; returns the content of `SOURCE.json`.

    Raises `UserError` for a source that is not whole and for files that are not from an export.
    The folder then stays as it was.
    """
    check_limit("limit", limit)
    folder = folder.resolve()
    name = data_set.export.format("" if limit is None else f"_limit{limit}")
    replaced = data_set.folders or (name,)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [entry for entry in replaced if (folder / entry).exists()]
        if there and read_export(folder) is None:
            raise UserError(
                f"{folder / there[0]}: is there and not from an export; move it away or name another --out"
            )
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            made = Path(temporary)
            num_rows = data_set.write(fetched.path, made / name, limit)
            digest = folder_sha256(made, progress) if name == "." else file_sha256(made / name, progress)
            export = Export(
                name=name,
                sha256=digest,
                num_rows=num_rows,
                limit=limit,
                repo=fetched.file.repo,
                commit=fetched.commit,
                file=fetched.file.file,
                file_sha256=fetched.sha256,
                licence=data_set.licence,
            )
            _move(made, folder, export, data_set.folders)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the export: {error.strerror or error}; make room, or name another --out"
        ) from error
    return export


def _move(made: Path, folder: Path, export: Export, folders: Sequence[str]) -> None:
    """Moves an export to its place. `SOURCE.json` goes first: its sha256 shows if the rest did not follow."""
    text = json.dumps(dataclasses.asdict(export), indent=1) + "\n"
    (made / SOURCE_FILE).write_text(text, encoding="utf-8")
    (made / SOURCE_FILE).replace(folder / SOURCE_FILE)
    for name in folders:
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for entry in sorted(made.iterdir()):
        entry.replace(folder / entry.name)


class WholeFile(BadRows):
    """The policy for a file that is copied: every row must be usable."""

    def reject(self, place: str, fault: BadRow) -> None:
        raise UserError(f"{place}: {fault}; the file is not whole: delete it and fetch it again") from fault


def write_json_lines(source: Path, target: Path, limit: int | None) -> int:
    """Writes the first rows of a JSON array or of JSON lines, one per line; returns how many."""
    rows = read_json_rows(source, lambda number, row: json.dumps(row) + "\n", WholeFile())
    return write_lines(target, (line.encode() for line in itertools.islice(rows, limit)))


def write_lines(target: Path, lines: Iterable[bytes]) -> int:
    """Writes a new file; returns the number of lines."""
    num_lines = 0
    with target.open("xb") as out:
        for line in lines:
            out.write(line)
            num_lines += 1
    return num_lines
