"""The folder of one study, described by its manifest. It is new or empty, and never overwritten.

`manifest.json` is written first with the state `running`, and at the end with `complete`, or with
`incomplete` and the error. A file with text, or with a row per request or block, is readable by its owner
only; one that only counts, JSON or CSV, by whom the system lets. Knows no metric.

    with open_study(Path("outputs/study"), {"study": "run", "argv": [...]}) as folder:
        folder.write_json("multi_turn_stats.json", stats)
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.files import write_atomically, write_json
from dsatrace.text import for_file_name
from dsatrace.version import __version__
from dsatrace.workloads.private_file import private_file

MANIFEST_FILE = "manifest.json"
_CSV_ROWS_A_WRITE = 4096


class OutputFolder:
    """Hands out paths directly inside one folder, each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: list[str] = [MANIFEST_FILE]
        self._label = ""

    def labelled(self, label: str) -> OutputFolder:
        """The same folder; names get the label, if it is not empty, before their suffix."""
        part = copy.copy(self)
        part._label = label
        return part

    def file(self, name: str) -> Path:
        """The path of a new file; raises a `UserError` for a name outside the folder or taken."""
        name = self._with_label(name)
        if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
            raise UserError(f"output file {name!r}: give a plain file name; it is put into {self.path}")
        if name in self._names:
            raise UserError(f"output file {name!r}: the study writes another file of that name")
        self._names.append(name)
        return self.path / name

    @property
    def names(self) -> list[str]:
        """Files asked for so far, without the manifest."""
        return self._names[1:]

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        write_json(self.file(name), record)

    def write_chosen(self, given: str | None, default: str, record: Mapping[str, Any]) -> None:
        """Writes the JSON file that the user named, else `default`.

        A name is that of the file in the folder. A path is that of a copy elsewhere.
        """
        if given is None or Path(given).name == given:
            self.write_json(given or default, record)
            return
        path = Path(self._with_label(given))
        try:
            if path.exists():
                raise UserError(
                    f"{path}: exists already, and results are never overwritten; name another --output-file"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write_json(default, record)
            write_json(path, record)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot write: {reason}; name another --output-file") from error

    def _with_label(self, name: str) -> str:
        if not self._label:
            return name
        stem, dot, suffix = name.rpartition(".")
        return f"{stem}_{self._label}.{suffix}" if dot else f"{name}_{self._label}"

    def write_counts(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """A CSV file of the rows, all of the same columns; None is an empty cell."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.file(name), text.getvalue().encode())

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A header and a row per request or block, for their owner's eyes; None is an empty cell."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        with private_file(self.file(name)) as file:
            for number, row in enumerate(rows, 1):
                writer.writerow(row)
                if number % _CSV_ROWS_A_WRITE == 0:
                    file.write(_drained(text))
            file.write(_drained(text))


def check_output(path: Path) -> None:
    """Raises a `UserError` unless the folder is new or empty; call it before the long work."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{path}: holds something already, and results are never overwritten; "
                "name a new or empty folder with --output-dir"
            )
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot use the folder: {reason}; name another with --output-dir") from error


@contextlib.contextmanager
def open_study(path: Path, manifest: Mapping[str, Any]) -> Iterator[OutputFolder]:
    """Makes the folder and keeps its manifest up to date; `manifest` describes the study."""
    check_output(path)
    folder = OutputFolder(path)
    head = {
        "tool": "dsatrace",
        "tool_version": __version__,
        "state": "running",
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **manifest,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / MANIFEST_FILE, head)
        yield folder
    except BaseException as error:
        # The first error is the one to see, so nothing that happens here may hide it.
        with contextlib.suppress(OSError):
            write_json(path / MANIFEST_FILE, {**head, "state": "incomplete", "error": type(error).__name__})
        if isinstance(error, OSError) and error.filename:
            raise UserError(
                f"{error.filename}: cannot write: {error.strerror}; name a folder with room in --output-dir"
            ) from error
        raise
    write_json(path / MANIFEST_FILE, {**head, "state": "complete", "files": folder.names})


def file_labels(names: Sequence[str]) -> dict[str, str]:
    """A part of a file name for each workload, no two alike."""
    labels: dict[str, str] = {}
    for name in names:
        stem = for_file_name(name) or "trace"
        label, number = stem, 2
        while label in labels.values():
            label, number = f"{stem}_{number}", number + 1
        labels[name] = label
    return labels


def _drained(text: io.StringIO) -> bytes:
    data = text.getvalue().encode()
    text.seek(0)
    text.truncate()
    return data
